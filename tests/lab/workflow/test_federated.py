"""`lightning-compress federated`: the ledger, the files, the page; Flower in one process."""

import json

import pytest
import torch

pytest.importorskip("flwr", reason="the extra federated is not installed")

from local_grid import LocalGrid

from lightning_compress.federated import simulation

SMALL = []
WORDS = [
    "model.width=8",
    "data.batch_size=32",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
    "federated.clients=3",
    "federated.rounds=3",
    "federated.local_epochs=1",
    "hydra.run.dir=run",
]


class KilledError(Exception): ...


@pytest.fixture
def local(monkeypatch):
    """Clients in this process; with `kill` set, the run dies when that round is aggregated."""
    settings = {"kill": None, "grids": []}

    def simulate(app, serve, *, clients, **_):
        grid = LocalGrid(app, clients, first=1000 * (1 + len(settings["grids"])))
        settings["grids"].append(grid)
        receive, rounds = grid.send_and_receive, []

        def counted(messages, *, timeout=None):
            messages = list(messages)
            replies = receive(messages, timeout=timeout)
            rounds.extend(m for m in messages[:1] if m.metadata.message_type == "train")
            if len(rounds) == settings["kill"]:
                raise KilledError
            return replies

        grid.send_and_receive = counted
        return serve(grid)

    monkeypatch.setattr(simulation, "simulate", simulate)
    return settings


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_has_a_ledger_its_twin_and_the_page(cli, local, tmp_path):
    code, out, err = cli("federated", *WORDS)
    assert code == 0, err
    found = results(tmp_path / "run")
    rounds = found["federated"]["rounds"]
    assert [row["round"] for row in rounds] == [1, 2, 3]
    for row in rounds:
        assert row["up"] > 0
        assert row["down"] > 0
        assert row["quality"]["neg_elbo"] > 0
    assert rounds[-1]["quality"]["neg_elbo"] == pytest.approx(
        found["compressed"]["quality"]["neg_elbo"]
    )
    assert found["federated"]["up"] == sum(row["up"] for row in rounds)
    assert found["federated"]["ratio_up"] > 10
    assert found["dense"]["quality"]["neg_elbo"] > 0  # the centralised baseline
    assert "round 3/3: 3 clients, up " in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "centralised baseline" in page
    assert "MB sent, up and down" in page
    assert (tmp_path / "run" / "compressed" / "model.lcz").is_file()


def test_a_run_that_was_killed_goes_on_and_ends_the_same(cli, local, tmp_path, capsys):
    cli("federated", *WORDS)
    local["kill"] = 3
    with pytest.raises(KilledError):
        cli("federated", *WORDS[:-1], "hydra.run.dir=killed")
    local["kill"] = None
    capsys.readouterr()
    code, out, err = cli("federated", *WORDS[:-1], "hydra.run.dir=again", "ckpt_path=killed")
    assert code == 0, err
    assert "round 2/3" not in out
    assert "round 3/3" in out
    straight, again = (results(tmp_path / one)["federated"]["rounds"] for one in ("run", "again"))
    assert [row["quality"] for row in straight] == [row["quality"] for row in again]


@pytest.mark.parametrize("equipment", ["eight_bits", "home"])
def test_a_gan_whose_discriminator_is_equipment(cli, local, tmp_path, equipment):
    words = ["model=dcgan", "model.discriminator_width=8", "federated.rounds=1"]
    code, _, err = cli("federated", *WORDS, *words, f"federated.equipment={equipment}")
    assert code == 0, err
    (row,) = results(tmp_path / "run")["federated"]["rounds"]
    assert row["quality"]["kid"] > 0
    client, *_ = sorted((tmp_path / "run" / "clients").iterdir())
    state = torch.load(client / "update-000001.pt", weights_only=True)
    sent = {name.split(".")[0] for name in state["residual"]}
    assert sent == ({"generator"} if equipment == "home" else {"generator", "discriminator"})
    assert any(name.startswith("discriminator") for name in state["home"]) == (equipment == "home")


def test_one_shot_ends_with_a_student_of_the_clients(cli, local, tmp_path):
    steps = ["federated=one_shot", "federated.local_epochs=1", "federated.distillation.steps=3"]
    words = [word for word in WORDS if not word.startswith(("federated.rounds", "federated.local"))]
    code, _, err = cli("federated", *words, *steps)
    assert code == 0, err
    found = results(tmp_path / "run")
    (row,) = found["federated"]["rounds"]
    assert row["quality"]["neg_elbo"] != found["compressed"]["quality"]["neg_elbo"]


def test_a_run_without_a_usable_update_fails_with_the_reason(cli, local):
    callback = "+federated.callbacks.odd._target_=builtins.object"
    code, _, err = cli("federated", *WORDS, callback)
    assert code == 1
    assert "round 1: no client's update could be used: failed: " in err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("federated.clients=0", "federated.clients=0"),
        ("federated.fraction=1.5", "federated.fraction=1.5"),
        ("federated.partition=odd", "partition='odd'"),
        ("federated.up.density=2", "density=2"),
        ("federated.up.densty=0.1", "densty"),
    ],
)
def test_bad_settings_are_named(cli, local, word, message):
    code, _, err = cli("federated", *WORDS, word)
    assert code == 1
    assert message in err
