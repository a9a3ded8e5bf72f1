"""FSDP2: parameters spread over two processes are pruned as whole ones are, and resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import TargetError
from lightning_compress.pruning.criteria import make_criterion
from lightning_compress.pruning.sharded import check_sharded

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What one process and two have made of the same model, in each way."""
    folder = tmp_path_factory.mktemp("sharded")
    for processes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, TESTS / "fsdp_job.py", folder, processes],
            env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=480,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def same(one, other):
    assert one["sparsity"] == other["sparsity"] == round(0.8 * 96) / 96
    for path, (packed, shape) in one["masks"].items():
        assert shape == other["masks"][path][1]
        assert torch.equal(packed, other["masks"][path][0]), path
    for name, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", ["plain", "regrow"])
def test_the_global_threshold_is_that_of_the_whole_model(states, option):
    same(states[f"1-{option}-0"], states[f"2-{option}-0"])
    same(states[f"2-{option}-0"], states[f"2-{option}-1"])


def test_a_resumed_sharded_run_is_the_same_run(states):
    whole, resumed = states["2-plain-0"], states["2-resume-0"]
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    same(whole, resumed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"criterion": make_criterion("obs")}, "criterion OptimalBrainSurgeon"),
        ({"pooled": True}, "a granularity other than"),
        ({"regrow": "gradient"}, "regrow='gradient'"),
        ({"rewind": True}, "rewind"),
    ],
)
def test_what_needs_whole_weights_is_refused(wrong, message):
    fine = {"criterion": make_criterion("magnitude"), "pooled": False, "regrow": None}
    check_sharded(**fine, rewind=False)
    with pytest.raises(TargetError, match=message):
        check_sharded(**{**fine, "rewind": False, **wrong})


def test_a_plain_parameter_is_not_sharded():
    from lightning_compress.sharding import local_part, shards_of

    weight = nn.Linear(2, 2).weight
    assert shards_of(weight) is None
    assert local_part(weight) is weight
