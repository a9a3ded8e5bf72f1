"""Sizes of neighbouring layers that must agree, checked without sample inputs.

`torch.fx` records which layer reads what another one makes. Where the two sizes agreed before
layers were resized, they must agree afterwards. What cannot be traced, or lies behind an operation
whose effect on channels is not known, is not judged: a finding is certain.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_compress.errors import TargetError

__all__ = ["joint_faults", "norms_without_tensors"]

_CONVS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
_SIZES = {
    nn.Linear: ("in_features", "out_features"),
    _CONVS: ("in_channels", "out_channels"),
    nn.Embedding: ("", "embedding_dim"),
}
_THROUGH = {  # the number of channels stays, whatever axis they lie along
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "selu", "celu", "gelu", "silu",
    "mish", "softplus", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "sigmoid",
    "sigmoid_", "tanh", "tanh_", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_alpha_dropout", "clamp", "abs", "exp", "neg", "sqrt", "square",
    "contiguous", "clone", "detach", "float", "half", "bfloat16", "double", "to", "type_as",
}  # fmt: skip
_SPATIAL = {  # the axes behind the channels change
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate", "upsample",
}  # fmt: skip
_SUMS = {"add", "iadd", "sub", "isub", "mul", "imul", "add_", "mul_", "truediv", "div"}
_THROUGH_KINDS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Sigmoid,
    nn.Tanh, nn.Softmax, nn.Softmax2d, nn.modules.dropout._DropoutNd,
)  # fmt: skip
_SPATIAL_KINDS = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)  # fmt: skip
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # without a forward pass of their own
Sizes = Mapping[int, Mapping[str, int]]


@dataclass(frozen=True)
class _Channels:
    """Channels of a value between layers.

    Args:
        before: their number before layers were resized.
        now: their number since.
        made: the layer that makes them, for messages.
        last: whether they lie along the last axis, as those of a Linear; else along axis 1.
        folded: whether further axes were joined with theirs, channels first.
    """

    before: int
    now: int
    made: str
    last: bool
    folded: bool = False


def joint_faults(module: nn.Module, before: Sizes, now: Sizes) -> list[str]:
    """Layers that fitted each other before they were resized, and do not any more, in words.

    Args:
        module: the whole; its own forward pass is traced, or those of its parts.
        before: size attributes of the layers then, by `id`.
        now: size attributes of the layers, by `id`.

    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    >>> before = {id(net[0]): {"in_channels": 1, "out_channels": 8},
    ...           id(net[2]): {"in_channels": 8, "out_channels": 2}}
    >>> joint_faults(net, before, before | {id(net[0]): {"in_channels": 1, "out_channels": 3}})
    ['2 takes 8 channels, 0 makes 3']
    """
    names: dict[int, str] = {id(layer): path for path, layer in module.named_modules()}
    faults: list[str] = []
    for root, graph in _graphs(module):
        faults += _Reader(root, names, before, now).faults(graph)
    return list(dict.fromkeys(faults))


def norms_without_tensors(module: nn.Module, sized: Mapping[str, int]) -> dict[str, Any]:
    """Norms that know a size and hold no tensors, by path.

    Args:
        module: the whole.
        sized: new sizes of some of them, checked here.

    Raises:
        TargetError: naming a layer that is not there or is no such norm, or a size below 1.

    >>> list(norms_without_tensors(nn.Sequential(nn.InstanceNorm2d(4)), {"0": 2}))
    ['0']
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    found = {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and not layer.state_dict()
    }
    for path, size in sized.items():
        if path not in layers:
            raise TargetError(f"no layer {path!r}, of which a size of {size!r} is recorded")
        kind = type(layers[path]).__name__
        if path not in found:
            raise TargetError(f"{path!r}, a {kind}, has the size of its tensors, not {size!r}")
        if type(size) is not int or size < 1:
            raise TargetError(f"{path!r}, a {kind}, of {size!r} channels")
    return found


