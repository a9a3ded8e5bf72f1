"""Several processes find the same grids, those of one process with the joined batches."""

import pytest
import torch
from processes import alone, saved, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    alone("ddp_quantization_job", folder, "plain")
    start("ddp_quantization_job", folder, 2, "gan", "vae", "plain")
    return folder


@pytest.mark.parametrize("kind", ["gan", "vae"])
def test_two_processes_have_equal_grids_and_weights(folder, kind):
    ((first,), (second,)) = saved(folder, kind, 2)
    assert first["activations"]
    assert str(first["activations"]) == str(second["activations"])
    assert str(first["weights"]) == str(second["weights"])
    for name, value in first["model"].items():
        if "running" not in name:  # BatchNorm statistics are each process's own
            assert torch.equal(value, second["model"][name]), name


def test_two_processes_equal_one_with_the_joined_batch(folder):
    as_one(folder, saved(folder, "plain", 2))


@pytest.mark.slow
def test_four_processes_equal_one_with_the_joined_batch(folder, tmp_path):
    start("ddp_quantization_job", tmp_path, 4, "plain")
    as_one(folder, saved(tmp_path, "plain", 4))


def as_one(folder, together):
    (one_process,) = saved(folder, "plain", 1)
    assert all(str(one) == str(together[0]) for one in together)
    for one, several in zip(one_process, together[0], strict=True):
        for path, mask in one["masks"].items():
            assert torch.equal(mask, several["masks"][path]), path
        for name, value in one["model"].items():
            torch.testing.assert_close(value, several["model"][name], rtol=1e-4, atol=1e-5)
        for kind in ("weights", "activations"):
            close(one[kind], several[kind])


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
