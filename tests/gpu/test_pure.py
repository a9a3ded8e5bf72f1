"""Pure functions and the projection on tensors that say `cuda:0`: as on the CPU, nothing mixed.

And under FakeTensorMode, which knows CUDA's rules for shapes and devices without values.
"""

import pretend
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_compress.channels.resize import match_channels, shrink, sizes_of_layers
from lightning_compress.errors import TargetError
from lightning_compress.grids import CodebookGrid
from lightning_compress.projection import Projector
from lightning_compress.pruning import criteria, masks
from lightning_compress.pruning.regrowth import exchange
from lightning_compress.quantization import learned_step, ranges
from lightning_compress.quantization.codebook import CodebookGrids, centre_gradient
from lightning_compress.quantization.entropy import EntropyGrids, rate_slopes
from lightning_compress.quantization.fake_quantize import clipped_fake_quantize, fake_quantize
from lightning_compress.quantization.learned_step import LearnedPositive
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.targets import Target


def weight():
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    return values.masked_fill(values.abs() < 0.3, 0.0)


def grid_of(values, **more):
    return affine_grid(values, bits=4, **more)


def rate_of(values):
    grid = EntropyGrids(bits=8, relative_step=0.3).grid(values)
    return rate_slopes(grid.count(values)) / grid.scale


def codebook(values):
    grid = CodebookGrid(values.new_tensor([-1.0, -0.25, 0.0, 0.5, 1.5]))
    symbols = grid.quantize(values)
    return symbols, grid.dequantize(symbols), centre_gradient(values, symbols, grid)


def codebook_steps(values):
    maker = CodebookGrids(bits=3, lr=0.5)
    maker.start(values)
    maker.freeze(values)
    for _ in range(3):
        gradient = values * 2
        maker.gradient(gradient, values)
        values = maker.step(values, event=False)
    maker.gradient(values * float("nan"), values)
    return maker.step(values, event=False), maker.centres


def entropy(values):
    maker = EntropyGrids(bits=6, relative_step=0.2, dead_zone=0.6, rate=0.1)
    gradient = torch.ones_like(values)
    maker.gradient(gradient, values)
    grid = maker.grid(values)
    shown = grid.project(values)
    maker.freeze(values)
    return shown, gradient, grid.scale, maker.grid(values * 0.9).project(values * 0.9)


def learned(values):
    maker = learned_step.LearnedStepGrids(bits=4, axis=0, lr=0.01)
    maker.start(values)
    for scale in (1.0, float("nan"), 2.0):
        maker.gradient(values.clone(), values * scale)
        maker.step(values, event=False)
    return maker.grid(values).scale, maker.grid(values).project(values)


def positive(values):
    number = LearnedPositive(values.new_tensor([2.0]), lr=0.1)
    for gradient in (1.0, float("inf"), -3.0):
        number.step(values.new_tensor([gradient]))
    return number.value


def activation(values):
    x = values.clone().requires_grad_()
    y = fake_quantize(x, grid_of(values / 2, symmetric=False))
    y.sum().backward()
    return y.detach(), x.grad


def clipped(values):
    clip = torch.tensor([1.5], device=values.device).requires_grad_()
    x = values.abs().requires_grad_()
    y = clipped_fake_quantize(x, clip, 4)
    y.sum().backward()
    return y.detach(), x.grad if x.is_leaf else torch.zeros(()), clip.grad


def observed(kind):
    def run(values):
        one = ranges.RangeObserver(kind)
        for factor in (1.0, 0.5, 2.0):
            one.observe(values * factor)
            one.observe(values - factor)
            ranges.merge_ranges([one])
        return one.bounds

    return run


