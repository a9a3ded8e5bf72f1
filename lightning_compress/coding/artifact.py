"""Modules to `.lcz` files and back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from lightning_compress.coding.codecs import check_codec
from lightning_compress.coding.container import Container, container_parts, read_container
from lightning_compress.coding.container import write_atomically as _write
from lightning_compress.coding.contents import encode_module, module_tensors, shared_memory
from lightning_compress.coding.info import ArtifactInfo, artifact_info
from lightning_compress.coding.records import TensorRecord, read_records, write_records
from lightning_compress.coding.tensors import decode_tensor
from lightning_compress.coding.values import dtype_name, patterns
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import clear_grid, set_grid

__all__ = ["inspect_compressed", "load_compressed", "save_compressed"]


def save_compressed(
    module: nn.Module,
    path: str | os.PathLike[str],
    codec: str = "auto",
    *,
    float_dtype: str | None = None,
) -> ArtifactInfo:
    """Writes every entry of a module's `state_dict` to one entropy-coded file.

    Lossless with respect to the values that the module shows, unless `float_dtype` is given.
    Weights on a grid become symbols; other tensors the smallest of plain values, a codebook, and
    non-zero values with a mask. The file appears as a whole or not at all.

    Args:
        module: of any kind; names of compiled modules are stored without `_orig_mod.`.
        path: of the file; its folder must exist.
        codec: of the symbols: "huffman", "rle_huffman", "raw", or "auto" for the smallest of them
            tensor by tensor.
        float_dtype: "fp16" or "bf16" stores floats that are on no grid in that type; loading casts
            them back.

    Raises:
        ValueError: for an unknown codec or float_dtype, or tensors that the format cannot hold.
        TypeError: for entries that are no dense tensors.
        OSError: naming the path, when it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     info = save_compressed(nn.Linear(4, 2), f"{folder}/model.lcz")
    ...     restored = load_compressed(f"{folder}/model.lcz", nn.Linear(4, 2))
    >>> sorted(info.per_tensor)
    ['bias', 'weight']
    """
    check_codec(codec)
    target = Path(path)
    records, payloads = encode_module(module, codec, float_dtype)
    header = write_records(records)
    parts = container_parts(header, payloads)
    size = sum(map(len, parts))
    try:
        read_records(header, sum(map(len, payloads)), size)
    except CorruptArtifactError as error:
        raise ValueError(f"the format cannot hold this module: {error}") from None
    _write(target, parts)
    return artifact_info(target, records, size)


def inspect_compressed(path: str | os.PathLike[str]) -> ArtifactInfo:
    """What a file holds, from its header alone.

    The header is checked against its CRC-32, by itself, and against the length of the file; the
    payloads are neither read nor checked.

    Raises:
        CorruptArtifactError: when the file is damaged or no `.lcz` file.
        OSError: when it cannot be read.
    """
    target = Path(path)
    with _opened(target, verify=False) as (container, records):
        return artifact_info(target, records, container.size)


def load_compressed(path: str | os.PathLike[str], module: nn.Module) -> nn.Module:
    """Puts a file's tensors and grids into a module, in place.

    Names, shapes and dtypes must be the same on both sides. All is checked and decoded before the
    first value changes, so memory for one more copy of the tensors is needed, as in `torch.load`.

    Returns:
        The module.

    Raises:
        CorruptArtifactError: when the file is damaged or does not fit the module, which then is
            as it was.
        OSError: when the file cannot be read.
    """
    target = Path(path)
    tensors = module_tensors(module)
    with _opened(target, verify=True) as (container, records):
        _check_fit(records, {name: tensor for name, (_, tensor) in tensors.items()})
        parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
        for record in records:
            if record.grid and tensors[record.name][0] not in parameters:
                raise CorruptArtifactError(f"tensor {record.name!r}: a grid, but no parameter")
        values, grids = _decode(container, records)
        _check_shared(values, tensors)
    module.load_state_dict({tensors[name][0]: value for name, value in values.items()})
    _attach(module, {tensors[name][0]: grid for name, grid in grids.items()})
    return module


@contextlib.contextmanager
def _opened(path: Path, *, verify: bool) -> Iterator[tuple[Container, list[TensorRecord]]]:
    try:
        with read_container(path, verify=verify) as container:
            records = read_records(container.header, container.payload_bytes, container.size)
            yield container, records
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{path}: {error}") from error


def _check_fit(records: list[TensorRecord], tensors: Mapping[str, Tensor]) -> None:
    stored = {record.name: (record.dtype, record.shape) for record in records}
    wanted = {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    both = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    faults = {
        "missing in the file": [repr(name) for name in wanted if name not in stored],
        "unexpected in the file": [repr(name) for name in stored if name not in wanted],
        "mismatched": [
            f"{name!r} is {stored[name]} in the file and {wanted[name]} in the module"
            for name in both
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in faults.items() if names]
    if found:
        raise CorruptArtifactError(f"does not fit the module: {'; '.join(found)}")


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _decode(
    container: Container, records: list[TensorRecord]
) -> tuple[dict[str, Tensor], dict[str, AffineGrid]]:
    values: dict[str, Tensor] = {}
    grids: dict[str, AffineGrid] = {}
    offset = 0
    for record in records:
        if record.kind != "tied":
            payload = container.read(offset, record.payload_bytes)
            values[record.name], grid = decode_tensor(record, payload)
            offset += record.payload_bytes
            if grid is not None:
                grids[record.name] = grid
    for record in records:
        if record.kind == "tied":
            values[record.name] = values[record.tied]
            if record.grid:
                grids[record.name] = grids[record.tied]
    return values, grids


def _check_shared(values: Mapping[str, Tensor], tensors: Mapping[str, tuple[str, Tensor]]) -> None:
    """Tensors that share memory in the module cannot take two different values."""
    for name, source in shared_memory({name: t for name, (_, t) in tensors.items()}).items():
        one, other = values[name], values[source]
        if one is not other and not np.array_equal(patterns(one), patterns(other)):
            raise CorruptArtifactError(
                f"{name!r} and {source!r} are one tensor in the module and differ in the file"
            )


def _attach(module: nn.Module, grids: Mapping[str, AffineGrid]) -> None:
    for layer in module.modules():
        for name, _ in layer.named_parameters(recurse=False, remove_duplicate=False):
            clear_grid(layer, name)
    for key, grid in grids.items():
        owner, _, name = key.rpartition(".")
        set_grid(module.get_submodule(owner), name, grid)
