"""Size attributes of modules that are not torch's own: `channels`, `num_heads`, `eps` of a norm.

A forward pass that reads `self.channels` or `self.num_heads` needs the new number once channels are
gone. Which number an attribute stands for is read from the structure alone, so that a checkpoint
that is loaded into a fresh model gives the same values as the removal did; whether it was read
right is seen when the smaller module is compared with the masked one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = [
    "EPSILONS",
    "OwnSize",
    "heads_of",
    "known_sizes",
    "own_sizes",
    "set_lengths",
    "set_own_sizes",
]

_PER_HEAD = re.compile(r"head_?(dim|size|channels|ch|width)$|^(dim|channels|d)_?(per_)?head$")
_HEADS = re.compile(r"(^|_)n?_?heads?$|^n_?heads?$|num_?heads?$")
_OUTPUT = re.compile(r"(^|_)out(put)?(_|$)|^c_?out$")
_INNER = re.compile(r"(^|_)(inner|mid|hidden|intermediate|ff|mlp|all_head)(_|$)")
_SIZE = re.compile(
    r"(^|_)(n?_?channels?|features?|dims?|filters?|width|ch|planes|embd|d_model|nf|ngf|nc)$"
    r"|(^|_)(hidden|embed|model|feature|intermediate)_size$"
    r"|^(c|c_in|c_out|inner_kv_dim|all_head_size|normalized_shape)$"
)
# Sizes that inputs and outputs of a network have: no channel of theirs goes.
_OUTSIDE = re.compile(
    r"latent|noise|image|img|spatial|cond|class|context|(^|_)z(_|$)|(^|_)n_?dims?$"
)
_READS_HEADS = re.compile(
    r"(^|_)(w?q|qs|query|queries|to_q|q_proj|qkv|to_qkv|wqkv|kv)(_|$)|qkv|query"
)
EPSILONS = ("eps", "epsilon", "variance_epsilon")
_LENGTHS = "_axes_lengths"  # of einops' layers: what they run with
_ENDS = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_features", "num_features"),
    ("num_channels", "num_channels"),
    ("input_size", "hidden_size"),
)


@dataclass(frozen=True)
class OwnSize:
    """An attribute of a module, and the size that it stands for.

    Args:
        path: of the module.
        name: of the attribute.
        value: that it has now.
        layer: path of the layer below, or of a parameter, whose size it follows.
        end: "in", "out" or "length" of a parameter.
        size: of that, now.
        kind: "size", "heads" or "eps".
    """

    path: str
    name: str
    value: Any
    layer: str
    end: str
    size: int
    kind: str


def heads_of(module: nn.Module) -> dict[str, int]:
    """Attributes of a module that say how many heads it has.

    >>> layer = nn.Module()
    >>> layer.num_heads, layer.head_dim = 4, 8
    >>> heads_of(layer)
    {'num_heads': 4}
    """
    return {
        name: value
        for name, value in vars(module).items()
        if _is_count(value) and _HEADS.search(name) and not _PER_HEAD.search(name)
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_own(layer: nn.Module) -> bool:
    kin = isinstance(layer, nn.MultiheadAttention)  # FewerHeads
    return not (type(layer).__module__.startswith("torch.nn") or kin)


def _ends(layer: Any) -> tuple[int, int] | None:
    """What a layer reads and makes, where it says so."""
    if _is_own(layer) and not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    for first, last in _ENDS:
        read, made = getattr(layer, first, None), getattr(layer, last, None)
        if isinstance(read, int) and isinstance(made, int):
            return read, made
    return None


def own_sizes(module: nn.Module) -> list[OwnSize]:
    """Size attributes of all modules that are not torch's own, with what they stand for.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.channels, self.conv = 8, nn.Conv2d(8, 4, 1)
    >>> [(one.name, one.layer, one.end) for one in own_sizes(Block())]
    [('channels', 'conv', 'in')]
    """
    found = []
    for path, layer in module.named_modules():
        if not _is_own(layer) or _ends(layer) is not None:
            continue
        named = [name for name, value in vars(layer).items() if _may_be_size(name, value)]
        if not named:
            continue
        below = [(name, _ends(one)) for name, one in layer.named_modules() if name]
        sized = [(name, ends) for name, ends in below if ends is not None]
        bound = (_bind(path, layer, name, sized) for name in named)
        found += [one for one in bound if one is not None]
    return found + _rearranged(module, found)


def _rearranged(module: nn.Module, sizes: list[OwnSize]) -> list[OwnSize]:
    """Heads that an einops layer holds as a length of its pattern, as the module around it does."""
    found = []
    for path, layer in module.named_modules():
        lengths = getattr(layer, "axes_lengths", None)
        if not isinstance(lengths, dict) or not hasattr(layer, _LENGTHS):
            continue
        around = [
            one for one in sizes
            if one.kind == "heads" and (not one.path or path.startswith(f"{one.path}."))
        ]  # fmt: skip
        for axis, value in lengths.items():
            same = [one for one in around if one.value == value]
            if same:
                nearest = max(same, key=lambda one: len(one.path))
                found.append(replace(nearest, path=path, name=f"{_LENGTHS}.{axis}"))
    return found


def _may_be_size(name: str, value: Any) -> bool:
    if name in EPSILONS:
        return isinstance(value, float)
    single = isinstance(value, (tuple, list)) and len(value) == 1 and _is_count(value[0])
    if not (_is_count(value) or single) or _PER_HEAD.search(name):
        return False
    return bool(_HEADS.search(name) or (_SIZE.search(name) and not _OUTSIDE.search(name)))


def _bind(
    path: str, layer: nn.Module, name: str, sized: list[tuple[str, tuple[int, int]]]
) -> OwnSize | None:
    value = getattr(layer, name)
    prefix = f"{path}." if path else ""
    own = {one: len(p) for one, p in layer.named_parameters(recurse=False) if p.dim() == 1}
    if name in EPSILONS:
        return next(
            (OwnSize(path, name, value, prefix + p, "length", n, "eps") for p, n in own.items()),
            None,
        )
    if _HEADS.search(name):
        return _bind_heads(path, prefix, name, value, sized)
    count = value if isinstance(value, int) else value[0]
    inward = [(where, "in", ends[0]) for where, ends in sized]
    outward = [(where, "out", ends[1]) for where, ends in sized]
    if _OUTPUT.search(name):
        order = [*reversed(outward), *reversed(inward)]
    elif _INNER.search(name):
        order = [*outward, *inward]
    else:
        order = [*((one, "length", size) for one, size in own.items()), *inward, *outward]
    for where, end, size in order:
        if size == count:
            return OwnSize(path, name, value, prefix + where, end, size, "size")
    return None


def _bind_heads(
    path: str, prefix: str, name: str, value: int, sized: list[tuple[str, tuple[int, int]]]
) -> OwnSize | None:
    """Heads are of one width: their number follows what the queries are made by."""
    named = [one for one in sized if _READS_HEADS.search(one[0].rpartition(".")[2])]
    for where, (_, made) in named:
        if made % value == 0:
            return OwnSize(path, name, value, prefix + where, "out", made, "heads")
    for where, (read, _) in reversed(sized):
        if read % value == 0:
            return OwnSize(path, name, value, prefix + where, "in", read, "heads")
    return None


def set_own_sizes(module: nn.Module, sizes: list[OwnSize]) -> None:
    """Let attributes follow what they stand for, after layers were resized."""
    parameters = dict(module.named_parameters())
    for one in sizes:
        if one.end == "length":
            now = len(parameters[one.layer])
        else:
            ends = _ends(module.get_submodule(one.layer))
            assert ends is not None
            now = ends[one.end == "out"]
        if now != one.size:
            layer, (name, _, axis) = module.get_submodule(one.path), one.name.partition(".")
            if not axis:
                setattr(layer, name, _after(one, now))
                continue
            lengths = {**layer.axes_lengths, axis: _after(one, now)}  # type: ignore[dict-item]
            set_lengths(layer, lengths)


def set_lengths(layer: nn.Module, lengths: Mapping[str, int]) -> None:
    """Set the lengths of the axes of an einops layer."""
    layer.axes_lengths = dict(lengths)  # type: ignore[assignment]
    setattr(layer, _LENGTHS, tuple(lengths.items()))


def _after(one: OwnSize, now: int) -> Any:
    if one.kind == "size":
        return now if isinstance(one.value, int) else type(one.value)([now])
    if (
        one.kind == "eps"
    ):  # a mean of squares over fewer channels is larger, and so is what is added
        return one.value * one.size / now
    heads = one.value * now / one.size
    return int(heads) if heads.is_integer() else one.value


def known_sizes(layer: nn.Module) -> dict[str, Any]:
    """Size attributes of a module that is not torch's own, as they are."""
    if not _is_own(layer):
        return {}
    if hasattr(layer, _LENGTHS):
        return {name: getattr(layer, name) for name in ("axes_lengths", _LENGTHS)}
    return {name: value for name, value in vars(layer).items() if _may_be_size(name, value)}
