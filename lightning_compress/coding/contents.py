"""What of a module goes into a file: its tensors by name, their grids, and who shares memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.coding.values import DTYPES, dtype_name
from lightning_compress.quantization.codebooks import CodebookGrid
from lightning_compress.sharding import local_part
from lightning_compress.state import ActivationGrids, Grid, RemovedChannels, compression_state

__all__ = ["Contents", "check_tensor", "module_contents", "module_tensors", "shared_memory"]


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
