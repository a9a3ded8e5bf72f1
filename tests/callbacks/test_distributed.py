"""Several processes prune the same weights, and as one process with their joined batches does."""

import pytest
import torch
from processes import alone, saved, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process and two have made: a start of processes takes seconds, training does not."""
    folder = tmp_path_factory.mktemp("pruned")
    alone("ddp_job", folder, "plain")
    start("ddp_job", folder, 2, "vae", "gan", "plain")
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned-by-four")
    start("ddp_job", folder, 4, "vae", "plain")
    return folder


@pytest.mark.parametrize("kind", ["vae", "gan"])
def test_two_processes_have_equal_masks_and_weights(folder, kind):
    first, second = saved(folder, kind, 2)
    assert first["steps"] == second["steps"]
    for path, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][path]), path
    zeros = sum(int(mask.sum()) for mask in first["masks"].values())
    assert zeros == round(0.8 * sum(mask.numel() for mask in first["masks"].values()))
    for name, value in first["model"].items():
        if "running" not in name:  # BatchNorm statistics are each process's own
            assert torch.equal(value, second["model"][name]), name


@pytest.mark.slow
def test_four_processes_have_equal_masks(four):
    states = saved(four, "vae", 4)
    for state in states[1:]:
        for path, mask in states[0]["masks"].items():
            assert torch.equal(mask, state["masks"][path])


def test_two_processes_equal_one_with_the_joined_batch(folder):
    as_one(folder, saved(folder, "plain", 2)[0])


@pytest.mark.slow
def test_four_processes_equal_one_with_the_joined_batch(folder, four):
    as_one(folder, saved(four, "plain", 4)[0])


def as_one(folder, first):
    (one,) = saved(folder, "plain", 1)
    for path, mask in one["masks"].items():
        assert torch.equal(mask, first["masks"][path]), path
    for name, value in one["model"].items():
        torch.testing.assert_close(value, first["model"][name])
