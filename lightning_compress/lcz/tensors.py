"""One tensor to a record and a payload, in the smallest of a few lossless forms, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.grids import MAX_BITS, MIN_BITS, AffineGrid, CodebookGrid
from lightning_compress.lcz.bits import ByteReader, by_piece, tally
from lightning_compress.lcz.codecs import decode_symbols, encode_symbols, entropy_bits
from lightning_compress.lcz.header import MAX_CODEBOOK, TensorRecord
from lightning_compress.lcz.raw_bits import (
    DTYPES,
    Patterns,
    from_patterns,
    pack_patterns,
    patterns,
    unpack_patterns,
)
from lightning_compress.state import Grid

__all__ = [
    "MAX_SYMBOLS",
    "decode_tensor",
    "encode_on_grid",
    "encode_values",
    "from_symbols",
    "grid_fault",
    "grid_symbols",
    "grid_traits",
    "pack_grid",
    "same_grid",
    "unpack_grid",
]

# From -255 to 255: every zero point that 8 bits allow, and every place of 0 in a codebook.
MAX_SYMBOLS = 2 * (2**MAX_BITS - 1) + 1


def grid_symbols(tensor: Tensor, grid: Grid) -> NDArray[np.uint16] | None:
    """(N,) symbols 0, 1, 2, 3, 4 ... for -0-, -1, +1, -2, +2 ... steps from zero.

    Returns:
        None where the grid cannot be stored or does not give back the tensor bit for bit.
    """
    if not tensor.is_floating_point() or grid_fault(grid, tuple(tensor.shape)):
        return None
    steps = grid.quantize(tensor)
    back = grid.dequantize(steps, tensor.dtype)
    if not np.array_equal(patterns(back), patterns(tensor)):
        return None
    whole = steps.cpu().reshape(-1).numpy()
    return (2 * np.abs(whole) - (whole < 0)).astype(np.uint16)


def from_symbols(symbols: NDArray[np.uint16], grid: Grid, record: TensorRecord) -> Tensor:
    """The steps from zero, int32 in the record's shape, that `grid_symbols` turned into symbols.

    Raises:
        CorruptArtifactError: for a symbol outside the grid.
    """
    half = (symbols.astype(np.int32) + 1) >> 1
    steps = torch.from_numpy(np.where(symbols & 1, -half, half)).reshape(record.shape)
    low, high = _range(grid, len(record.shape))
    if not ((steps >= low) & (steps <= high)).all():
        raise CorruptArtifactError(f"a symbol outside its grid of {grid.bits} bits")
    return steps


def _range(grid: Grid, dims: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest step, along the grid's axis."""
    if isinstance(grid, CodebookGrid):
        low = torch.tensor(-grid.zero_index)
        return low, low + grid.centres.numel() - 1
    along = [1] * dims
    if grid.axis is not None:
        along[grid.axis] = -1
    zero = grid.zero_point.reshape(along)
    return grid.qmin - zero, grid.qmax - zero


def grid_traits(grid: Grid) -> tuple[int, ...]:
    """What the header says of a grid: (centres,), (bits, symmetric) or (bits, symmetric, axis)."""
    if isinstance(grid, CodebookGrid):
        return (grid.centres.numel(),)
    return grid.bits, int(grid.symmetric), *(() if grid.axis is None else (grid.axis,))


def pack_grid(grid: Grid) -> tuple[str, bytes]:
    """The packing of the floats; zero points as bytes if there are any, then scales or centres."""
    if isinstance(grid, CodebookGrid):
        return pack_patterns(patterns(grid.centres))
    packing, scales = pack_patterns(patterns(grid.scale))
    zeros = b"" if grid.symmetric else grid.zero_point.cpu().numpy().astype(np.uint8).tobytes()
    return packing, zeros + scales


def unpack_grid(data: bytes, record: TensorRecord) -> Grid:
    """The grid that `pack_grid` wrote.

    Raises:
        CorruptArtifactError: for scales that are not finite and positive, centres that do not rise
            or lack 0, or zero points off the grid.
    """
    reader, count = ByteReader(data), record.grid_values
    signed = len(record.grid) == 1 or bool(record.grid[1])
    zeros = b"" if signed else reader.take(count, "the zero points of a grid")
    bits = unpack_patterns(record.packing, reader.rest(), count, 4)
    floats = from_patterns(bits, torch.float32, (count,))
    if len(record.grid) == 1:
        grid: Grid = CodebookGrid(floats)
    else:
        zero_point = torch.zeros(count, dtype=torch.int32)
        if not signed:
            zero_point = torch.from_numpy(np.frombuffer(zeros, np.uint8).astype(np.int32))
        grid = AffineGrid(floats, zero_point, record.grid[0], signed, record.axis)
    if (fault := grid_fault(grid, record.shape)) is not None:
        raise CorruptArtifactError(fault)
    return grid


