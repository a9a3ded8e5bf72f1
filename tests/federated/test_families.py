"""Clients of different widths in one round: the server's student learns from all of them."""

import pytest
import torch

pytest.importorskip("flwr", reason="the extra federated is not installed")

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid
from torch import nn

from lightning_compress.federated import (
    CompressedStrategy,
    CompressedUpdates,
    DistilledStrategy,
    UpdateCodec,
    distill_outputs,
    record_of,
    tensors_of_record,
)
from lightning_compress.federated.arrays import load_arrays, model_arrays

CODEC = UpdateCodec(density=1.0, relative_step=0.1)
WIDTHS = {"wide": 32, "narrow": 8}


def decoder(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6))


def family_of(name):
    return "wide" if int(name) < 2 else "narrow"


def make_app():
    makers = {name: (lambda width=width: decoder(width)) for name, width in WIDTHS.items()}
    mods = {
        name: CompressedUpdates(CODEC, CODEC, initial=lambda make=make: model_arrays(make()))
        for name, make in makers.items()
    }

    def mod(message, context, call):
        return mods[family_of(str(context.node_config["partition-id"]))](message, context, call)

    app = ClientApp(mods=[mod])

    @app.query("lightning_compress")
    def hello(message, context):
        raise AssertionError

    @app.train()
    def train(message, context):
        module = decoder(WIDTHS[family_of(str(context.node_config["partition-id"]))])
        load_arrays(module, tensors_of_record(message.content["arrays"]))
        with torch.no_grad():
            module[2].bias += 1 + context.node_config["partition-id"]
        content = {"arrays": record_of(model_arrays(module))}
        content["metrics"] = MetricRecord({"num-examples": 10})
        return Message(RecordDict(content), reply_to=message)

    return app


def test_one_shot_of_two_widths():
    def family():
        inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
        return CompressedStrategy(inner, up=CODEC, down=CODEC)

    def distill(student, teachers, weights):
        assert [len(one[0].bias) for one in teachers] == [32, 32, 8, 8]
        assert weights == [10, 10, 10, 10]
        distill_outputs(student, teachers, latent_dim=4, loss="mse", steps=250, lr=1e-2)

    strategy = DistilledStrategy(
        {name: family() for name in WIDTHS},
        {name: (lambda width=width: decoder(width)) for name, width in WIDTHS.items()},
        student=lambda: decoder(16),
        distill=distill,
        family_of=family_of,
    )
    first = record_of(model_arrays(decoder(16)))
    result = strategy.start(LocalGrid(make_app(), 4), first, num_rounds=1, timeout=5)
    student = decoder(16)
    load_arrays(student, tensors_of_record(result.arrays))
    z = torch.randn(300, 4)
    with torch.no_grad():
        teachers = [decoder(width)(z) for width in (32, 32, 8, 8)]
        mean = sum(one + 1 + place for place, one in enumerate(teachers)) / 4
        assert (student(z) - mean).square().mean() < 0.05
    (row,) = strategy.rounds
    assert row["clients"] == 4
    assert row["up"] > 0
    assert row["refused"] == {}


def test_families_without_modules_are_named():
    with pytest.raises(ValueError, match=r"families \[\] and modules"):
        DistilledStrategy({}, {"a": nn.Identity}, student=nn.Identity, distill=print)
