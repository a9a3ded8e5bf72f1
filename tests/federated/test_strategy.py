"""Server and clients over Flower's messages: who holds what, who is refused, what it costs."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="the extra federated is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from local_grid import LocalGrid

from lightning_compress.federated import (
    CompressedStrategy,
    CompressedUpdates,
    UpdateCodec,
    record_of,
    tensors_of_record,
)
from lightning_compress.federated.strategy import refuse_secure_aggregation

UP = UpdateCodec(density=0.2, relative_step=1.0)
DOWN = UpdateCodec(density=0.3, relative_step=1.0)
PLAIN = UpdateCodec.plain("fp32")


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30))
    return {name: one.clone() for name, one in net.state_dict().items()}


def client(up, down, *, initial=model, folder=None, seen=None):
    """An app that knows nothing of compression: it moves each array towards its own point."""
    app = ClientApp(mods=[CompressedUpdates(up, down, initial=initial, folder=folder)])
    app._mods[0].answer(app)

    @app.train()
    def train(message, context):
        arrays = tensors_of_record(message.content["arrays"])
        place = context.node_config["partition-id"]
        if seen is not None:
            copied = {name: one.clone() for name, one in arrays.items()}
            seen.append((place, message.content["config"]["server-round"], copied))
        goal = torch.linspace(-1, 1, 600).reshape(30, 20) * (1 + place)
        arrays["0.weight"] += 0.5 * (goal - arrays["0.weight"])
        arrays["1.num_batches_tracked"] += 5
        content = {"arrays": record_of(arrays)}
        content["metrics"] = MetricRecord({"num-examples": 10 + place, "loss": 1.0})
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        arrays = tensors_of_record(message.content["arrays"])
        value = arrays["0.weight"].mean().item()
        content = {"metrics": MetricRecord({"num-examples": 1, "mean": value})}
        return Message(RecordDict(content), reply_to=message)

    return app


def inner(kind=FedAvg, **arguments):
    return kind(fraction_evaluate=0.0, min_available_nodes=4, **arguments)


def run(grid, strategy, rounds=3, evaluate_fn=None):
    return strategy.start(
        grid, record_of(model()), num_rounds=rounds, timeout=5, evaluate_fn=evaluate_fn
    )


def arrays_of(result):
    return tensors_of_record(result.arrays)


@pytest.mark.parametrize("kind", [FedAvg, FedProx, FedAdam])
def test_without_loss_it_is_flowers_own_strategy(kind):
    """fp32 both ways gives what the bare strategy gives without our mod and wrapper."""
    arguments = {"proximal_mu": 0.1} if kind is FedProx else {}
    wrapped = CompressedStrategy(inner(kind, **arguments), up=PLAIN, down=PLAIN)
    ours = run(LocalGrid(client(PLAIN, PLAIN), 4), wrapped)
    plain = plain_run(inner(kind, **arguments))
    for name, one in arrays_of(plain).items():
        torch.testing.assert_close(arrays_of(ours)[name], one.float(), rtol=1e-4, atol=1e-4)


def plain_run(strategy):
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = tensors_of_record(message.content["arrays"])
        place = context.node_config["partition-id"]
        goal = torch.linspace(-1, 1, 600).reshape(30, 20) * (1 + place)
        arrays["0.weight"] += 0.5 * (goal - arrays["0.weight"])
        content = {"arrays": record_of(arrays)}
        content["metrics"] = MetricRecord({"num-examples": 10 + place, "loss": 1.0})
        return Message(RecordDict(content), reply_to=message)

    floats = {name: one for name, one in model().items() if name.endswith(("weight", "bias"))}
    return strategy.start(LocalGrid(app, 4), record_of(floats), num_rounds=3, timeout=5)


def test_every_client_trains_from_the_very_bits_the_server_thinks_it_holds():
    seen = []
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)
    shared = []
    strategy.on_round = lambda row: shared.append(dict(strategy.shared))
    run(LocalGrid(client(UP, DOWN, seen=seen), 4), strategy, rounds=4)
    before = [model(), *shared]
    assert len(seen) == 16
    for _, number, arrays in seen:
        for name in DOWN.methods(arrays):
            assert arrays[name].equal(before[number - 1][name]), (number, name)
    assert not strategy.shared["0.weight"].equal(strategy.exact["0.weight"])  # it is lossy


def test_compressed_rounds_come_near_to_where_fp32_comes():
    """Clients that pull to different points, each with a fifth of its differences a round."""

    def rounds(up, down):
        strategy = CompressedStrategy(inner(), up=up, down=down)
        found = arrays_of(run(LocalGrid(client(up, down), 4), strategy, rounds=25))["0.weight"]
        return found, strategy.rounds

    exact, plain = rounds(PLAIN, PLAIN)
    ours, rows = rounds(UP, DOWN)
    start = (model()["0.weight"] - exact).norm()
    assert (exact - ours).norm() < 0.25 * start
    assert sum(row["up"] for row in rows) < 0.3 * sum(row["up"] for row in plain)


def test_the_ledger_counts_the_bytes_of_the_messages():
    sizes = {}
    grid = LocalGrid(client(UP, DOWN), 4)
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)

    def note(reply):
        total = sum(one.count_bytes() for one in reply.content.values())
        number = len(strategy.rounds)
        sizes[number] = sizes.get(number, 0) + total

    grid.change = dict.fromkeys(grid.contexts, note)
    run(grid, strategy)
    sent = [sum(one.count_bytes() for one in message.content.values()) for message in grid.sent]
    assert [row["up"] for row in strategy.rounds] == list(sizes.values())
    assert sum(row["down"] for row in strategy.rounds) == sum(sent)
    assert [row["round"] for row in strategy.rounds] == [1, 2, 3]
    assert all(row["clients"] == 4 and row["refused"] == {} for row in strategy.rounds)
    assert strategy.rounds[0]["down"] < 2000  # the first model is made from the seed, not sent


def broken(payload):
    def change(reply):
        key = next(iter(reply.content.array_records), None)
        if key is not None:
            array = next(iter(reply.content[key].values()))
            data = payload(array.data)
            array = Array(dtype="uint8", shape=(len(data),), stype=array.stype, data=data)
            reply.content[key] = ArrayRecord({"update": array})

    return change


def not_a_number(reply):
    if reply.content.metric_records:
        reply.content["metrics"] = MetricRecord({"num-examples": float("nan"), "loss": 1.0})


def stranger(reply):
    if reply.content.array_records:
        reply.content["arrays"] = ArrayRecord({"update": Array(np.zeros(3, np.float32))})


def of_an_older_model(reply):
    if reply.content.array_records:
        note = dict(reply.content["lightning_compress"])
        reply.content["lightning_compress"] = ConfigRecord({**note, "version": 17})


def without_note(reply):
    if reply.content.array_records:
        del reply.content["lightning_compress"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "damaged"),
        (broken(lambda data: data[: len(data) // 2]), "damaged"),
        (broken(lambda data: data + b"\0" * 200_000), "oversized"),
        (stranger, "foreign"),
        (not_a_number, "not finite: metric 'num-examples'"),
        (of_an_older_model, "foreign: version 17, not 0"),
        (without_note, "foreign: no update"),
    ],
)
def test_a_bad_update_is_named_and_left_out_and_the_round_goes_on(change, reason):
    grid = LocalGrid(client(UP, DOWN), 4)
    grid.change = {grid.node(2): change}
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)
    run(grid, strategy, rounds=1)
    (row,) = strategy.rounds
    assert row["clients"] == 3
    assert list(row["refused"]) == ["2"]
    assert reason in row["refused"]["2"]
    alone = LocalGrid(client(UP, DOWN), 4)
    alone.silent = {alone.node(2)}
    other = CompressedStrategy(inner(), up=UP, down=DOWN, hello_timeout=1)
    run(alone, other, rounds=1)
    for name, one in strategy.exact.items():
        assert one.equal(other.exact[name]), name  # as if the client had not been there


def test_variances_stay_above_zero_under_an_adaptive_strategy():
    def app(up, down):
        found = ClientApp(mods=[CompressedUpdates(up, down, initial=model)])

        @found.train()
        def train(message, context):
            arrays = tensors_of_record(message.content["arrays"])
            arrays["1.running_var"] = torch.linspace(1e-4, 3, 30)
            content = {"arrays": record_of(arrays)}
            content["metrics"] = MetricRecord({"num-examples": 1})
            return Message(RecordDict(content), reply_to=message)

        return found

    codec = UpdateCodec(relative_step=1.0)
    strategy = CompressedStrategy(inner(FedAdam, eta=1.0), up=codec, down=codec)
    run(LocalGrid(app(codec, codec), 4), strategy, rounds=8)
    assert strategy.exact["1.running_var"].min() >= 0
    assert strategy.shared["1.running_var"].min() >= 0
    torch.testing.assert_close(
        strategy.exact["1.running_var"], torch.linspace(1e-4, 3, 30), atol=0.03, rtol=0
    )


def test_a_round_of_bad_updates_leaves_the_model_as_it_was():
    grid = LocalGrid(client(UP, DOWN), 4)
    grid.change = {node: broken(lambda data: b"") for node in grid.contexts}
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)
    run(grid, strategy, rounds=2)
    assert [row["clients"] for row in strategy.rounds] == [0, 0]
    assert strategy.exact["0.weight"].equal(model()["0.weight"])


def test_a_late_client_gets_the_updates_that_it_lacks():
    seen = []
    app = client(UP, DOWN, seen=seen)
    grid = LocalGrid(app, 5)
    context = grid.contexts.pop(late := grid.node(4))
    strategy = CompressedStrategy(inner(min_train_nodes=4), up=UP, down=DOWN)

    def join(row):
        if row["round"] == 2:
            grid.contexts[late] = context

    strategy.on_round = join
    run(grid, strategy, rounds=4)
    assert [row["clients"] for row in strategy.rounds] == [4, 4, 5, 5]
    first = next(m for m in grid.sent if m.metadata.dst_node_id == late
                 and m.metadata.message_type == "train")  # fmt: skip
    assert list(first.content["arrays"]) == ["000001", "000002"]
    (arrays,) = (arrays for place, number, arrays in seen if (place, number) == (4, 3))
    (other,) = (arrays for place, number, arrays in seen if (place, number) == (0, 3))
    assert arrays["0.weight"].equal(other["0.weight"])


@pytest.mark.parametrize("initial", [None, model])
def test_a_client_that_lost_its_state_is_brought_up_again(initial):
    """A restarted process of the same node: without its state it asks for the whole model."""
    seen = []
    grid = LocalGrid(client(UP, DOWN, initial=initial, seen=seen), 4)
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)

    def forget(row):
        if row["round"] == 2:
            grid.contexts[grid.node(1)].state = RecordDict()

    strategy.on_round = forget
    run(grid, strategy, rounds=4)
    assert [row["clients"] for row in strategy.rounds] == [4, 4, 3, 4]
    assert "asks for the whole model" in strategy.rounds[2]["refused"]["1"]
    (arrays,) = (arrays for place, number, arrays in seen if (place, number) == (1, 4))
    (other,) = (arrays for place, number, arrays in seen if (place, number) == (0, 4))
    assert arrays["0.weight"].equal(other["0.weight"])


def test_a_node_that_does_not_greet_gets_the_whole_model_and_its_name():
    app = client(UP, DOWN)
    del app._registered_funcs["query.lightning_compress"]
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)
    grid = LocalGrid(app, 4)
    run(grid, strategy, rounds=2)
    assert [row["clients"] for row in strategy.rounds] == [4, 4]
    assert strategy.rounds[0]["down"] > 3 * strategy.rounds[1]["down"]
    assert sorted(strategy.names.values()) == ["0", "1", "2", "3"]


def test_fewer_clients_a_round_are_drawn_by_the_seed_and_all_follow():
    def drawn(seed):
        seen = []
        grid = LocalGrid(client(UP, DOWN, seen=seen), 4, first=random.randrange(10**6))
        strategy = CompressedStrategy(inner(fraction_train=0.5), up=UP, down=DOWN, seed=seed)
        run(grid, strategy, rounds=6)
        assert all(row["clients"] == 2 and not row["refused"] for row in strategy.rounds)
        return [(place, number) for place, number, _ in seen], strategy.exact["0.weight"]

    (first, one), (again, same), (other, _) = drawn(3), drawn(3), drawn(4)
    assert sorted(first) == sorted(again) != sorted(other)
    assert one.equal(same)
    assert {place for place, _ in first} == {0, 1, 2, 3}


def test_of_a_thousand_clients_only_those_that_train_make_and_keep_a_model():
    made = []

    def initial():
        made.append(1)
        return model()

    grid = LocalGrid(client(UP, DOWN, initial=initial), 1000)
    strategy = CompressedStrategy(inner(fraction_train=0.01), up=UP, down=DOWN)
    run(grid, strategy, rounds=2)
    trained = sum(row["clients"] for row in strategy.rounds)
    assert trained == 20
    assert len(made) <= trained  # a greeting needs none
    assert sum(bool(one.state) for one in grid.contexts.values()) <= trained
    greetings = sum(message.metadata.message_type.startswith("query") for message in grid.sent)
    assert greetings == 1000


def test_a_run_that_is_killed_between_rounds_ends_as_if_it_had_not(tmp_path):
    def strategy(folder):
        return CompressedStrategy(
            inner(FedAdam, fraction_train=0.75), up=UP, down=DOWN, checkpoint=folder / "server.pt"
        )

    one, two = tmp_path / "one", tmp_path / "two"
    straight = strategy(one)
    run(LocalGrid(client(UP, DOWN, folder=one), 4), straight, rounds=6)
    first = strategy(two)
    run(LocalGrid(client(UP, DOWN, folder=two), 4), first, rounds=3)
    # Of the round that is under way some clients may have finished.
    again = strategy(two)
    grid = LocalGrid(client(UP, DOWN, folder=two), 4, first=5000)
    half = strategy(two)
    grid_half = LocalGrid(client(UP, DOWN, folder=two), 4, first=9000)

    class KilledError(Exception): ...

    def kill(*_):
        raise KilledError

    half.aggregate_train = kill
    with pytest.raises(KilledError):
        run(grid_half, half, rounds=6)
    run(grid, again, rounds=6)
    assert [row["round"] for row in again.rounds] == [1, 2, 3, 4, 5, 6]
    for name, tensor in straight.exact.items():
        assert tensor.equal(again.exact[name]), name
    for row, other in zip(straight.rounds, again.rounds, strict=True):
        assert row["clients"] == other["clients"]
        greeted = row["round"] == 4  # a resumed server meets the nodes anew
        assert row["up"] < other["up"] if greeted else row["up"] == other["up"]


def test_evaluation_by_the_clients_sees_the_new_model():
    strategy = CompressedStrategy(FedAvg(min_available_nodes=4), up=UP, down=DOWN)
    result = run(LocalGrid(client(UP, DOWN), 4), strategy, rounds=2)
    found = result.evaluate_metrics_clientapp[2]["mean"]
    assert found == pytest.approx(strategy.shared["0.weight"].mean().item(), abs=1e-6)


def test_quality_stands_in_the_ledger():
    strategy = CompressedStrategy(inner(), up=UP, down=DOWN)
    run(LocalGrid(client(UP, DOWN), 4), strategy,
        evaluate_fn=lambda number, arrays: MetricRecord({"number": number}))  # fmt: skip
    assert [row["quality"] for row in strategy.rounds] == [{"number": n} for n in (1, 2, 3)]


def test_secure_aggregation_is_refused_with_the_reason():
    from flwr.client.mod import secaggplus_mod

    with pytest.raises(ValueError, match=r"secaggplus_mod cannot be combined.*differ in length"):
        refuse_secure_aggregation(secaggplus_mod)

    class SecAggStrategy(FedAvg): ...

    with pytest.raises(ValueError, match="SecAggStrategy"):
        CompressedStrategy(SecAggStrategy(), up=UP, down=DOWN)


def test_nothing_is_reported_to_anybody():
    code = (
        "import os; [os.environ.pop(n, None) for n in "
        "('FLWR_TELEMETRY_ENABLED', 'RAY_USAGE_STATS_ENABLED')]\n"
        "import lightning_compress.federated\n"
        "from flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["0", "0"]
