"""Header rows of tensors, validated before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.codecs import CODECS
from lightning_compress.lcz.raw_bits import DTYPES, PACKINGS, word_size

__all__ = [
    "MAX_BITS",
    "MAX_CODEBOOK",
    "MAX_EXPANSION",
    "MIN_BITS",
    "TensorRecord",
    "optional",
    "read_records",
    "write_records",
]
MIN_BITS, MAX_BITS = 2, 8  # of a grid in the file
MAX_CODEBOOK = 256

# Elements per byte of file. Only long runs of one value come near.
MAX_EXPANSION = 1 << 24
_MAX_INT = 1 << 53
_KEYS = {
    "n": "name", "s": "shape", "d": "dtype", "f": "stored", "k": "kind", "c": "codec",
    "p": "packing", "q": "grid", "a": "aux_bytes", "l": "symbol_bytes", "e": "entropy_bytes",
    "z": "zeros", "t": "tied",
}  # fmt: skip


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a file. Its payload is `aux_bytes`, then `symbol_bytes`.

    Args:
        name: the entry of `state_dict`, without the `_orig_mod.` of compiled modules.
        shape: of the tensor.
        dtype: of the module's tensor.
        stored: the dtype that values were cast to for storage, if they were.
        kind: "grid" (aux: zero points, scales; or centres), "codebook" (aux: which is symbol 0,
            values), "mask" (symbols tell zeros from other values, aux: those), "plain" (aux:
            values), or "tied".
        codec: of the symbols.
        packing: of the scales of "grid", and of the values of "mask" and "plain".
        grid: (bits, symmetric), (bits, symmetric, axis), or of a codebook (centres,). On "tied":
            this name has it as well.
        aux_bytes: length of the first part.
        symbol_bytes: length of the second part.
        entropy_bytes: zero-order entropy of the symbols, rounded up.
        zeros: values that are 0 or -0.
        tied: the name that this one shares its memory with.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str = ""
    kind: str = "plain"
    codec: str = ""
    packing: str = ""
    grid: tuple[int, ...] = ()
    aux_bytes: int = 0
    symbol_bytes: int = 0
    entropy_bytes: int = 0
    zeros: int = 0
    tied: str = ""

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of elements if no axis were empty: bounds scales along the other axes.

        >>> TensorRecord("a", (1 << 40, 0), "float32").extent == 1 << 40
        True
        """
        return math.prod(size for size in self.shape if size)

    @property
    def storage(self) -> str:
        """The dtype that the values have in the file."""
        return self.stored or self.dtype

    @property
    def word(self) -> int:
        """Bytes of one stored pattern."""
        return word_size(DTYPES[self.storage])

    @property
    def words(self) -> int:
        """Patterns in the tensor: elements, or twice as many for complex128."""
        return self.elements * DTYPES[self.storage].itemsize // self.word

    @property
    def axis(self) -> int | None:
        """The axis that the scales run along."""
        return self.grid[2] if len(self.grid) == 3 else None

    @property
    def grid_values(self) -> int:
        """Number of scales, or of centres."""
        if len(self.grid) == 1:
            return self.grid[0]
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the symbols: the tensor's shape, if an element is one word."""
        return self.shape if self.words == self.elements else (self.words,)

    @property
    def payload_bytes(self) -> int:
        """Length of the payload."""
        return self.aux_bytes + self.symbol_bytes


_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(TensorRecord)}


def write_records(records: Sequence[TensorRecord]) -> list[dict[str, Any]]:
    """The header's rows: one a tensor, without default values."""
    return [_row(record) for record in records]


def _row(record: TensorRecord) -> dict[str, Any]:
    values = ((key, name, getattr(record, name)) for key, name in _KEYS.items())
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, name, value in values
        if value != _DEFAULTS[name]
    }


def read_records(rows: object, payload_bytes: int | None, size: int) -> list[TensorRecord]:
    """The records of a header, each checked by itself and all against the file.

    Args:
        rows: the header's list of tensors, as parsed from JSON.
        payload_bytes: what the payloads take in the file; None: others follow, of unknown length.
        size: of the file.

    Raises:
        CorruptArtifactError: naming the tensor and what is wrong with it.
    """
    if not isinstance(rows, list):
        raise CorruptArtifactError("the header does not list its tensors")
    records = [_record(row) for row in rows]
    by_name = {record.name: record for record in records}
    if len(by_name) != len(records):
        raise CorruptArtifactError("a tensor's name stands in the header twice")
    total = sum(record.payload_bytes for record in records)
    if payload_bytes is not None and total != payload_bytes:
        raise CorruptArtifactError(f"payloads of {total} bytes, the file has {payload_bytes}")
    for record in records:
        if (fault := _fault(record, by_name)) is not None:
            raise CorruptArtifactError(f"tensor {record.name!r}: {fault}")
        if record.extent > min(MAX_EXPANSION * size, _MAX_INT):
            raise CorruptArtifactError(
                f"tensor {record.name!r}: {record.extent} elements in a file of {size} bytes, "
                f"above {MAX_EXPANSION} a byte"
            )
    if (total := sum(record.extent for record in records)) > MAX_EXPANSION * size:
        raise CorruptArtifactError(
            f"all tensors: {total} elements in a file of {size} bytes, above {MAX_EXPANSION} a byte"
        )
    return records


