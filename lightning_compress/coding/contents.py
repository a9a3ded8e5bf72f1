"""What of a module goes into a file: its tensors by name, their grids, and who shares memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_compress.coding.grids import same_grid
from lightning_compress.coding.records import TensorRecord
from lightning_compress.coding.tensors import encode_on_grid, encode_values
from lightning_compress.coding.values import DTYPES, dtype_name
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import compression_state

__all__ = ["encode_module", "module_tensors", "shared_memory"]

_FLOAT_DTYPES = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        name = _stored_name(key)
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise TypeError(f"{key!r} is no dense tensor with values: {str(tensor)[:80]}")
        if dtype_name(tensor.dtype) not in DTYPES:
            raise TypeError(f"{key!r} is {tensor.dtype}: valid are {', '.join(DTYPES)}")
        if name in found:
            raise ValueError(f"{key!r} and {found[name][0]!r} are both stored as {name!r}")
        found[name] = key, tensor
    return found


def _stored_name(key: str) -> str:
    """`torch.compile` wraps modules in one of this name; the weights are the same."""
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
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (source := sources.setdefault(place, name)) != name:
                shared[name] = source
    return shared


def encode_module(
    module: nn.Module, codec: str, float_dtype: str | None
) -> tuple[list[TensorRecord], list[bytes]]:
    """Records and payloads of a module's tensors, in the order of `state_dict`.

    Raises:
        ValueError: for an unknown float_dtype.
    """
    if float_dtype not in _FLOAT_DTYPES:
        raise ValueError(f"float_dtype={float_dtype!r}: valid are None, 'fp16', 'bf16'")
    tensors = {name: tensor for name, (_, tensor) in module_tensors(module).items()}
    grids = _grids(module, tensors)
    tied = {
        name: source
        for name, source in shared_memory(tensors, first=grids).items()
        if name not in grids or same_grid(grids[name], grids.get(source))
    }
    coded: dict[str, tuple[TensorRecord, bytes]] = {}
    for name, tensor in tensors.items():
        if name not in tied:
            coded[name] = _encode(name, tensor, grids.get(name), codec, _FLOAT_DTYPES[float_dtype])
    for name, source in tied.items():
        of_source = coded[source][0]
        grid = of_source.grid if name in grids else ()
        row = TensorRecord(name, of_source.shape, of_source.dtype, kind="tied", tied=source)
        coded[name] = replace(row, grid=grid), b""
    return [coded[name][0] for name in tensors], [coded[name][1] for name in tensors]


def _grids(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, AffineGrid]:
    found: dict[str, AffineGrid] = {}
    for path, grid in compression_state(module).grids.items():
        name = _stored_name(path)
        # A tensor on a codebook is stored by its values.
        if name in tensors and isinstance(grid, AffineGrid):
            axis = grid.axis if grid.axis is None else grid.axis % tensors[name].dim()
            found[name] = replace(grid, axis=axis)
    return found


def _encode(
    name: str, tensor: Tensor, grid: AffineGrid | None, codec: str, cast: torch.dtype | None
) -> tuple[TensorRecord, bytes]:
    record = TensorRecord(name, tuple(tensor.shape), dtype_name(tensor.dtype), zeros=_zeros(tensor))
    if grid is not None:
        if (coded := encode_on_grid(record, tensor, grid, codec)) is not None:
            return coded
        _warn(f"tensor {name!r} is not bit for bit on its grid: stored as values, without the grid")
    if cast is not None and tensor.is_floating_point() and tensor.dtype.itemsize > cast.itemsize:
        narrow = tensor.to(cast)
        if torch.equal(narrow.isfinite(), tensor.isfinite()):
            record = replace(record, stored=dtype_name(cast), zeros=_zeros(narrow))
            return encode_values(record, narrow, codec)
        _warn(f"tensor {name!r} has values beyond {dtype_name(cast)}: stored as {record.dtype}")
    return encode_values(record, tensor, codec)


def _zeros(tensor: Tensor) -> int:
    return int((tensor.detach() == 0).sum())  # count_nonzero lacks some dtypes


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)  # the caller of save_compressed