def projected(values):
    layer = nn.Linear(10, 6, bias=False)
    if isinstance(values, pretend.Away):
        layer = pretend.away(layer)
    with torch.no_grad():
        layer.weight.copy_(values)
    projector = Projector.of(layer)
    projected = projector.add(Target("weight", layer, "weight", layer.weight))
    projected.set_mask(values.abs() > 0.5)
    projected.set_quantizer(lambda one: grid_of(one, axis=0))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, foreach=False)
    projector.attach([optimizer])
    projector.project()
    for _ in range(3):
        layer.weight.grad = None
        (layer.weight * values).sum().backward()
        optimizer.step()
    projector.detach()
    return layer.weight.detach(), projected.latent


FUNCTIONS = {
    "magnitude": criteria.magnitude,
    "global masks": lambda one: masks.global_masks([one.abs(), one.square()], 0.5),
    "packed mask": lambda one: masks.unpack_mask(masks.pack_mask(one != 0), one.shape),
    "exchange": lambda one: exchange(one != 0, one.abs(), one.square(), 0.3),
    "min/max": lambda one: ranges.minmax_range(one, 1),
    "percentile": lambda one: ranges.percentile_range(one, 0, percentile=0.9),
    "mse": lambda one: ranges.mse_range(one, 0, bits=3),
    "grid": lambda one: grid_of(one, axis=0).project(one),
    "affine grid": lambda one: grid_of(one, symmetric=False).quantize(one),
    "rate": rate_of,
    "codebook": codebook,
    "codebook steps": codebook_steps,
    "entropy": entropy,
    "learned step": learned,
    "positive": positive,
    "activation": activation,
    "clipped": clipped,
    "observed min/max": observed("minmax"),
    "observed average": observed("moving_average"),
    "observed percentile": observed("percentile"),
    "observed mse": observed("mse"),
    "projected": projected,
}


def tensors(found):
    return [one for one in tree_flatten(found)[0] if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_results_are_those_of_the_cpu(name):
    want = FUNCTIONS[name](weight())
    with pretend.pretended():
        got = FUNCTIONS[name](pretend.Away(weight()))
        got = tree_map(lambda one: one.here if isinstance(one, pretend.Away) else one, got)
    assert len(tensors(want)) == len(tensors(got)) > 0
    for one, other in zip(tensors(want), tensors(got), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


SHAPES_ONLY = ["magnitude", "rate", "codebook"]


@pytest.mark.parametrize("name", SHAPES_ONLY)
def test_fake_tensors_of_cuda_stay_there(name):
    with FakeTensorMode(), pretend.mock.patch.object(torch.cuda, "_lazy_init", lambda *_: None):
        found = FUNCTIONS[name](torch.empty(6, 10, device="cuda"))
        assert all(one.device.type == "cuda" for one in tensors(found))


def test_what_cuda_refuses_is_refused_here():
    with pretend.pretended():
        away = pretend.Away(torch.ones(3))
        with pytest.raises(pretend.MixedDeviceError):
            away + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            away.numpy()
        with pytest.raises(pretend.MixedDeviceError):
            torch.rand_like(away, generator=torch.Generator())
        pretend.WAITS.clear()
        assert bool((away > 0).all())
        _ = away[away > 0], away.cpu(), away.tolist()
    assert sum(pretend.WAITS.values()) == 4


def test_channels_are_removed_on_the_device_of_the_layers():
    """Cut, matched and undone under FakeTensorMode, which refuses mixed devices."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        build = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(3, 8, device="cuda"), nn.ReLU(), nn.Linear(8, 2, device="cuda")
        )
        net, stay = build(), torch.arange(0, 8, 2)
        shrink(net, {"0.weight": {0: stay}, "0.bias": {0: stay}, "2.weight": {1: stay}})
        full = match_channels(build(), {name: one.shape for name, one in net.state_dict().items()})
        with pytest.raises(TargetError, match="2 takes 4 channels, 0 makes 8"):
            match_channels(build(), {"2.weight": (2, 4)})
        for module in (net, full):
            known = sizes_of_layers(module)
            assert (known["0"]["out_features"], known["2"]["in_features"]) == (4, 4)
            assert module(torch.zeros(5, 3, device="cuda")).shape == (5, 2)
            assert {one.device.type for one in module.parameters()} == {"cuda"}
