"""Several processes prune the same weights, and as one process with their joined batches does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1] / "helpers"


def run(folder, kind, processes):
    done = subprocess.run(
        [sys.executable, TESTS / "ddp_job.py", folder, kind, str(processes)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("kind", ["vae", "gan"])
def test_two_processes_have_equal_masks_and_weights(tmp_path, kind):
    first, second = run(tmp_path, kind, 2)
    assert first["steps"] == second["steps"]
    for path, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][path]), path
    zeros = sum(int(mask.sum()) for mask in first["masks"].values())
    assert zeros == round(0.8 * sum(mask.numel() for mask in first["masks"].values()))
    for name, value in first["model"].items():
        if "running" not in name:  # BatchNorm statistics are each process's own
            assert torch.equal(value, second["model"][name]), name


@pytest.mark.slow
def test_four_processes_have_equal_masks(tmp_path):
    states = run(tmp_path, "vae", 4)
    for state in states[1:]:
        for path, mask in states[0]["masks"].items():
            assert torch.equal(mask, state["masks"][path])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_with_the_joined_batch(tmp_path, processes):
    (alone,) = run(tmp_path, "plain", 1)
    first, *_ = run(tmp_path, "plain", processes)
    for path, mask in alone["masks"].items():
        assert torch.equal(mask, first["masks"][path]), path
    for name, value in alone["model"].items():
        torch.testing.assert_close(value, first["model"][name])