def same_grid(one: Grid | None, other: Grid | None) -> bool:
    """Whether two grids hold the same values."""
    if one is None or other is None:
        return one is other
    return grid_traits(one) == grid_traits(other) and pack_grid(one) == pack_grid(other)


def grid_fault(grid: Grid, shape: tuple[int, ...]) -> str | None:
    """Why a grid of a tensor of this shape cannot stand in the file; None: it can."""
    if isinstance(grid, CodebookGrid):
        return _codebook_fault(grid.centres)
    scale, zero = grid.scale, grid.zero_point
    if not MIN_BITS <= grid.bits <= MAX_BITS:
        return f"a grid of {grid.bits} bits"
    if grid.axis is not None and not 0 <= grid.axis < len(shape):
        return f"a grid along axis {grid.axis} of {len(shape)}"
    count = 1 if grid.axis is None else shape[grid.axis]
    if scale.dtype != torch.float32 or tuple(scale.shape) != (count,) or zero.shape != scale.shape:
        return f"a grid of {scale.dtype} {tuple(scale.shape)} where {count} scales belong"
    if not (torch.isfinite(scale) & (scale > 0)).all():
        return "a grid with a scale that is not finite and above 0"
    low, high = (0, 0) if grid.symmetric else (grid.qmin, grid.qmax)
    if not ((zero >= low) & (zero <= high)).all():
        return "a grid with a zero point outside it"
    return None


def _codebook_fault(centres: Tensor) -> str | None:
    if centres.dtype != torch.float32 or centres.dim() != 1:
        return f"centres of {centres.dtype} {tuple(centres.shape)}"
    if not 2 <= len(centres) <= MAX_CODEBOOK:
        return f"a codebook of {len(centres)} centres"
    if not (torch.isfinite(centres).all() and (centres[1:] > centres[:-1]).all()):
        return "centres that are not finite or do not rise"
    if not (patterns(centres) == 0).any():
        return "centres without 0"
    return None


Shape = tuple[int, ...]
_ZERO, _VALUE, _MINUS_ZERO = 0, 1, 2  # the symbols of a mask; multiplying by a mask leaves -0.0
_SLOW = ("auto", "context")  # who asks for these gets slowly coded values too
_DENSE = 0.99  # with more values than this, a mask gains too little for the time it takes
_SAMPLE = 4096  # with more distinct values than a codebook holds here, no need to look further


@dataclass(frozen=True)
class _Form:
    """One way to store a tensor: the record's fields, and the payload's two parts."""

    kind: str
    aux: bytes
    symbols: bytes = b""
    codec: str = ""
    packing: str = ""
    entropy_bytes: int = 0

    @property
    def size(self) -> int:
        return len(self.aux) + len(self.symbols)

    def finish(self, record: TensorRecord) -> tuple[TensorRecord, bytes]:
        filled = replace(
            record,
            kind=self.kind,
            codec=self.codec,
            packing=self.packing,
            aux_bytes=len(self.aux),
            symbol_bytes=len(self.symbols),
            entropy_bytes=self.entropy_bytes,
        )
        return filled, self.aux + self.symbols


def _coded(
    kind: str,
    aux: bytes,
    symbols: NDArray[np.integer],
    codec: str,
    shape: tuple[int, ...],
    packing: str = "",
) -> _Form:
    name, data = encode_symbols(symbols, codec, shape)
    return _Form(kind, aux, data, name, packing, math.ceil(entropy_bits(symbols) / 8))


def encode_on_grid(
    record: TensorRecord, tensor: Tensor, grid: Grid, codec: str
) -> tuple[TensorRecord, bytes] | None:
    """A tensor as symbols on its grid.

    Returns:
        The record filled in, and the payload; None where the grid does not give back the tensor.
    """
    if (symbols := grid_symbols(tensor, grid)) is None:
        return None
    record = replace(record, grid=grid_traits(grid))
    packing, values = pack_grid(grid)
    return _coded("grid", values, symbols, codec, record.shape, packing).finish(record)


def encode_values(record: TensorRecord, tensor: Tensor, codec: str) -> tuple[TensorRecord, bytes]:
    """A tensor bit by bit: the smallest of its plain values, a codebook, or a mask of zeros."""
    bits = patterns(tensor)
    shape = record.code_shape
    dtype = DTYPES[record.storage]
    others = [*_codebook(bits, codec, shape, dtype), *_mask(bits, codec, shape)]
    plain = _plain(bits, codec, min((form.size for form in others), default=None))
    return min([plain, *others], key=lambda form: form.size).finish(record)


