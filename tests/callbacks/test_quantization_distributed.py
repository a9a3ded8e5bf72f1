"""Several processes find the same grids, those of one process with the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent.parent


def run(folder, kind, processes):
    done = subprocess.run(
        [sys.executable, TESTS / "ddp_quantization_job.py", folder, kind, str(processes)],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("kind", ["gan", pytest.param("vae", marks=pytest.mark.slow)])
def test_two_processes_have_equal_grids_and_weights(tmp_path, kind):
    first, second = run(tmp_path, kind, 2)
    assert first["grids"]
    assert str(first["grids"]) == str(second["grids"])
    for name, value in first["model"].items():
        if "running" not in name:  # BatchNorm statistics are each process's own
            assert torch.equal(value, second["model"][name]), name


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    (alone,) = run(tmp_path, "plain", 1)
    first, _ = run(tmp_path, "plain", 2)
    for name, value in alone["model"].items():
        torch.testing.assert_close(value, first["model"][name], rtol=1e-3, atol=1e-4)
    for path, pair in alone["grids"].items():
        for one, other in zip(pair, first["grids"][path], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-5)
