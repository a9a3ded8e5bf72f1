"""One of two processes goes wrong: the run ends in bounded time, with an error that says why.

A process that dies is in tests/faults; so are moved clocks. A job of a sweep that dies is in
tests/sweeps. Plain Lightning waits for a process with fewer batches until the group's own timeout,
half an hour by default.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("uneven", "6 to 8 training batches an epoch"),
        pytest.param("raise", "a fault of rank 1", marks=pytest.mark.faults),
        pytest.param("nan", "NaN or infinite", marks=pytest.mark.faults),
    ],
)
def test_a_process_that_goes_wrong_ends_the_run(tmp_path, kind, why):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, TESTS / "ddp_fault_job.py", tmp_path, kind],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parents[1]}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode != 0
    assert why in done.stderr, done.stderr[-3000:]
    assert time.monotonic() - start < 150
