"""FSDP2: parameters spread over two processes are compressed as whole ones are, and resume."""

import pytest
import torch
from processes import alone, start
from torch import nn

from lightning_compress import TargetError
from lightning_compress.pruning.criteria import make_criterion
from lightning_compress.pruning.mask_plan import check_sharded

WEIGHTS = 6 * 7 + 7 + 7 + 7 * 6
QAT = ["minmax", "affine", "mse", "percentile", "learned", "learned_tensor", "codebook", "entropy"]
OPTIONS = ("plain", "straight_through", "afterwards", *QAT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process and two have made of the same model, in each way."""
    folder = tmp_path_factory.mktemp("sharded")
    alone("fsdp_job", folder, *OPTIONS)
    start("fsdp_job", folder, 2, *OPTIONS)
    return folder


@pytest.fixture(scope="module")
def states(folder):
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def close(one, other, atol, at=""):
    """Nested states: numbers alike, all else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            close(one[key], other[key], atol, f"{at}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            close(first, second, atol, f"{at}/{index}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol, msg=lambda m: f"{at}: {m}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=atol), at
    else:
        assert one == other, at


def pruned(state, share):
    zeros = sum(int((mask == 0).sum()) for mask in state["zeros"].values())
    assert state["sparsity"] == round(share * WEIGHTS) / WEIGHTS
    assert zeros >= round(share * WEIGHTS)


@pytest.mark.parametrize("option", ["plain", "straight_through"])
def test_the_global_threshold_is_that_of_the_whole_model(states, option):
    pruned(states[f"2-{option}-0"], 0.8)
    close(states[f"1-{option}-0"], states[f"2-{option}-0"], 1e-6)
    close(states[f"2-{option}-0"], states[f"2-{option}-1"], 0)


@pytest.mark.parametrize("option", ["afterwards", *QAT])
def test_the_grids_are_those_of_the_whole_weights(states, option):
    one, first, second = (
        states[f"{name}-{option}-{rank}"] for name, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert len(one["grids"]) == 4
    pruned(first, 0.5)
    close(one, first, 2e-6)
    close(first, second, 0)


@pytest.mark.parametrize("option", ["plain", "learned", "codebook", "entropy"])
def test_a_resumed_sharded_run_is_the_same_run(states, option):
    close(states[f"2-{option}-0"], states[f"2-{option}-resume-0"], 0)


@pytest.mark.parametrize("option", ["plain", "afterwards", *QAT])
def test_the_file_of_shards_is_that_of_the_whole_module(folder, option):
    from_shards = (folder / f"2-{option}.lcz").read_bytes()
    for rank in (0, 1):
        assert (folder / f"2-{option}-{rank}.lcz").read_bytes() == from_shards


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
