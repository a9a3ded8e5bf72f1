"""What of a module goes into a file: its tensors by name, their grids, and who shares memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_compress.channels.resize import match_channels
from lightning_compress.errors import CorruptArtifactError, TargetError
from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.lcz.header import TensorRecord
from lightning_compress.lcz.raw_bits import DTYPES, dtype_name
from lightning_compress.lcz.tensors import grid_fault
from lightning_compress.sharding import local_part
from lightning_compress.state import (
    ActivationGrids,
    Grid,
    RemovedChannels,
    compression_state,
    note_removed,
)

__all__ = [
    "KEY",
    "Contents",
    "batchnorm_folded",
    "check_tensor",
    "fit_channels",
    "module_contents",
    "module_tensors",
    "norms_behind",
    "read_activations",
    "read_channels",
    "runs",
    "shared_memory",
    "sizes_in",
    "unruns",
    "write_activations",
    "write_channels",
]
_SIDES = {"i": "input", "o": "output"}


def write_activations(grids: Mapping[str, ActivationGrids]) -> dict[str, Any]:
    """The header's entry.

    Raises:
        ValueError: naming the layer, for a grid that is not one finite scale a tensor.
    """
    return {
        path: {
            key: _row(path, grid)
            for key, side in _SIDES.items()
            if (grid := getattr(pair, side)) is not None
        }
        for path, pair in grids.items()
    }


def _row(path: str, grid: AffineGrid) -> list[int]:
    why = "an axis" if grid.axis is not None else grid_fault(grid, ())
    if why is not None:
        raise ValueError(f"the activation grid of {path!r} has {why}: the format holds one scale")
    scale = grid.scale.detach().cpu().numpy().astype("<f4").view("<u4")
    return [grid.bits, int(grid.symmetric), int(grid.zero_point), int(scale[0])]


def read_activations(entry: object) -> dict[str, ActivationGrids]:
    """What `write_activations` wrote.

    Raises:
        CorruptArtifactError: naming the layer, when it is anything else.
    """
    if not isinstance(entry, dict):
        raise CorruptArtifactError("the header's activations are no object")
    return {path: _pair(path, row) for path, row in entry.items()}


def _pair(path: str, row: object) -> ActivationGrids:
    if not isinstance(row, dict) or not set(row) <= set(_SIDES):
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r}")
    return ActivationGrids(**{_SIDES[key]: _grid(path, value) for key, value in row.items()})


def _grid(path: str, row: object) -> AffineGrid:
    whole = isinstance(row, list) and len(row) == 4 and all(type(item) is int for item in row)
    if not isinstance(row, list) or not whole or not (0 <= row[2] < 256 and 0 <= row[3] < 1 << 32):
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r} is no grid")
    bits, symmetric, zero, scale = row
    if symmetric not in (0, 1):
        raise CorruptArtifactError(f"activations of {path!r}: symmetric is {symmetric}")
    step = torch.from_numpy(np.array([scale], "<u4").view("<f4").astype(np.float32))
    grid = AffineGrid(step, torch.tensor([zero], dtype=torch.int32), bits, bool(symmetric), None)
    if (fault := grid_fault(grid, ())) is not None:
        raise CorruptArtifactError(f"activations of {path!r}: {fault}")
    return grid


CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms_behind(module: nn.Module) -> dict[str, str]:
    """The layer right before each BatchNorm in a plain `nn.Sequential`, both by path.

    Only where both run once, without hooks.

    >>> norms_behind(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()))
    {'1': '0'}
    """
    found = {}
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for prefix, part in module.named_modules():
        if not isinstance(part, nn.Sequential) or type(part).forward is not nn.Sequential.forward:
            continue
        path = f"{prefix}." if prefix else ""
        layers = [(path + name, layer) for name, layer in part.named_children()]
        if len(layers) != len(part) or uses[id(part)] != 1:
            continue
        for (first, layer), (second, norm) in pairwise(layers):
            alone = _alone(layer, uses) and _alone(norm, uses)
            if alone and _is_layer(layer) and isinstance(norm, NORMS):
                found[second] = first
    return found


def _is_layer(layer: nn.Module) -> bool:
    if type(layer) in CONVOLUTIONS:
        return vars(layer)["groups"] == 1
    return type(layer) is nn.Linear


def _alone(layer: nn.Module, uses: Counter[int]) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return uses[id(layer)] == 1 and not any(hooks) and not layer._backward_hooks


KEY = "x-channels"  # a reader that does not know it passes it over
_MOST = 1 << 53


def write_channels(lost: RemovedChannels) -> dict[str, Any]:
    """The header's entry."""
    return {
        "tensors": {path: list(shape) for path, shape in lost.shapes.items()},
        "layers": dict(lost.sizes),
        "kept": {path: runs(kept) for path, kept in lost.kept.items()},
    }


