"""No step waits for the device: what asks it is counted on tensors that say `cuda:0`. No GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found():
    """What each kind of callback waited for, in steps without an event."""
    paths = [
        str(HERE.parents[1]),
        str(HERE.parent / "helpers"),
        str(HERE),
        os.environ.get("PYTHONPATH", ""),
    ]
    done = subprocess.run(
        [sys.executable, HERE / "waits_job.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


CASES = [
    "nothing", "pruning", "threshold", "symmetric", "affine", "moving average", "percentile", "mse",
    "learned step", "codebook", "codebook, frozen", "entropy", "entropy, rate", "entropy, frozen",
    "rate and distortion", "frozen", "non-finite guard", "projected average", "distillation", "all",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_an_event_waits_for_nothing(found, case):
    assert "error" not in found[case], found[case]["error"]
    assert found[case]["steps"] >= 15
    assert found[case]["waits"] == {}


def test_every_case_is_looked_at(found):
    assert list(found) == CASES
