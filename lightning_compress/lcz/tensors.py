"""Encoder and decoder of one tensor: record and payload in the smallest lossless form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.lcz.bits import count_values, map_in_chunks
from lightning_compress.lcz.codecs import encode_symbols, entropy_bits
from lightning_compress.lcz.decoding import (
    MASK_NEGATIVE_ZERO,
    MASK_VALUE,
    MASK_ZERO,
    StoredGrid,
    decode_words,
    negative_zero,
)
from lightning_compress.lcz.header import MAX_CODEBOOK, TensorRecord
from lightning_compress.lcz.raw_bits import (
    DTYPES,
    Dtype,
    Patterns,
    from_patterns,
    pack_patterns,
    patterns,
)
from lightning_compress.state import Grid

__all__ = [
    "decode_tensor",
    "encode_on_grid",
    "encode_patterns",
    "encode_values",
    "from_stored",
    "grid_fault",
    "grid_symbols",
    "grid_traits",
    "pack_grid",
    "same_grid",
]


def grid_symbols(tensor: Tensor, grid: Grid) -> NDArray[np.uint16] | None:
    """(N,) symbols 0, 1, 2, 3, 4 ... for the levels 0, -1, +1, -2, +2 ...

    Returns:
        None where the grid cannot be stored or does not reproduce the tensor bit for bit.
    """
    if not tensor.is_floating_point() or grid_fault(grid, tuple(tensor.shape)):
        return None
    steps = grid.quantize(tensor)
    back = grid.dequantize(steps, tensor.dtype)
    if not np.array_equal(patterns(back), patterns(tensor)):
        return None
    whole = steps.cpu().reshape(-1).numpy()
    return (2 * np.abs(whole) - (whole < 0)).astype(np.uint16)


def grid_traits(grid: Grid) -> tuple[int, ...]:
    """Header fields of a grid: (centres,), (bits, symmetric) or (bits, symmetric, axis)."""
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


def from_stored(stored: StoredGrid) -> Grid:
    """The grid that `pack_grid` wrote, as tensors."""
    floats = torch.from_numpy(stored.floats)
    if stored.is_codebook:
        return CodebookGrid(floats)
    bits, symmetric = stored.traits[:2]
    zero_points = torch.from_numpy(stored.zero_points)
    return AffineGrid(floats, zero_points, bits, bool(symmetric), stored.axis)


def same_grid(one: Grid | None, other: Grid | None) -> bool:
    """Whether two grids hold the same values."""
    if one is None or other is None:
        return one is other
    return grid_traits(one) == grid_traits(other) and pack_grid(one) == pack_grid(other)


def grid_fault(grid: Grid, shape: tuple[int, ...]) -> str | None:
    """Why the file cannot hold this grid of a tensor of this shape; None: it can."""
    if isinstance(grid, CodebookGrid):
        floats, zeros = grid.centres, torch.zeros(0, dtype=torch.int32)
    else:
        floats, zeros = grid.scale, grid.zero_point
    if floats.dtype != torch.float32 or floats.dim() != 1 or zeros.dim() != 1:
        return f"a grid of {floats.dtype} {tuple(floats.shape)}"
    one, other = (part.detach().cpu().numpy() for part in (floats, zeros))
    return StoredGrid(one, other, grid_traits(grid)).fault(shape)


Shape = tuple[int, ...]
_CODES_VALUES = ("auto", "context")  # codecs that also code plain values, slowly
_MAX_DENSITY = 0.99  # with more values than this, a mask gains too little for the time it takes
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


def _symbol_form(
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
        The record filled in, and the payload; None where the grid does not reproduce the tensor.
    """
    if (symbols := grid_symbols(tensor, grid)) is None:
        return None
    record = replace(record, grid=grid_traits(grid))
    packing, values = pack_grid(grid)
    return _symbol_form("grid", values, symbols, codec, record.shape, packing).finish(record)


def encode_values(record: TensorRecord, tensor: Tensor, codec: str) -> tuple[TensorRecord, bytes]:
    """A tensor bit by bit: the smallest of its plain values, a codebook, or a mask of zeros."""
    return encode_patterns(record, patterns(tensor), codec)


def encode_patterns(record: TensorRecord, bits: Patterns, codec: str) -> tuple[TensorRecord, bytes]:
    """The same for the patterns of a tensor's elements, in the record's storage dtype."""
    shape = record.code_shape
    dtype = DTYPES[record.storage]
    others = [*_codebook(bits, codec, shape, dtype), *_mask(bits, codec, shape)]
    plain = _plain(bits, codec, min((form.size for form in others), default=None))
    return min([plain, *others], key=lambda form: form.size).finish(record)


def _plain(bits: Patterns, codec: str, most: int | None) -> _Form:
    packing, data = pack_patterns(bits, coded=codec in _CODES_VALUES, most=most)
    return _Form("plain", data, packing=packing)


def _value_order(book: Patterns, dtype: Dtype) -> NDArray[np.intp]:
    """Order of increasing patterns by value."""
    if not dtype.is_signed:
        return np.arange(len(book))
    negative = book >= negative_zero(book.itemsize)
    downwards = dtype.is_floating_point or dtype.is_complex  # else two's complement
    below = np.flatnonzero(negative)
    return np.concatenate([below[::-1] if downwards else below, np.flatnonzero(~negative)])


def _codebook(bits: Patterns, codec: str, shape: Shape, dtype: Dtype) -> Iterator[_Form]:
    if not len(bits) or len(np.unique(bits[:_SAMPLE])) > MAX_CODEBOOK:
        return
    book = np.unique(bits)
    if len(book) > MAX_CODEBOOK:
        return
    places = map_in_chunks(partial(np.searchsorted, book), bits, np.uint8)
    order = _value_order(book, dtype)
    middle = int(np.argmax(((book == 0) * len(bits) + count_values(places, len(book)))[order]))
    steps = np.argsort(order) - middle
    symbols = (2 * np.abs(steps) - (steps < 0)).astype(np.uint16)
    aux = bytes([middle]) + book[order].tobytes()
    yield _symbol_form(
        "codebook",
        aux,
        map_in_chunks(lambda chunk: symbols[chunk], places, np.uint16),
        codec,
        shape,
    )


def _mask(bits: Patterns, codec: str, shape: Shape) -> Iterator[_Form]:
    symbols = np.full(len(bits), MASK_VALUE, np.uint16)
    symbols[bits == 0] = MASK_ZERO
    symbols[bits == negative_zero(bits.itemsize)] = MASK_NEGATIVE_ZERO
    kept = symbols == MASK_VALUE
    if len(bits) and kept.mean() < _MAX_DENSITY:
        packing, values = pack_patterns(bits[kept], coded=codec in _CODES_VALUES)
        yield _symbol_form("mask", values, symbols, codec, shape, packing)


def decode_tensor(record: TensorRecord, payload: bytes) -> tuple[Tensor, Grid | None]:
    """The tensor of a record, in the module's dtype, and its grid if it has one.

    Raises:
        CorruptArtifactError: naming the tensor, when the payload does not fit its record.
    """
    words, grid = decode_words(record, payload)
    tensor = from_patterns(words, getattr(torch, record.dtype), record.shape)
    return tensor, None if grid is None else from_stored(grid)
