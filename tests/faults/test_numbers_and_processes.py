"""NaN in a batch or a weight, and a process of a DDP run that dies."""

import socket
import time
import warnings

import fault_jobs
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.faults


def saved(folder):
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    return checkpoint["epoch"], checkpoint["state_dict"]


def finite(state):
    return all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("autoencoder", fault_jobs.NanBatch()),
        ("autoencoder", fault_jobs.NanWeight("decoder.weight")),
        ("gan", fault_jobs.NanBatch()),
        ("gan", fault_jobs.NanWeight()),
    ],
    ids=["batch", "weight", "batch of a GAN", "weight of a GAN"],
)
def test_nan_ends_training_before_a_checkpoint_holds_it(tmp_path, kind, fault):
    expected = r"(loss is nan at step \d+|weights that are NaN or infinite).*training has diverged"
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=expected):
        fault_jobs.fit(tmp_path, kind, fault)
    epoch, state = saved(tmp_path)
    assert epoch == 1
    assert finite(state)
    assert not (tmp_path / "broken.ckpt").exists()
    with warnings.catch_warnings():
        fault_jobs.fit(tmp_path, kind)  # and without the fault it goes on from there
    assert saved(tmp_path)[0] == fault_jobs.EPOCHS - 1


def test_nan_of_the_very_last_step_is_found(tmp_path):
    last = fault_jobs.NanWeight("decoder.weight")
    data = DataLoader(TensorDataset(torch.randn(4, 6)), batch_size=4)
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"decoder\.weight"):
        fault_jobs.fit(tmp_path, "autoencoder", last, data=data, max_epochs=3)
    assert saved(tmp_path)[0] == 1


def test_a_run_with_nan_has_no_results(tmp_path, start, cache, whole_run):
    words = [*fault_jobs.SMALL, f"evaluate.cache_dir={cache}", "hydra.run.dir=run"]
    process = start(
        fault_jobs.app, tmp_path, [*words, "+callbacks.nan._target_=fault_jobs.NanBatch"]
    )
    process.join(120)
    assert process.exitcode == 1
    errors = (tmp_path / f"{process.pid}.err").read_text()
    assert "training has diverged" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "dense" / "final.ckpt").exists()
    assert finite(saved(tmp_path / "run" / "dense")[1])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("victim", [1, 0])
def test_when_one_of_two_processes_dies_the_other_ends_with_an_error(tmp_path, start, wait, victim):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    port = free_port()
    pair = [start(fault_jobs.rank, tmp_path, number, port) for number in (0, 1)]
    wait((tmp_path / "last.ckpt").exists, pair[0])
    pair[victim].kill()
    begin, other = time.monotonic(), pair[1 - victim]
    other.join(60)
    assert other.exitcode == 1, other.exitcode  # None: it hangs
    assert time.monotonic() - begin < 30
    errors = (tmp_path / str(1 - victim) / "err").read_text()
    assert "Traceback" in errors
    assert "Connection" in errors
    assert finite(saved(tmp_path)[1])
