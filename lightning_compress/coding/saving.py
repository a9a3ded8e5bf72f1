"""Contents to a file: tensor by tensor, so that no more than a few are worked on at a time."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding.activations import write_activations
from lightning_compress.coding.channels import KEY as CHANNELS
from lightning_compress.coding.channels import write_channels
from lightning_compress.coding.codecs import check_codec
from lightning_compress.coding.container import SMALLEST, write_container
from lightning_compress.coding.contents import Contents, shared_memory
from lightning_compress.coding.grids import same_grid
from lightning_compress.coding.info import ArtifactInfo, artifact_info
from lightning_compress.coding.progress import shown
from lightning_compress.coding.records import TensorRecord, read_records, write_records
from lightning_compress.coding.tensors import encode_on_grid, encode_values
from lightning_compress.coding.together import Gather, together
from lightning_compress.coding.values import dtype_name
from lightning_compress.coding.workers import check_workers, mapped
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.sharding import is_sharded
from lightning_compress.state import Grid

__all__ = ["Encoding", "write_contents"]

_FLOAT_DTYPES = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
_IN_MEMORY = 1 << 26  # bytes of payloads that wait for the header without a file
_PIECE = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """How tensors are encoded.

    Args:
        codec: of the symbols, as in `save_compressed`.
        float_dtype: what floats that are on no grid are cast to: None, "fp16" or "bf16".
        workers: threads that encode tensors side by side.

    Raises:
        ValueError: for an unknown codec or float_dtype, or no worker.
    """

    codec: str = "auto"
    float_dtype: str | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        check_codec(self.codec)
        if self.float_dtype not in _FLOAT_DTYPES:
            raise ValueError(f"float_dtype={self.float_dtype!r}: valid are None, 'fp16', 'bf16'")
        check_workers(self.workers)


@dataclass(frozen=True)
class _Coded:
    record: TensorRecord
    payload: bytes
    complaint: str = ""


def write_contents(contents: Contents, path: Path, encoding: Encoding) -> ArtifactInfo:
    """Write a file of these contents; where some are sharded, all processes must.

    Raises:
        ValueError: for what the format cannot hold.
        OSError: naming the path, when it cannot be written.
    """
    tensors = contents.tensors
    if any(map(is_sharded, tensors.values())):
        return together(tensors, lambda gather: _written(contents, path, encoding, gather))
    return _written(contents, path, encoding, tensors.__getitem__)


def _written(contents: Contents, path: Path, encoding: Encoding, gather: Gather) -> ArtifactInfo:
    tied = _tied(contents)
    header: dict[str, Any] = {}
    if contents.activations:
        header["activations"] = write_activations(contents.activations)
    if contents.channels:
        header[CHANNELS] = write_channels(contents.channels)
    with _naming(path), tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(path.parent)) as spool:
        found: dict[str, TensorRecord] = {}
        for coded in _encoded(contents, set(contents.tensors) - set(tied), encoding, gather):
            if coded.complaint:
                warnings.warn(coded.complaint, stacklevel=4)  # the caller of save_compressed
            found[coded.record.name] = coded.record
            spool.write(coded.payload)
        for name, source in tied.items():
            found[name] = _tied_record(name, found[source], has_grid=name in contents.grids)
        records = [found[name] for name in contents.tensors]
        header["tensors"] = _checked(write_records(records), spool.tell())
        spool.seek(0)
        size = write_container(path, header, iter(lambda: spool.read(_PIECE), b""))
    return artifact_info(path, records, size)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Payloads that wait for the header lie beside the file, nameless; so do their errors."""
    try:
        yield
    except OSError as error:
        if error.filename == str(path):
            raise
        message = f"cannot write the artifact: {error.strerror or error}"
        raise OSError(error.errno, message, str(path)) from error


def _checked(rows: list[dict[str, Any]], payload_bytes: int) -> list[dict[str, Any]]:
    try:
        read_records(rows, payload_bytes, payload_bytes + SMALLEST)
    except CorruptArtifactError as error:
        raise ValueError(f"the format cannot hold this module: {error}") from None
    return rows


def _tied(contents: Contents) -> dict[str, str]:
    """By name: the tensor that it shares its memory and its grid with."""
    grids = contents.grids
    return {
        name: source
        for name, source in shared_memory(contents.tensors, first=grids).items()
        if name not in grids or same_grid(grids[name], grids.get(source))
    }


def _encoded(
    contents: Contents, own: set[str], encoding: Encoding, gather: Gather
) -> Iterator[_Coded]:
    names = [name for name in contents.tensors if name in own]
    sizes = [contents.tensors[name].numel() for name in names]

    def encode(name: str) -> _Coded:
        return _encode(name, gather(name), contents.grids.get(name), encoding)

    yield from shown(mapped(encode, names, encoding.workers), sizes, "encoding")


def _tied_record(name: str, source: TensorRecord, *, has_grid: bool) -> TensorRecord:
    row = TensorRecord(name, source.shape, source.dtype, kind="tied", tied=source.name)
    return replace(row, grid=source.grid if has_grid else ())


def _encode(name: str, tensor: Tensor, grid: Grid | None, encoding: Encoding) -> _Coded:
    record = TensorRecord(name, tuple(tensor.shape), dtype_name(tensor.dtype), zeros=_zeros(tensor))
    complaint = ""
    if grid is not None:
        if (coded := encode_on_grid(record, tensor, grid, encoding.codec)) is not None:
            return _Coded(*coded)
        complaint = f"tensor {name!r} is not bit for bit on its grid: stored as values, without it"
    cast = _FLOAT_DTYPES[encoding.float_dtype]
    if cast is not None and tensor.is_floating_point() and tensor.dtype.itemsize > cast.itemsize:
        narrow = tensor.to(cast)
        if torch.equal(narrow.isfinite(), tensor.isfinite()):
            record = replace(record, stored=dtype_name(cast), zeros=_zeros(narrow))
            return _Coded(*encode_values(record, narrow, encoding.codec), complaint)
        complaint = (
            f"tensor {name!r} has values beyond {dtype_name(cast)}: stored as {record.dtype}"
        )
    return _Coded(*encode_values(record, tensor, encoding.codec), complaint)


def _zeros(tensor: Tensor) -> int:
    return int((tensor.detach() == 0).sum())  # count_nonzero lacks some dtypes
