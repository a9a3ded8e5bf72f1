"""Two processes distill as one with their joined batches does."""

import pytest
import torch
from processes import alone, saved, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    alone("distill_job", folder, "plain", "balanced")
    start("distill_job", folder, 2, "plain", "balanced", "gan")
    return folder


@pytest.mark.parametrize("kind", ["plain", "balanced"])
def test_two_processes_equal_one_with_the_joined_batch(folder, kind):
    (one,) = saved(folder, kind, 1)
    first, second = saved(folder, kind, 2)
    assert one["adapters"]
    for part in ("model", "adapters"):
        for name, value in one[part].items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(value, first[part][name], rtol=1e-4, atol=1e-5)


def test_a_gan_on_two_processes_has_one_generator(folder):
    first, second = saved(folder, "gan", 2)
    assert first["teacher_calls"] == second["teacher_calls"] == [16]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