def _graphs(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Graphs that together show as many layers as can be traced."""
    shown: set[int] = set()

    def visit(part: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
        if _is_leaf(part) or all(id(one) in shown for one in part.modules() if _is_leaf(one)):
            return
        if not isinstance(part, _CONTAINERS):
            root = _skeleton(part, {})
            graph = _trace(root)
            if graph is not None:
                calls = (str(one.target) for one in graph.nodes if one.op == "call_module")
                shown.update(id(root.get_submodule(path)) for path in calls)
                yield root, graph
        for child in part.children():
            yield from visit(child)

    yield from visit(module)


def _is_leaf(part: nn.Module) -> bool:
    return fx.Tracer().is_leaf_module(part, "") and not isinstance(part, _CONTAINERS)


def _skeleton(part: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """Copy of a module that shares its layers: what its forward pass sets stays with the copy."""
    part = getattr(part, "_orig_mod", part)  # as torch.compile wraps it
    if _is_leaf(part):
        return part
    if id(part) not in known:
        copy = known[id(part)] = object.__new__(type(part))
        copy.__dict__.update(part.__dict__)
        copy.__dict__["_modules"] = {
            name: None if one is None else _skeleton(one, known)
            for name, one in part._modules.items()
        }
    return known[id(part)]


def _trace(root: nn.Module) -> fx.Graph | None:
    """The graph of a forward pass; None where it cannot be traced."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return fx.Tracer().trace(root)
    except Exception:  # torch.fx raises whatever the forward pass raises on its stand-ins
        return None


class _Reader:
    """Follow channels through one graph."""

    def __init__(
        self, root: nn.Module, names: Mapping[int, str], before: Sizes, now: Sizes
    ) -> None:
        self.root, self.names, self.sizes = root, names, (before, now)
        self.found: list[str] = []
        self.values: dict[fx.Node, _Channels | None] = {}

    def faults(self, graph: fx.Graph) -> list[str]:
        for node in graph.nodes:
            self.values[node] = self._value(node)
        return self.found

    def _value(self, node: fx.Node) -> _Channels | None:
        if node.op == "call_module" and len(node.args) > 0:
            return self._layer(self.root.get_submodule(str(node.target)), self._of(node.args[0]))
        if node.op not in ("call_function", "call_method"):
            return None
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if node.target in (torch.cat, torch.concat):
            return self._joined(node)
        if name in _SUMS and node.target is not torch.div and len(node.args) == 2:
            return self._sum(self._of(node.args[0]), self._of(node.args[1]), node)
        given = node.args[0] if node.args else None
        value = self._of(given)
        if value is None or name in _THROUGH:
            return value
        if name in _SPATIAL and not value.last and not value.folded:
            return value
        if name == "flatten" and _arguments(node, "start_dim", "end_dim", default=(0, -1)) == (
            1,
            -1,
        ):
            return _folded(value)
        if name in ("view", "reshape"):
            return self._reshaped(value, node)
        if node.target is operator.getitem and isinstance(given, fx.Node):
            made = given.op == "call_module" and self.root.get_submodule(str(given.target))
            return value if isinstance(made, nn.RNNBase) and node.args[1:] == (0,) else None
        return None

    def _of(self, argument: Any) -> _Channels | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def _layer(self, layer: Any, value: _Channels | None) -> _Channels | None:
        if isinstance(layer, _THROUGH_KINDS):
            return value
        if isinstance(layer, _NORMS):
            self._check(layer, value, next(iter(self._pairs(layer, *_NORM_SIZES)), None))
            return value
        if isinstance(layer, nn.LayerNorm):
            size = layer.normalized_shape[-1]
            self._check(layer, value if value and value.last else None, (size, size))
            return value
        if isinstance(layer, nn.RNNBase):
            self._check(layer, value, self._pair(layer, "input_size"))
            shown = self._pair(layer, "proj_size" if layer.proj_size else "hidden_size")
            sides = 2 if layer.bidirectional else 1
            return None if shown is None else self._made(layer, shown, sides, last=True)
        for kind, (reads, makes) in _SIZES.items():
            if isinstance(layer, kind):
                self._check(layer, value, self._pair(layer, reads))
                pair = self._pair(layer, makes)
                return None if pair is None else self._made(layer, pair, last=kind is not _CONVS)
        if value is None:
            return None
        if isinstance(layer, _SPATIAL_KINDS) and not value.last and not value.folded:
            return value
        return self._reshaped_by(layer, value)

    def _made(
        self, layer: nn.Module, pair: tuple[int, int], copies: int = 1, *, last: bool
    ) -> _Channels:
        return _Channels(pair[0] * copies, pair[1] * copies, self._name(layer), last)

    def _name(self, layer: nn.Module) -> str:
        return self.names.get(id(layer), "") or "(root)"

    def _pair(self, layer: nn.Module, name: str) -> tuple[int, int] | None:
        """A size of a layer, before and now."""
        before, now = (sizes.get(id(layer), {}).get(name) for sizes in self.sizes)
        return None if before is None or now is None else (before, now)

    def _pairs(self, layer: nn.Module, *names: str) -> Iterator[tuple[int, int]]:
        for name in names:
            if (pair := self._pair(layer, name)) is not None:
                yield pair

    def _check(
        self, layer: nn.Module, value: _Channels | None, reads: tuple[int, int] | None
    ) -> None:
        """Compare what a layer reads with what it is given, where the two belong together."""
        if value is None or reads is None or (isinstance(layer, nn.PReLU) and reads[0] == 1):
            return
        if value.folded and isinstance(layer, nn.Linear):
            copies, rest = divmod(reads[0], value.before)
            fits = reads[1] == copies * value.now
        else:
            if isinstance(layer, (nn.Linear, nn.RNNBase)) and not value.last:
                return  # it reads the last axis of a feature map, not its channels
            copies, rest, fits = 1, reads[0] - value.before, reads[1] == value.now
        if rest or fits:
            return
        times = f" of {copies} values" if copies > 1 else ""
        self.found.append(
            f"{self._name(layer)} takes {reads[1]} channels, {value.made} makes {value.now}{times}"
        )

    def _sum(
        self, one: _Channels | None, other: _Channels | None, node: fx.Node
    ) -> _Channels | None:
        if one is None or other is None:
            known = one or other
            alone = not all(isinstance(argument, fx.Node) for argument in node.args)
            if known is None or alone or (known.before > 1 and not known.last):
                return known
            return None
        if (one.last, one.folded) != (other.last, other.folded) or one.before != other.before:
            return None  # one of them is broadcast
        if one.now != other.now:
            self.found.append(
                f"{one.made} makes {one.now} channels, {other.made} {other.now}: they are added"
            )
        return one

    def _joined(self, node: fx.Node) -> _Channels | None:
        parts = node.args[0] if node.args else None
        values = [self._of(one) for one in parts] if isinstance(parts, (tuple, list)) else []
        known = [one for one in values if one is not None]
        (axis,) = _arguments(node, "dim", default=(0,))
        alike = len({(one.last, one.folded) for one in known}) == 1
        if not known or len(known) < len(values) or not alike:
            return None
        if axis != 1 and not (axis == -1 and known[0].last):
            return None
        made = " and ".join(dict.fromkeys(one.made for one in known))
        sums = (sum(one.before for one in known), sum(one.now for one in known))
        return replace(known[0], before=sums[0], now=sums[1], made=made)

    def _reshaped(self, value: _Channels, node: fx.Node) -> _Channels | None:
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        if len(sizes) == 2 and sizes[1] == -1:
            return _folded(value)
        whole = [one for one in sizes[2:] if isinstance(one, int) and one > 0]
        if len(sizes) > 2 and len(whole) == len(sizes) - 2 and value.last:
            return self._unfolded(value, math.prod(whole))
        return None

    def _reshaped_by(self, layer: Any, value: _Channels) -> _Channels | None:
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            return _folded(value)
        if isinstance(layer, nn.Unflatten) and value.last and layer.dim in (1, -1):
            sizes = layer.unflattened_size
            known = isinstance(sizes, (tuple, list)) and all(type(one) is int for one in sizes)
            if known and min(sizes[1:], default=1) > 0:
                return self._unfolded(value, math.prod(sizes[1:]))
        if isinstance(layer, nn.PixelShuffle) and not value.last and not value.folded:
            return self._unfolded(value, layer.upscale_factor**2)
        return None

    def _unfolded(self, value: _Channels, block: int) -> _Channels | None:
        """A value of channels that take `block` places each, on axis 1 from here on."""
        if value.before % block:
            return None
        if value.now % block:
            self.found.append(f"{value.made} makes {value.now} channels, read in blocks of {block}")
            return None
        return replace(value, before=value.before // block, now=value.now // block, last=False)


_NORM_SIZES = ("num_features", "num_channels", "num_parameters")


def _arguments(node: fx.Node, *names: str, default: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Arguments behind the first one, given by place or by name."""
    given = (*node.args[1:], *default[len(node.args) - 1 :])
    return tuple(node.kwargs.get(name, one) for name, one in zip(names, given, strict=False))


def _folded(value: _Channels) -> _Channels:
    return value if value.last else replace(value, folded=True)
