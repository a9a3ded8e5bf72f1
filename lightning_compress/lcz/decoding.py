"""Decoder of payloads into bit patterns or integer levels, with NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import context
from lightning_compress.lcz.bits import ByteReader, map_in_chunks
from lightning_compress.lcz.codecs import decode_symbols
from lightning_compress.lcz.floats import cast_words, narrowed
from lightning_compress.lcz.header import MAX_BITS, MAX_CODEBOOK, MIN_BITS, TensorRecord
from lightning_compress.lcz.raw_bits import DTYPES, Patterns, unpack_memory, unpack_patterns

__all__ = [
    "MASK_NEGATIVE_ZERO", "MASK_VALUE", "MASK_ZERO", "MAX_SYMBOLS", "MOST_HEAD_BYTES",
    "StoredGrid", "decode_array", "decode_levels", "decode_memory", "decode_words", "negative_zero",
]  # fmt: skip

# From -255 to 255: every zero point that 8 bits allow, and every index of 0 in a codebook.
MAX_SYMBOLS = 2 * (2**MAX_BITS - 1) + 1
# The symbols of a mask; multiplying by a mask leaves -0.0.
MASK_ZERO, MASK_VALUE, MASK_NEGATIVE_ZERO = 0, 1, 2
MOST_HEAD_BYTES = context.HEAD_BYTES  # of a stream of symbols
_NUMPY = {"float64": "f8", "float32": "f4", "float16": "f2", "complex64": "c8"}
_NUMPY |= {"complex128": "c16", "bool": "?"}


@dataclass(frozen=True)
class StoredGrid:
    """A quantization grid as the file holds it.

    Args:
        floats: (N,) float32 scales, or the centres of a codebook.
        zero_points: (N,) int32, one a scale; empty for a codebook.
        traits: (bits, symmetric), (bits, symmetric, axis), or of a codebook (centres,).
    """

    floats: NDArray[np.float32]
    zero_points: NDArray[np.int32]
    traits: tuple[int, ...]

    @property
    def is_codebook(self) -> bool:
        """Whether the floats are centres."""
        return len(self.traits) == 1

    @property
    def bits(self) -> int:
        """Bits of an integer level."""
        return (self.traits[0] - 1).bit_length() if self.is_codebook else self.traits[0]

    @property
    def axis(self) -> int | None:
        """The axis that the scales run along."""
        return self.traits[2] if len(self.traits) == 3 else None

    def fault(self, shape: tuple[int, ...]) -> str | None:
        """Why the file cannot hold this grid of a tensor of this shape; None: it can."""
        return _codebook_fault(self.floats) if self.is_codebook else self._affine_fault(shape)

    def _affine_fault(self, shape: tuple[int, ...]) -> str | None:
        bits, symmetric = self.traits[:2]
        if not MIN_BITS <= bits <= MAX_BITS:
            return f"a grid of {bits} bits"
        if self.axis is not None and not 0 <= self.axis < len(shape):
            return f"a grid along axis {self.axis} of {len(shape)}"
        count = 1 if self.axis is None else shape[self.axis]
        if len(self.floats) != count or len(self.zero_points) != count:
            return f"a grid of {len(self.floats)} scales where {count} belong"
        if not (np.isfinite(self.floats) & (self.floats > 0)).all():
            return "a grid with a scale that is not finite and above 0"
        high = 0 if symmetric else 2**bits - 1
        if not ((self.zero_points >= 0) & (self.zero_points <= high)).all():
            return "a grid with a zero point outside it"
        return None

    def limits(self, dims: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """The lowest and the highest integer level, along the grid's axis."""
        if self.is_codebook:
            low = np.array(-self._zero_index())
            return low, low + len(self.floats) - 1
        bits, symmetric = self.traits[:2]
        most = 2 ** (bits - 1) - 1
        zero = self._along_axis(self.zero_points, dims)
        return (-most - zero, most - zero) if symmetric else (-zero, 2**bits - 1 - zero)

    def values(self, levels: NDArray[np.integer]) -> NDArray[np.float32]:
        """The float32 values of integer levels."""
        if self.is_codebook:
            places = np.int16(self._zero_index())
            values = map_in_chunks(
                lambda piece: self.floats[piece + places], levels.reshape(-1), np.float32
            )
            return values.reshape(levels.shape)
        scales = self._along_axis(self.floats, levels.ndim)
        with np.errstate(over="ignore"):  # the dtype: NumPy casts in small pieces
            return np.multiply(levels, scales, dtype=np.float32)

    def _zero_index(self) -> int:
        return int(np.flatnonzero(self.floats == 0)[0])

    def _along_axis(self, values: NDArray, dims: int) -> NDArray:
        if self.axis is None:
            return values.reshape(())
        shape = [1] * dims
        shape[self.axis] = -1
        return values.reshape(shape)


def _codebook_fault(centres: NDArray[np.float32]) -> str | None:
    if not 2 <= len(centres) <= MAX_CODEBOOK:
        return f"a codebook of {len(centres)} centres"
    if not (np.isfinite(centres).all() and (centres[1:] > centres[:-1]).all()):
        return "centres that are not finite or do not rise"
    if not (centres.view(np.uint32) == 0).any():
        return "centres without 0"
    return None


def decode_array(record: TensorRecord, payload: bytes) -> NDArray:
    """The values of a record, in its shape: float dtypes unknown to NumPy as their bit patterns.

    Raises:
        CorruptArtifactError: naming the tensor, when the payload does not fit its record.
    """
    words, _ = decode_words(record, payload)
    kind = _NUMPY.get(record.dtype, record.dtype if "int" in record.dtype else None)
    return (words if kind is None else words.view(np.dtype(kind))).reshape(record.shape)


