"""Several processes find the same grids, those of one process with the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1] / "helpers"


def run(folder, kind, processes):
    done = subprocess.run(
        [sys.executable, TESTS / "ddp_quantization_job.py", folder, kind, str(processes)],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parents[1]}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        torch.load(folder / f"{processes}-{rank}.pt", weights_only=False)
        for rank in range(processes)
    ]


@pytest.mark.parametrize("kind", ["gan", pytest.param("vae", marks=pytest.mark.slow)])
def test_two_processes_have_equal_grids_and_weights(tmp_path, kind):
    ((first,), (second,)) = run(tmp_path, kind, 2)
    assert first["activations"]
    assert str(first["activations"]) == str(second["activations"])
    assert str(first["weights"]) == str(second["weights"])
    for name, value in first["model"].items():
        if "running" not in name:  # BatchNorm statistics are each process's own
            assert torch.equal(value, second["model"][name]), name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_with_the_joined_batch(tmp_path, processes):
    (alone,) = run(tmp_path, "plain", 1)
    together = run(tmp_path, "plain", processes)
    assert all(str(one) == str(together[0]) for one in without_ranks(together))
    for one, several in zip(alone, together[0], strict=True):
        for path, mask in one["masks"].items():
            assert torch.equal(mask, several["masks"][path]), path
        for name, value in one["model"].items():
            torch.testing.assert_close(value, several["model"][name], rtol=1e-4, atol=1e-5)
        for kind in ("weights", "activations"):
            close(one[kind], several[kind])


def without_ranks(states):
    for state in states:
        for one in state:
            one.pop("rank", None)
    return states


def close(one, other):
    """Grids alike: numbers nearly, all else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        for first, second in zip(one, other, strict=True):
            close(first, second)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    else:
        assert one == other