def _plain(bits: Patterns, codec: str, most: int | None) -> _Form:
    packing, data = pack_patterns(bits, coded=codec in _SLOW, most=most)
    return _Form("plain", data, packing=packing)


def _order(book: Patterns, dtype: torch.dtype) -> NDArray[np.intp]:
    """Which of rising patterns comes when, from the lowest value to the highest."""
    if not dtype.is_signed:
        return np.arange(len(book))
    negative = book >= _minus_zero(book.itemsize)
    downwards = dtype.is_floating_point or dtype.is_complex  # else two's complement
    below = np.flatnonzero(negative)
    return np.concatenate([below[::-1] if downwards else below, np.flatnonzero(~negative)])


def _codebook(bits: Patterns, codec: str, shape: Shape, dtype: torch.dtype) -> Iterator[_Form]:
    if not len(bits) or len(np.unique(bits[:_SAMPLE])) > MAX_CODEBOOK:
        return
    book = np.unique(bits)
    if len(book) > MAX_CODEBOOK:
        return
    places = by_piece(partial(np.searchsorted, book), bits, np.uint8)
    order = _order(book, dtype)
    middle = int(np.argmax(((book == 0) * len(bits) + tally(places, len(book)))[order]))
    steps = np.argsort(order) - middle
    symbols = (2 * np.abs(steps) - (steps < 0)).astype(np.uint16)
    aux = bytes([middle]) + book[order].tobytes()
    yield _coded(
        "codebook", aux, by_piece(lambda piece: symbols[piece], places, np.uint16), codec, shape
    )


def _mask(bits: Patterns, codec: str, shape: Shape) -> Iterator[_Form]:
    symbols = np.full(len(bits), _VALUE, np.uint16)
    symbols[bits == 0] = _ZERO
    symbols[bits == _minus_zero(bits.itemsize)] = _MINUS_ZERO
    kept = symbols == _VALUE
    if len(bits) and kept.mean() < _DENSE:
        packing, values = pack_patterns(bits[kept], coded=codec in _SLOW)
        yield _coded("mask", values, symbols, codec, shape, packing)


def _minus_zero(size: int) -> int:
    return 1 << 8 * size - 1


def decode_tensor(record: TensorRecord, payload: bytes) -> tuple[Tensor, Grid | None]:
    """The tensor of a record, in the module's dtype, and its grid if it has one.

    Raises:
        CorruptArtifactError: naming the tensor, when the payload does not fit its record.
    """
    aux, data = payload[: record.aux_bytes], payload[record.aux_bytes :]
    try:
        if record.kind == "grid":
            return _decode_grid(record, aux, data)
        bits = _DECODERS[record.kind](record, aux, data)
        stored = from_patterns(bits, DTYPES[record.storage], record.shape)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"tensor {record.name!r}: {error}") from None
    return stored.to(DTYPES[record.dtype]), None


def _decode_grid(record: TensorRecord, aux: bytes, data: bytes) -> tuple[Tensor, Grid]:
    grid = unpack_grid(aux, record)
    symbols = decode_symbols(record.codec, data, record.shape, limit=MAX_SYMBOLS)
    steps = from_symbols(symbols, grid, record)
    return grid.dequantize(steps, DTYPES[record.dtype]), grid


def _decode_plain(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:  # noqa: ARG001
    return unpack_patterns(record.packing, aux, record.words, record.word)


def _decode_codebook(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:
    book = np.frombuffer(aux[1:], f"<u{record.word}")
    symbols = decode_symbols(record.codec, data, record.code_shape, limit=2 * MAX_CODEBOOK)
    half = (symbols.astype(np.int64) + 1) >> 1
    places = aux[0] + np.where(symbols & 1, -half, half)
    if len(places) and not (places.min() >= 0 and places.max() < len(book)):
        raise CorruptArtifactError(f"a symbol outside its codebook of {len(book)}")
    return book[places]


def _decode_mask(record: TensorRecord, aux: bytes, data: bytes) -> Patterns:
    symbols = decode_symbols(record.codec, data, record.code_shape, limit=_MINUS_ZERO + 1)
    bits = np.zeros(record.words, f"<u{record.word}")
    bits[symbols == _MINUS_ZERO] = _minus_zero(record.word)
    kept = symbols == _VALUE
    bits[kept] = unpack_patterns(record.packing, aux, int(kept.sum()), record.word)
    return bits


_DECODERS = {"plain": _decode_plain, "codebook": _decode_codebook, "mask": _decode_mask}