def decode_words(record: TensorRecord, payload: bytes) -> tuple[Patterns, StoredGrid | None]:
    """The (N,) patterns of a record in its dtype, and its grid if it has one.

    Raises:
        CorruptArtifactError: naming the tensor, when the payload does not fit its record.
    """
    if record.kind == "grid":
        levels, grid = decode_levels(record, payload)
        return narrowed(grid.values(levels).reshape(-1), record.dtype), grid
    return cast_words(_decode_patterns(record, payload), record.storage, record.dtype), None


def decode_memory(record: TensorRecord, head: bytes) -> int:
    """Upper bound of the working memory to decode a tensor, beside its own, in bytes.

    Symbols, levels and patterns of the whole tensor; all else is worked on in pieces.

    Args:
        record: of the tensor.
        head: the first `MOST_HEAD_BYTES` of its symbols.

    Raises:
        CorruptArtifactError: naming the tensor, when the head does not fit its record.
    """
    work = (8 + 2 * DTYPES[record.storage].itemsize) * record.extent
    work += unpack_memory(record.packing, record.extent)
    if record.codec != "context":
        return work
    try:
        return work + context.decode_memory(head, record.code_shape)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"tensor {record.name!r}: {error}") from None


def _decode_patterns(record: TensorRecord, payload: bytes) -> Patterns:
    """The (N,) patterns of a record without a grid, in the dtype that they are stored in."""
    aux, data = payload[: record.aux_bytes], payload[record.aux_bytes :]
    try:
        bits = _DECODERS[record.kind](record, aux, data)
        if record.dtype == "bool" and bits.max(initial=0) > 1:
            raise CorruptArtifactError(f"a bool of {bits.max()}")
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"tensor {record.name!r}: {error}") from None
    return bits


def decode_levels(record: TensorRecord, payload: bytes) -> tuple[NDArray[np.int16], StoredGrid]:
    """The integer levels of a record with a grid, in its shape, and the grid.

    Raises:
        CorruptArtifactError: naming the tensor, when the payload does not fit its record.
    """
    aux, data = payload[: record.aux_bytes], payload[record.aux_bytes :]
    try:
        grid = _read_grid(record, aux)
        levels = _decode_signed(record, data, record.shape, MAX_SYMBOLS).reshape(record.shape)
        low, high = grid.limits(levels.ndim)
        across = {
            "axis": tuple(axis for axis in range(levels.ndim) if axis != grid.axis),
            "keepdims": True,
            "initial": 0,  # which every grid holds
        }
        if not ((levels.min(**across) >= low) & (levels.max(**across) <= high)).all():
            raise CorruptArtifactError(f"a symbol outside its grid of {grid.bits} bits")
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"tensor {record.name!r}: {error}") from None
    return levels, grid


def _decode_signed(
    record: TensorRecord, data: bytes, shape: tuple[int, ...], limit: int
) -> NDArray[np.int16]:
    """(N,) the levels of a record's symbols."""
    symbols = decode_symbols(record.codec, data, shape, limit=limit)
    return map_in_chunks(_signed_levels, symbols, np.int16)


def _signed_levels(symbols: NDArray[np.uint16]) -> NDArray[np.int16]:
    """0, -1, 1, -2, 2 ... for symbols 0, 1, 2, 3, 4 ...; there are no more than 512."""
    half = (symbols.astype(np.int16) + 1) >> 1
    return np.where(symbols & 1, -half, half)


def _read_grid(record: TensorRecord, data: bytes) -> StoredGrid:
    """The grid in front of the symbols.

    Raises:
        CorruptArtifactError: for scales that are not finite and positive, centres that do not rise
            or lack 0, or zero points outside the grid.
    """
    reader, count = ByteReader(data), record.grid_values
    signed = len(record.grid) == 1 or bool(record.grid[1])
    zeros = b"" if signed else reader.take(count, "the zero points of a grid")
    floats = unpack_patterns(record.packing, reader.rest(), count, 4).view("<f4")
    points = np.zeros(0 if len(record.grid) == 1 else count, np.int32)
    if not signed:
        points = np.frombuffer(zeros, np.uint8).astype(np.int32)
    grid = StoredGrid(floats, points, record.grid)
    if (fault := grid.fault(record.shape)) is not None:
        raise CorruptArtifactError(fault)
    return grid


def _decode_plain(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:  # noqa: ARG001
    return unpack_patterns(record.packing, aux, record.words, record.word)


def _decode_codebook(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:
    book = np.frombuffer(aux[1:], f"<u{record.word}")
    places = _decode_signed(record, data, record.code_shape, 2 * MAX_CODEBOOK)
    places += aux[0]
    if len(places) and not (places.min() >= 0 and places.max() < len(book)):
        raise CorruptArtifactError(f"a symbol outside its codebook of {len(book)}")
    return map_in_chunks(book.take, places, book.dtype)


def _decode_mask(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:
    symbols = decode_symbols(record.codec, data, record.code_shape, limit=MASK_NEGATIVE_ZERO + 1)
    bits = np.zeros(record.words, f"<u{record.word}")
    bits[symbols == MASK_NEGATIVE_ZERO] = negative_zero(record.word)
    kept = symbols == MASK_VALUE
    bits[kept] = unpack_patterns(record.packing, aux, int(kept.sum()), record.word)
    return bits


def negative_zero(size: int) -> int:
    """The pattern of -0.0 in a word of so many bytes."""
    return 1 << 8 * size - 1


_DECODERS = {"plain": _decode_plain, "codebook": _decode_codebook, "mask": _decode_mask}
