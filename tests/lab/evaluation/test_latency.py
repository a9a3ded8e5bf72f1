"""No time is asserted: only who ran, in which order, and what the numbers say of each other."""

from collections import Counter
from functools import partial
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.conversion.export import export_onnx
from lightning_compress.errors import MissingExtraError
from lightning_compress.lab.evaluation import latency as latency_module
from lightning_compress.lab.evaluation.latency import (
    latency,
    latency_grid,
    onnx_runner,
    torch_runner,
)


def fake_clock(monkeypatch, durations):
    """A clock that gives each named call its next duration (ms)."""
    times = {name: iter(values) for name, values in durations.items()}
    monkeypatch.setattr(latency_module, "_time", lambda call: next(times[call()]))


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_candidates_take_turns_and_each_follows_each_other_alike(names):
    calls = []
    candidates = {name: partial(calls.append, name) for name in names}
    result = latency(candidates, repeats=400, warmup=2)
    assert list(result) == list(names)
    rounds = ["".join(calls[at : at + len(names)]) for at in range(0, len(calls), len(names))]
    assert len(rounds) == 402
    assert all(sorted(one) == list(names) for one in rounds)
    follows = Counter(pairwise(calls))
    assert all(one != other for one, other in follows)
    share = len(calls) / (len(names) * (len(names) - 1))
    assert all(
        0.8 < follows[pair] / share < 1.2 for pair in permutations(names, 2)
    )  # in a fixed order, or one that is turned round, some would find their caches warm


def test_numbers_are_percentiles_and_paired_ratios(monkeypatch):
    dense = [9.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    small = [9.0, 0.5, 1.0, 1.0, 4.0, 8.0]
    fake_clock(monkeypatch, {"dense": dense, "small": small})
    result = latency({"dense": lambda: "dense", "small": lambda: "small"}, repeats=5, warmup=1)
    got = result["small"]
    assert got.median_ms == 1.0
    assert (got.p10_ms, got.p90_ms) == tuple(np.percentile(small[1:], (10, 90)))
    assert got.ratio == 0.5  # the ratio of medians would say 0.25
    ratios = np.array(small[1:]) / np.array(dense[1:])
    assert (got.ratio_q25, got.ratio_q75) == tuple(np.percentile(ratios, (25, 75)))
    assert (result["dense"].ratio_q25, result["dense"].ratio_q75) == (1.0, 1.0)


def test_threads_are_set_for_the_run_and_put_back():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((torch.get_num_threads(), self.training, torch.is_inference_mode_enabled()))
            return x

    spy = Spy()
    before = torch.get_num_threads()
    x = torch.zeros(1, 2)
    runners = {"two": torch_runner(spy, x, 2), "one": torch_runner(spy, (x,), 1)}
    latency(runners, repeats=1, warmup=0)
    assert sorted(seen) == [(1, False, True), (2, False, True)]
    assert torch.get_num_threads() == before
    assert spy.training


def test_runners_compute_what_the_module_computes(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    x = torch.randn(4, 3)
    export_onnx(module, tmp_path / "m.onnx", x)
    expected = module[0](x).detach()
    assert torch.equal(torch_runner(module, x)(), expected)
    for threads in (1, None):
        (got,) = onnx_runner(tmp_path / "m.onnx", x, threads)()
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match=r"takes 1 inputs .* got 2"):
        onnx_runner(tmp_path / "m.onnx", (x, x))


def test_the_grid_has_every_batch_and_thread_count():
    shapes = []

    class Shape(nn.Module):
        def forward(self, x):
            shapes.append(x.shape[0])
            return x

    before = torch.get_num_threads()
    factories = {"dense": partial(torch_runner, Shape()), "small": partial(torch_runner, Shape())}
    grid = latency_grid(factories, torch.zeros(2, 3), repeats=2, warmup=0)
    assert list(grid) == ["batch1_threads1", "batch16_threads1", "batch1_all", "batch16_all"]
    assert all(list(row) == ["dense", "small"] for row in grid.values())
    assert shapes == ([1] * 4 + [16] * 4) * 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match="repeats >= 1"):
        latency({"a": list}, **options)
    with pytest.raises(ValueError, match="at least one candidate"):
        latency({})
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        torch_runner(nn.Identity(), torch.zeros(1, 1), 0)


def test_missing_onnxruntime_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"lightning-compress\[onnx\]"):
        onnx_runner("m.onnx", torch.zeros(1, 1))