def runs(kept: Iterable[int]) -> list[int]:
    """Rising numbers as lengths: left out, kept, left out, kept and so on.

    >>> runs([0, 1, 4])
    [0, 2, 2, 1]
    """
    found: list[int] = []
    end = 0
    for one in kept:
        if not found or one > end:
            found += [one - end, 0]
        found[-1] += 1
        end = one + 1
    return found


def unruns(lengths: Iterable[int]) -> tuple[int, ...]:
    """The reverse of `runs`.

    >>> unruns([0, 2, 2, 1])
    (0, 1, 4)
    """
    found: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        if index % 2:
            found += range(position, position + length)
        position += length
    return tuple(found)


def read_channels(entry: Any) -> RemovedChannels:
    """What a header's entry says.

    Raises:
        CorruptArtifactError: when it is not what `write_channels` writes.
    """
    if entry is None:
        return RemovedChannels()
    if not isinstance(entry, dict) or set(entry) != {"tensors", "layers", "kept"}:
        raise CorruptArtifactError(f"{KEY}: {str(entry)[:80]}")
    tensors, layers, kept = (_mapping(entry[name]) for name in ("tensors", "layers", "kept"))
    for values in (*tensors.values(), *kept.values(), list(layers.values())):
        if not isinstance(values, list) or not all(map(_is_count, values)):
            raise CorruptArtifactError(f"{KEY}: {str(values)[:80]}")
    for lengths in kept.values():
        if sum(lengths) > 1 << 24:
            raise CorruptArtifactError(f"{KEY}: more channels than any layer has")
    return RemovedChannels(
        {path: tuple(shape) for path, shape in tensors.items()},
        layers,
        {path: unruns(lengths) for path, lengths in kept.items()},
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{KEY}: {str(value)[:80]}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def sizes_in(
    records: list[TensorRecord], lost: RemovedChannels, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes, by stored name, of tensors that are smaller in a file than in the full module.

    Only those that the file says were cut from the very shape that the module has.
    """
    return {
        record.name: record.shape
        for record in records
        if (full := lost.shapes.get(record.name)) is not None
        and record.name in tensors
        and tuple(tensors[record.name].shape) == full
        and len(record.shape) == len(full)
        and all(0 < one <= other for one, other in zip(record.shape, full, strict=True))
    }


def fit_channels(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    lost: RemovedChannels,
    paths: Mapping[str, str],
) -> None:
    """Give a full module the sizes of a file, and let it remember what it lost.

    Args:
        module: changed in place.
        shapes: by stored name.
        lost: as the file has it.
        paths: the module's own paths, of tensors and layers, by stored name.

    Raises:
        CorruptArtifactError: when the sizes do not fit together.
    """
    try:
        match_channels(module, {paths[name]: shape for name, shape in shapes.items()})
        for path, size in lost.sizes.items():
            layer: Any = module.get_submodule(paths.get(path, path))
            layer.num_features = size
        own = RemovedChannels(
            {paths.get(path, path): shape for path, shape in lost.shapes.items()},
            {paths.get(path, path): size for path, size in lost.sizes.items()},
            {paths.get(path, path): kept for path, kept in lost.kept.items()},
        )
        note_removed(module, own)
    except (TargetError, AttributeError) as error:
        raise CorruptArtifactError(f"does not fit the module: {error}") from error


@dataclass(frozen=True)
class Contents:
    """What a file is to hold.

    Args:
        tensors: by stored name, in the order of the file.
        grids: of those tensors that lie on one.
        activations: grids of inputs and outputs, by the stored path of the layer.
        channels: what was removed, by stored paths.
    """

    tensors: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    activations: Mapping[str, ActivationGrids]
    channels: RemovedChannels = field(default_factory=RemovedChannels)


def module_contents(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> Contents:
    """A module's `state_dict` and the grids that it carries, under the names of the file.

    Args:
        module: whose contents they are.
        state: values in place of the module's own, by key.

    Raises:
        TypeError: for an entry that is no dense tensor of a known dtype.
        KeyError: for a key of `state` that the module does not have.
        ValueError: when two entries get the same name.
    """
    tensors = {name: tensor for name, (_, tensor) in module_tensors(module).items()}
    for key, tensor in (state or {}).items():
        check_tensor(key, tensor)
        if stored_name(key) not in tensors:
            raise KeyError(f"{key!r} is no entry of the module's state_dict")
        tensors[stored_name(key)] = tensor
    tensors = {name: one.resolve_conj().resolve_neg() for name, one in tensors.items()}
    known = compression_state(module, masks=False)
    grids: dict[str, Grid] = {}
    for path, grid in known.grids.items():
        if (name := stored_name(path)) in tensors:
            grids[name] = _from_the_front(grid, tensors[name].dim())
    activations = {stored_name(path): pair for path, pair in known.activations.items()}
    return Contents(tensors, grids, activations, _lost(known.channels, tensors))


def _lost(channels: RemovedChannels, tensors: Mapping[str, Tensor]) -> RemovedChannels:
    shapes = {stored_name(path): shape for path, shape in channels.shapes.items()}
    return RemovedChannels(
        {path: shape for path, shape in shapes.items() if path in tensors},
        {stored_name(path): size for path, size in channels.sizes.items()},
        {stored_name(path): kept for path, kept in channels.kept.items()},
    )


def _from_the_front(grid: Grid, dims: int) -> Grid:
    if isinstance(grid, CodebookGrid) or grid.axis is None:
        return grid
    return replace(grid, axis=grid.axis % dims)


def module_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """By stored name: the key in `state_dict` and the tensor.

    Raises:
        TypeError: for an entry that is no dense tensor of a known dtype.
        ValueError: when two entries get the same name.

    >>> list(module_tensors(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in module.state_dict().items():
        check_tensor(key, tensor)
        if (name := stored_name(key)) in found:
            raise ValueError(f"{key!r} and {found[name][0]!r} are both stored as {name!r}")
        found[name] = key, tensor
    return found


def check_tensor(key: str, tensor: object) -> None:
    """Refuse what the format cannot hold.

    Raises:
        TypeError: naming the entry, for anything but a dense tensor of a known dtype.
    """
    if isinstance(tensor, Tensor) and is_lazy(tensor):
        raise TypeError(f"{key!r} has no shape yet: run one batch through the lazy layer first")
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"{key!r} is no dense tensor with values: {str(tensor)[:80]}")
    if dtype_name(tensor.dtype) not in DTYPES:
        raise TypeError(f"{key!r} is {tensor.dtype}: valid are {', '.join(DTYPES)}")


def stored_name(key: str) -> str:
    """`torch.compile` wraps modules in one named `_orig_mod`; the weights are the same.

    >>> stored_name("net._orig_mod.weight")
    'net.weight'
    """
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def shared_memory(tensors: Mapping[str, Tensor], first: Iterable[str] = ()) -> dict[str, str]:
    """By name: the earlier tensor that it is the same memory as.

    Args:
        tensors: by name.
        first: names that come before the others.

    >>> a = torch.zeros(2)
    >>> shared_memory({"a": a, "b": a.detach(), "c": a.clone()})
    {'b': 'a'}
    """
    sources: dict[tuple[object, ...], str] = {}
    shared: dict[str, str] = {}
    for name in dict.fromkeys([*first, *tensors]):
        tensor = tensors[name]
        if tensor.numel():
            here = local_part(tensor).data_ptr()
            views = (tensor.is_conj(), tensor.is_neg())  # other values in the same memory
            place = (tensor.device, here, tensor.dtype, tensor.shape, tensor.stride(), *views)
            if (source := sources.setdefault(place, name)) != name:
                shared[name] = source
    return shared


def batchnorm_folded(module: nn.Module, contents: Contents) -> Contents:
    """Contents in which each BatchNorm is one scale and one shift, its statistics 0 and 1.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` is `scale * x + shift`. A bias right before
    it goes into the shift. BatchNorms without weights, or with weights on grids, stay as they are.
    """
    tensors = dict(contents.tensors)
    twice = _shared(tensors)
    before = norms_behind(module)
    for path, layer in module.named_modules():
        names = {key: _name(path, key) for key in ("weight", "bias", "running_mean", "running_var")}
        own = set(names.values())
        if not isinstance(layer, _BatchNorm) or not own <= set(tensors):
            continue
        if own & set(contents.grids) or own & twice:
            continue
        bias = _name(before[path], "bias") if path in before else ""
        tensors |= _folded(names, tensors, layer.eps, "" if bias in twice else bias)
        if (count := _name(path, "num_batches_tracked")) in tensors:
            tensors[count] = torch.zeros_like(tensors[count])
    return replace(contents, tensors=tensors)


def _folded(
    names: dict[str, str], tensors: dict[str, Tensor], eps: float, bias: str
) -> dict[str, Tensor]:
    weight, shift, mean, var = (tensors[name].detach().double() for name in names.values())
    scale = weight / torch.sqrt(var + eps)
    found = {}
    if bias in tensors:
        mean = mean - tensors[bias].detach().double()
        found[bias] = torch.zeros_like(tensors[bias])
    new = {
        "weight": scale * (1 + eps) ** 0.5,
        "bias": shift - mean * scale,
        "running_mean": torch.zeros_like(mean),
        "running_var": torch.ones_like(var),
    }
    return found | {names[key]: value.to(tensors[names[key]].dtype) for key, value in new.items()}


def _name(path: str, key: str) -> str:
    return stored_name(f"{path}.{key}" if path else key)


def _shared(tensors: dict[str, Tensor]) -> set[str]:
    pairs: Iterator[tuple[str, str]] = iter(shared_memory(tensors).items())
    return {name for pair in pairs for name in pair}
