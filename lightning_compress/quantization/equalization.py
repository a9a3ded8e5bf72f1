"""Cross-layer equalization: factors move between two layers, the function stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.quantization.dataflow import Dataflow
from lightning_compress.quantization.quantizers import channel_axis
from lightning_compress.targets import Coverage

__all__ = ["equalize_layers"]

_ROUNDS = 20  # over a chain of layers; two layers alone need one


@torch.no_grad()
def equalize_layers(module: nn.Module, paths: Collection[str] | None = None) -> list[Coverage]:
    """Give each channel between two layers the same range on either side, in place.

    Channel i of the first is divided by `s_i = sqrt(r1_i / r2_i)`, with ranges r of its weights in
    the two layers, and the second takes the factor: a ReLU between lets it pass. Nagel et al. 2019,
    arXiv:1906.04721, equation 11. Zeros stay zero.

    Args:
        module: the trained model; its forward must be traceable by `torch.fx`.
        paths: of layers that may change; None: all.

    Returns:
        A row a layer: whether a factor left it, and to where, or why none could.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [(row.path, row.selected, row.reason) for row in equalize_layers(net)]
    [('0', True, 'into 2'), ('2', False, 'the output lets no factor pass')]
    """
    flow, modules = Dataflow.of(module), dict(module.named_modules())
    holders = Counter(one for layer in modules.values() for one in layer.parameters(recurse=False))
    rows = [Coverage(path, (), False, reason) for path, reason in flow.stopped.items()]
    pairs = []
    for path, after in flow.next_layer.items():
        reason = _why_not(modules[path], modules[after])
        changed = [*modules[path].parameters(recurse=False), modules[after].weight]
        if any(holders[one] > 1 for one in changed):
            reason = f"it or {after} shares its weight with another layer"
        if paths is not None and not {path, after} <= set(paths):
            reason = f"it or {after} is no target"
        if not reason:
            pairs.append((modules[path], modules[after]))
        rows.append(Coverage(path, (), not reason, reason or f"into {after}"))
    for _ in range(_ROUNDS if len(pairs) > 1 else 1):
        for first, second in pairs:
            _equalize(first, second)
    return sorted(rows, key=lambda row: list(modules).index(row.path))


def _why_not(first: nn.Module, second: nn.Module) -> str:
    for layer in (first, second):
        if parametrize.is_parametrized(layer):
            return "a parametrization makes the weight"
        if getattr(layer, "groups", 1) != 1:
            return "grouped convolution"
    convolutions = [isinstance(one, nn.modules.conv._ConvNd) for one in (first, second)]
    if convolutions[0] != convolutions[1]:
        return "a convolution beside a linear layer: their channels lie on other axes"
    return ""


def _equalize(first: nn.Module, second: nn.Module) -> None:
    one, other = _weight(first), _weight(second)
    leaving, entering = channel_axis(first), 1 - channel_axis(second)
    before, after = _ranges(one, leaving), _ranges(other, entering)
    factor = (before / after).sqrt()
    sound = torch.isfinite(factor) & (factor > 0)
    factor = torch.where(sound, factor, torch.ones_like(factor)).to(one.dtype)
    one.div_(_along(factor, one, leaving))
    other.mul_(_along(factor, other, entering))
    if isinstance(first.bias, Tensor):
        first.bias.div_(factor)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _ranges(weight: Tensor, axis: int) -> Tensor:
    return weight.float().abs().transpose(0, axis).flatten(1).amax(1)


def _along(factor: Tensor, weight: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return factor.reshape(shape)
