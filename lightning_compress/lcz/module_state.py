"""Contents of a file from a module: tensors by name, grids, removed channels, shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_compress.channels.resize import resize_module
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.lcz.channel_record import (
    KEY,
    ChannelRecord,
    from_run_lengths,
)
from lightning_compress.lcz.header import TensorRecord
from lightning_compress.lcz.layer_grids import DYNAMIC, SIDES, LayerGrid
from lightning_compress.lcz.raw_bits import DTYPES, dtype_name
from lightning_compress.lcz.tensors import grid_fault
from lightning_compress.removed import RemovedChannels
from lightning_compress.sharding import local_part
from lightning_compress.state import ActivationGrids, Grid, compression_state, note_removed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Contents",
    "check_channels",
    "check_tensor",
    "fit_channels",
    "fold_batchnorm_statistics",
    "layers_before_norms",
    "module_contents",
    "module_tensors",
    "read_activations",
    "removed_shapes",
    "shared_memory",
    "write_activations",
]


def write_activations(grids: Mapping[str, ActivationGrids]) -> dict[str, Any]:
    """The header's entry of activation grids.

    Raises:
        ValueError: naming the layer, for a grid that is not one finite scale a tensor.
    """
    return {
        path: {
            key: _row(path, grid)
            for key, side in SIDES.items()
            if (grid := getattr(pair, side)) is not None
        }
        | ({DYNAMIC: 1} if pair.dynamic else {})
        for path, pair in grids.items()
    }


def _row(path: str, grid: AffineGrid) -> list[int]:
    why = "an axis" if grid.axis is not None else grid_fault(grid, ())
    if why is not None:
        raise ValueError(f"the activation grid of {path!r} has {why}: the format holds one scale")
    scale = grid.scale.detach().cpu().numpy().astype("<f4").view("<u4")
    return [grid.bits, int(grid.symmetric), int(grid.zero_point), int(scale[0])]


def read_activations(
    grids: Mapping[str, Mapping[str, LayerGrid | bool]],
) -> dict[str, ActivationGrids]:
    """What `write_activations` wrote, as tensors; see `layer_grids` for its checks."""
    return {
        path: ActivationGrids(
            **{
                side: _grid(row) if isinstance(row, LayerGrid) else row  # type: ignore[arg-type]
                for side, row in pair.items()
            }
        )
        for path, pair in grids.items()
    }


def _grid(row: LayerGrid) -> AffineGrid:
    zero = torch.tensor([row.zero_point], dtype=torch.int32)
    return AffineGrid(torch.tensor([row.scale]), zero, row.bits, bool(row.symmetric), None)


CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def layers_before_norms(module: nn.Module) -> dict[str, str]:
    """The layer directly before each BatchNorm in a plain `nn.Sequential`, both by path.

    Only where both run once, without hooks.

    >>> layers_before_norms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()))
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
            alone = _runs_once(layer, uses) and _runs_once(norm, uses)
            if alone and _is_layer(layer) and isinstance(norm, NORMS):
                found[second] = first
    return found


def _is_layer(layer: nn.Module) -> bool:
    if type(layer) in CONVOLUTIONS:
        return vars(layer)["groups"] == 1
    return type(layer) is nn.Linear


def _runs_once(layer: nn.Module, uses: Counter[int]) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return uses[id(layer)] == 1 and not any(hooks) and not layer._backward_hooks


