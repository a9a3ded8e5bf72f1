"""Cross-layer equalization: moves scale factors between two layers, keeps the function."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lightning_compress.grids import channel_axis
from lightning_compress.hooks import hook_output
from lightning_compress.sample_inputs import run_batch
from lightning_compress.targets import Coverage

__all__ = [
    "Dataflow",
    "channel_means",
    "correct_biases",
    "equalize_layers",
]

# A positive factor of a channel goes through these, in eval mode, as if they were not there.
_HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
)
_FUNCTIONS = (torch.relu, nn.functional.relu, nn.functional.leaky_relu)
_ROUNDS = 20  # over a chain of layers; two layers alone need one


@dataclass(frozen=True)
class Dataflow:
    """The layer behind each layer, where it is the only one.

    Args:
        next_layer: path of a layer -> path of the only layer that reads its output, through
            operations that let positive factors pass.
        stopped: path of a layer -> why there is none.
        norms: path of a layer -> path of the BatchNorm that alone reads its output.
        shared_norms: path of a linear layer -> path of the BatchNorm that alone reads its output,
            each channel a block of outputs, behind a reshape.

    >>> flow = Dataflow.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Tanh()))
    >>> flow.next_layer, flow.stopped
    ({'0': '2'}, {'2': 'Tanh lets no factor pass'})
    """

    next_layer: dict[str, str]
    stopped: dict[str, str]
    norms: dict[str, str]
    shared_norms: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> Dataflow:
        """Trace a module; one that cannot be traced has an empty flow with the reason under ''."""
        try:
            graph = fx.Tracer().trace(module)
        except Exception as error:  # forward may do, and raise, anything
            first = str(error).strip().split("\n")[0]
            return cls({}, {"": f"the module cannot be traced: {first}"}, {}, {})
        flow, modules = cls({}, {}, {}, {}), dict(module.named_modules())
        calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        for node in graph.nodes:
            path = str(node.target)
            if node.op != "call_module" or not _has_weight(modules[path]):
                continue
            if calls.count(path) > 1:
                flow.stopped[path] = "it is called more than once"
                continue
            flow._follow(node, path, modules, calls)
            flow._follow_reshape(node, path, modules)
        return flow

    def _follow(
        self, node: fx.Node, path: str, modules: dict[str, nn.Module], calls: list[str]
    ) -> None:
        direct = True
        while True:
            if len(node.users) != 1:
                self.stopped[path] = f"{len(node.users)} operations read its output"
                return
            node = next(iter(node.users))
            target = str(node.target)
            layer = modules[target] if node.op == "call_module" else None
            if direct and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                self.norms[path] = target
            direct = False
            if layer is not None and _has_weight(layer) and calls.count(target) == 1:
                self.next_layer[path] = target
                return
            if not isinstance(layer, _HOMOGENEOUS) and node.target not in _FUNCTIONS:
                name = type(layer).__name__ if layer is not None else _name(node)
                self.stopped[path] = f"{name} lets no factor pass"
                return

    def _follow_reshape(self, node: fx.Node, path: str, modules: dict[str, nn.Module]) -> None:
        layer, reshapes = modules[path], next(iter(node.users), None)
        if not isinstance(layer, nn.Linear) or len(node.users) != 1 or reshapes is None:
            return
        norm = next(iter(reshapes.users), None)
        if not _splits(layer, reshapes, modules) or len(reshapes.users) != 1 or norm is None:
            return
        behind = modules[str(norm.target)] if norm.op == "call_module" else None
        if isinstance(behind, nn.modules.batchnorm._BatchNorm):
            self.shared_norms[path] = str(norm.target)


def _splits(layer: nn.Linear, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node gives the outputs of each row several axes, in their order."""
    reshape = modules[str(node.target)] if node.op == "call_module" else None
    sizes: tuple[Any, ...] = ()
    if isinstance(reshape, nn.Unflatten) and reshape.dim == 1:
        sizes = tuple(reshape.unflattened_size)
    elif node.op == "call_method" and node.target in ("view", "reshape"):
        first = node.args[1]
        sizes = tuple(first if isinstance(first, (tuple, list)) else node.args[1:])[1:]
    elif node.op == "call_method" and node.target == "unflatten" and node.args[1] == 1:
        sizes = tuple(node.args[2])  # type: ignore[arg-type]
    if len(sizes) < 2 or not all(isinstance(one, int) for one in sizes):
        return False
    known = math.prod(one for one in sizes if one != -1)
    return known == layer.out_features or (-1 in sizes and layer.out_features % known == 0)


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    return str(getattr(node.target, "__name__", node.target))


class _Mean:
    """Mean output of a layer, for each output channel."""

    def __init__(self, layer: nn.Module) -> None:
        self.axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        self.total: Tensor | float = 0.0
        self.count = 0

    def see(self, output: Tensor) -> Tensor:
        rows = output.detach().double().transpose(0, self.axis).flatten(1)
        self.total, self.count = self.total + rows.sum(1), self.count + rows.shape[1]
        return output


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Mean]]:
    means = {path: _Mean(layer) for path, layer in layers.items()}
    handles = [hook_output(layer, means[path].see) for path, layer in layers.items()]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def channel_means(
    module: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[object]
) -> dict[str, Tensor]:
    """Mean output over all batches of each layer, (channels,), in the order of their calls."""
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, path=path: order.setdefault(path))
        for path, layer in layers.items()
    ]
    with _watched(layers) as means:
        for batch in batches:
            run_batch(module, batch)
    for handle in handles:
        handle.remove()
    return {path: torch.as_tensor(means[path].total) / means[path].count for path in order}


@torch.no_grad()
def correct_biases(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[object],
    means: Mapping[str, Tensor],
) -> list[Coverage]:
    """Shift biases until each layer has the mean outputs that it had before, in place.

    Layer after layer, so that each sees the corrected ones before it; a layer without a bias is
    corrected in the running mean of the BatchNorm that alone reads it. Nagel et al. 2019,
    arXiv:1906.04721, section 4.2.

    Args:
        module: with quantized weights, in eval mode.
        layers: by path.
        batches: the calibration data.
        means: what `channel_means` gave before the weights were quantized.

    Returns:
        A row a layer: where it was corrected, or why it could not be.
    """
    flow, rows = Dataflow.of(module), []
    for path, before in means.items():
        layer, norm = layers[path], flow.norms.get(path)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        running = None if norm is None else module.get_submodule(norm).running_mean
        if bias is None and not isinstance(running, Tensor):
            why = flow.stopped.get("", "it has no bias, and no BatchNorm alone reads its output")
            rows.append(Coverage(path, (), False, why))
            continue
        shift = channel_means(module, {path: layer}, batches)[path] - before
        if bias is not None:
            bias.sub_(shift.to(bias))
        else:
            assert isinstance(running, Tensor)
            running.add_(shift.to(running))
        where = "in its bias" if bias is not None else f"in the running mean of {norm}"
        rows.append(Coverage(path, (), True, where))
    return rows


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
