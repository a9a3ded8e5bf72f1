"""Two processes distill as one with their joined batches does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1] / "helpers"


def run(folder, kind, processes):
    done = subprocess.run(
        [sys.executable, TESTS / "distill_job.py", folder, kind, str(processes)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("kind", ["plain", pytest.param("balanced", marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_the_joined_batch(tmp_path, kind):
    (alone,) = run(tmp_path, kind, 1)
    first, second = run(tmp_path, kind, 2)
    assert alone["adapters"]
    for part in ("model", "adapters"):
        for name, value in alone[part].items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(value, first[part][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_gan_on_two_processes_has_one_generator(tmp_path):
    first, second = run(tmp_path, "gan", 2)
    assert first["teacher_calls"] == second["teacher_calls"] == [16]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