_NORMS = (nn.modules.batchnorm._NormBase,)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_RESIZABLE = (
    nn.Linear,
    *_NORMS,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def removed_shapes(
    records: Sequence[TensorRecord], lost: ChannelRecord, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes, by stored name, of tensors that are smaller in a file than in the full module.

    Only tensors that were resized from the shape that the module has. Of tied tensors one is
    named.

    Raises:
        CorruptArtifactError: for a shape that no removal of channels gives.
    """
    stored = {record.name: record.shape for record in records}
    sources = {record.name: record.tied or record.name for record in records}
    for name, full in lost.shapes.items():
        shape = stored.get(name)
        if shape is None:
            raise CorruptArtifactError(f"{KEY}: no tensor {name!r} in the file")
        pairs = zip(shape, full, strict=False)
        if len(shape) != len(full) or not all(0 < one <= other for one, other in pairs):
            raise CorruptArtifactError(f"{KEY}: {name!r} of {shape} cannot be cut from {full}")
    cut = {sources[name]: full for name, full in lost.shapes.items()}
    return {
        name: shape
        for name, shape in stored.items()
        if (full := cut.get(sources[name])) is not None
        and name in tensors
        and tuple(tensors[name].shape) == full != shape
    }


def check_channels(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    lost: ChannelRecord,
    paths: Mapping[str, str],
) -> None:
    """Check the removed channels of a file against a module, before it is resized.

    Args:
        module: in full size, or small already.
        shapes: that tensors would be cut to, by stored name.
        lost: as the file has it.
        paths: the module's own paths, of tensors and layers, by stored name.

    Raises:
        CorruptArtifactError: naming a layer that is not there, or that has no such channels.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    tensors = module.state_dict()
    for name, shape in shapes.items():
        if fault := _cut_fault(layers, paths[name], tuple(tensors[paths[name]].shape), shape):
            raise CorruptArtifactError(f"does not fit the module: {name!r}: {fault}")
    for path, size in lost.sizes.items():
        layer: Any = layers.get(paths.get(path, path))
        if layer is None:
            raise CorruptArtifactError(f"does not fit the module: no layer {path!r}")
        if not isinstance(layer, _NORMS) or layer.state_dict():
            kind = type(layer).__name__
            raise CorruptArtifactError(
                f"does not fit the module: {path!r}, a {kind}, is its tensors' size"
            )
        if not 0 < size <= layer.num_features:
            raise CorruptArtifactError(f"does not fit the module: {path!r} of {size} channels")
    if unknown := [path for path in lost.kept if paths.get(path, path) not in layers]:
        raise CorruptArtifactError(f"does not fit the module: no layer {unknown[0]!r}")
    stay = sum(sum(lengths[1::2]) for lengths in lost.kept.values())
    if stay > (most := sum(sum(one.shape) for one in tensors.values() if isinstance(one, Tensor))):
        raise CorruptArtifactError(f"{KEY}: {stay} channels kept, the tensors have {most}")


def _cut_fault(
    layers: Mapping[str, nn.Module], key: str, full: tuple[int, ...], shape: tuple[int, ...]
) -> str | None:
    """Why removed channels cannot have changed a tensor's shape like this; None: they can."""
    path, _, _ = key.rpartition(".")
    layer = layers[path.partition(".parametrizations.")[0]]
    where = {dim for dim, (one, other) in enumerate(zip(full, shape, strict=True)) if one != other}
    kind = type(layer).__name__
    if isinstance(layer, nn.Embedding):
        return f"rows of an {kind} are no channels" if 0 in where else None
    if isinstance(layer, nn.modules.conv._ConvNd) and where - {0, 1}:
        return f"axes {sorted(where - {0, 1})} of a {kind} are no channels"
    own = type(layer).__module__.startswith("torch.nn.modules.") and not isinstance(layer, _LISTS)
    if own and not isinstance(layer, (*_RESIZABLE, nn.modules.conv._ConvNd)):
        return f"a {kind} loses no channels"
    return None


def fit_channels(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    lost: ChannelRecord,
    paths: Mapping[str, str],
) -> None:
    """Resize a full module to the sizes of a file, and record the removed channels on it.

    Args:
        module: changed in place; unchanged where an error is raised.
        shapes: by stored name.
        lost: as the file has it, checked by `check_channels`.
        paths: the module's own paths, of tensors and layers, by stored name.

    Raises:
        CorruptArtifactError: when the sizes do not fit together.
    """
    sized = {paths.get(path, path): size for path, size in lost.sizes.items()}
    try:
        resize_module(module, {paths[name]: shape for name, shape in shapes.items()}, sized)
    except Exception as error:
        raise CorruptArtifactError(f"does not fit the module: {error}") from error
    own = RemovedChannels(
        {paths.get(path, path): shape for path, shape in lost.shapes.items()},
        sized,
        {paths.get(path, path): from_run_lengths(kept) for path, kept in lost.kept.items()},
    )
    note_removed(module, own)


@dataclass(frozen=True)
class Contents:
    """Contents of a file.

    Args:
        tensors: by stored name, in the order of the file.
        grids: of quantized tensors.
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
            grids[name] = _with_positive_axis(grid, tensors[name].dim())
    activations = {stored_name(path): pair for path, pair in known.rounding.items()}
    return Contents(tensors, grids, activations, _stored_channels(known.channels, tensors))


def _stored_channels(channels: RemovedChannels, tensors: Mapping[str, Tensor]) -> RemovedChannels:
    shapes = {stored_name(path): shape for path, shape in channels.shapes.items()}
    return RemovedChannels(
        {path: shape for path, shape in shapes.items() if path in tensors},
        {stored_name(path): size for path, size in channels.sizes.items()},
        {stored_name(path): kept for path, kept in channels.kept.items()},
    )


def _with_positive_axis(grid: Grid, dims: int) -> Grid:
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
    """Check that the format can hold a tensor.

    Raises:
        TypeError: naming the entry, for anything but a dense tensor of a known dtype.
    """
    if isinstance(tensor, Tensor) and tensor.is_nested:
        raise TypeError(f"{key!r} is a nested tensor: give its parts names of their own")
    if isinstance(tensor, Tensor) and is_lazy(tensor):
        raise TypeError(f"{key!r} has no shape yet: run one batch through the lazy layer first")
    bare = isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor))
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or bare:
        raise TypeError(f"{key!r} is no dense tensor with values: {str(tensor)[:80]}")
    if dtype_name(tensor.dtype) not in DTYPES:
        raise TypeError(f"{key!r} is {tensor.dtype}: valid are {', '.join(DTYPES)}")


def stored_name(key: str) -> str:
    """Key without the `_orig_mod` of modules that `torch.compile` wraps.

    >>> stored_name("net._orig_mod.weight")
    'net.weight'
    """
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def shared_memory(tensors: Mapping[str, Tensor], first: Iterable[str] = ()) -> dict[str, str]:
    """By name: the earlier tensor that shares its memory.

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


def fold_batchnorm_statistics(module: nn.Module, contents: Contents) -> Contents:
    """Contents with each BatchNorm folded into one scale and one shift, its statistics 0 and 1.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` is `scale * x + shift`. A bias right before
    it goes into the shift. BatchNorms without weights, or with weights on grids, stay as they are.
    """
    tensors = dict(contents.tensors)
    twice = _shared_names(tensors)
    before = layers_before_norms(module)
    for path, layer in module.named_modules():
        names = {key: _key(path, key) for key in ("weight", "bias", "running_mean", "running_var")}
        own = set(names.values())
        if not isinstance(layer, _BatchNorm) or not own <= set(tensors):
            continue
        if own & set(contents.grids) or own & twice:
            continue
        bias = _key(before[path], "bias") if path in before else ""
        tensors |= _folded(names, tensors, layer.eps, "" if bias in twice else bias)
        if (count := _key(path, "num_batches_tracked")) in tensors:
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


def _key(path: str, key: str) -> str:
    return stored_name(f"{path}.{key}" if path else key)


def _shared_names(tensors: dict[str, Tensor]) -> set[str]:
    pairs: Iterator[tuple[str, str]] = iter(shared_memory(tensors).items())
    return {name for pair in pairs for name in pair}
