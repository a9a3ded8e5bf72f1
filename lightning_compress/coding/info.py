"""What an artifact holds and what it costs, as told by its header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_compress.coding.records import TensorRecord
from lightning_compress.coding.values import DTYPES

__all__ = ["ArtifactInfo", "TensorInfo", "artifact_info"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an artifact.

    Args:
        shape: of the tensor.
        dtype: its name in the module, such as `"float32"`.
        kind: `"grid"`, `"codebook"`, `"mask"` (zeros apart), `"plain"`, or `"tied"`: stored under
            another name, at no cost.
        codec: of the symbols; of values without symbols `"bytes"` or `"planes"` (deflated).
        bits: of a symbol on a grid or in a codebook, else of a stored value.
        nonzero: values that are not 0.
        elements: values in all.
        bytes: its payload in the file.
        bound_bytes: the zero-order entropy of its symbols, plus what is stored beside them (scales,
            zero points, codebook, plain values).
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    codec: str
    bits: int
    nonzero: int
    elements: int
    bytes: int
    bound_bytes: int


@dataclass(frozen=True)
class ArtifactInfo:
    """An `.lcz` file. `header_bytes` and the tensors' `bytes` add up to `bytes`.

    Args:
        path: of the file.
        bytes: of the whole file.
        header_bytes: prefix, header and checksum: all that is no payload.
        ratio: bytes of the tensors stored plainly in their own dtypes, each tied one once, divided
            by `bytes`.
        entropy_bound_bytes: sum of the tensors' `bound_bytes`. Code tables and `header_bytes` are
            not in it. Run lengths may go below it where zeros cluster, since zero-order entropy
            looks at each symbol alone.
        per_tensor: by name, in the order of `state_dict`.
    """

    path: Path
    bytes: int
    header_bytes: int
    ratio: float
    entropy_bound_bytes: int
    per_tensor: dict[str, TensorInfo]


def artifact_info(path: Path, records: Sequence[TensorRecord], size: int) -> ArtifactInfo:
    """Sums up the records of a file of `size` bytes."""
    by_name = {record.name: record for record in records}
    tensors = {
        record.name: _tensor_info(record, by_name.get(record.tied, record)) for record in records
    }
    plain = sum(
        record.elements * DTYPES[record.dtype].itemsize
        for record in records
        if record.kind != "tied"
    )
    return ArtifactInfo(
        path=path,
        bytes=size,
        header_bytes=size - sum(tensor.bytes for tensor in tensors.values()),
        ratio=plain / size,
        entropy_bound_bytes=sum(tensor.bound_bytes for tensor in tensors.values()),
        per_tensor=tensors,
    )


def _tensor_info(record: TensorRecord, source: TensorRecord) -> TensorInfo:
    tied = record.kind == "tied"
    return TensorInfo(
        shape=record.shape,
        dtype=record.dtype,
        kind=record.kind,
        codec="tied" if tied else record.codec or record.packing,
        bits=_bits(source),
        nonzero=source.elements - source.zeros,
        elements=record.elements,
        bytes=record.payload_bytes,
        bound_bytes=0 if tied else record.entropy_bytes + record.aux_bytes,
    )


def _bits(record: TensorRecord) -> int:
    if record.grid:
        first, *others = record.grid
        return first if others else (first - 1).bit_length()
    if record.kind == "codebook":
        return max((record.aux_bytes - 1) // record.word - 1, 1).bit_length()
    return 8 * DTYPES[record.storage].itemsize