def _record(row: object) -> TensorRecord:
    known = row.keys() & _KEYS.keys() if isinstance(row, dict) else set()
    extra = (key for key in row if key not in known) if isinstance(row, dict) else ()
    if not isinstance(row, dict) or not {"n", "s", "d"} <= known or not all(map(optional, extra)):
        raise CorruptArtifactError(f"the header holds no tensor: {str(row)[:80]!r}")
    values = {_KEYS[key]: _typed(key, row[key]) for key in known}
    return TensorRecord(**values)


def optional(key: str) -> bool:
    """Whether a reader that does not know a header's key may pass over it.

    >>> optional("x-author"), optional("s")
    (True, False)
    """
    return key.startswith("x-")


def _typed(key: str, value: object) -> Any:
    if key in "sq":
        whole = isinstance(value, list) and all(_is_integer(item) for item in value)
        if isinstance(value, list) and whole and len(value) <= 64:
            return tuple(value)
    elif _is_integer(value) if key in "alez" else type(value) is str:
        return value
    raise CorruptArtifactError(f"the header's {_KEYS[key]} is {str(value)[:80]!r}")


def _is_integer(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _fault(record: TensorRecord, by_name: dict[str, TensorRecord]) -> str | None:
    """What is wrong with a record whose fields have the right types."""
    if record.dtype not in DTYPES or record.storage not in DTYPES:
        return f"unknown dtype {record.dtype!r} or {record.stored!r}"
    if record.stored and not (_is_float(record.dtype) and _is_float(record.stored)):
        return f"{record.dtype} cannot be stored as {record.stored}"
    if record.zeros > record.elements:
        return f"{record.zeros} zeros among {record.elements} elements"
    if (fault := _grid_fault(record)) is not None:
        return fault
    if record.kind == "tied":
        return _tied_fault(record, by_name.get(record.tied))
    if record.kind not in _CHECKS or record.tied:
        return f"unknown kind {record.kind!r}, or tied to {record.tied!r}"
    return None if _CHECKS[record.kind](record) else f"its fields do not fit kind {record.kind!r}"


def _is_float(name: str) -> bool:
    return DTYPES[name].is_floating_point


def _grid_fault(record: TensorRecord) -> str | None:
    if not record.grid:
        return None
    if not 1 <= len(record.grid) <= 3 or not _is_float(record.dtype) or record.stored:
        return f"grid {record.grid} of a {record.dtype} tensor"
    if len(record.grid) == 1:
        fits = 2 <= record.grid[0] <= MAX_CODEBOOK
        return None if fits else f"a codebook of {record.grid[0]} centres"
    if not MIN_BITS <= record.grid[0] <= MAX_BITS or record.grid[1] > 1:
        return f"grid {record.grid}"
    if record.axis is not None and record.axis >= len(record.shape):
        return f"grid along axis {record.axis} of {len(record.shape)}"
    return None


def _has_symbols(record: TensorRecord) -> bool:
    return record.codec in CODECS and record.entropy_bytes <= 2 * record.words


def _check_grid(record: TensorRecord) -> bool:
    return bool(record.grid) and _has_symbols(record) and record.packing in PACKINGS


def _check_codebook(record: TensorRecord) -> bool:
    entries, rest = divmod(record.aux_bytes - 1, record.word)
    fits = not rest and 1 <= entries <= MAX_CODEBOOK and not record.grid
    return fits and _has_symbols(record) and not record.packing


def _check_mask(record: TensorRecord) -> bool:
    return _has_symbols(record) and record.packing in PACKINGS and not record.grid


def _check_plain(record: TensorRecord) -> bool:
    coded = record.codec or record.symbol_bytes or record.entropy_bytes
    return not coded and record.packing in PACKINGS and not record.grid


_CHECKS = {
    "grid": _check_grid,
    "codebook": _check_codebook,
    "mask": _check_mask,
    "plain": _check_plain,
}


def _tied_fault(record: TensorRecord, target: TensorRecord | None) -> str | None:
    if target is None or target.kind == "tied":
        return f"tied to {record.tied!r}, which is no stored tensor"
    if (record.shape, record.dtype) != (target.shape, target.dtype):
        return f"tied to {record.tied!r}, which is {target.dtype} {target.shape}"
    if record.grid not in ((), target.grid) or record.payload_bytes or record.codec:
        return "a tied tensor with a payload or grid of its own"
    return None
