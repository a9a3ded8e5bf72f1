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

from lightning_compress.coding.codecs import decode_symbols, encode_symbols, entropy_bits
from lightning_compress.coding.grids import (
    MAX_SYMBOLS,
    from_symbols,
    grid_symbols,
    grid_traits,
    pack_grid,
    unpack_grid,
)
from lightning_compress.coding.pieces import by_piece, tally
from lightning_compress.coding.records import MAX_CODEBOOK, TensorRecord
from lightning_compress.coding.values import (
    DTYPES,
    Patterns,
    from_patterns,
    pack_patterns,
    patterns,
    unpack_patterns,
)
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.state import Grid

__all__ = ["decode_tensor", "encode_on_grid", "encode_values"]

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
