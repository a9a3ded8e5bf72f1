"""Symbol codecs by name: small whole numbers to bytes and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding import arithmetic, context, huffman, relative_index
from lightning_compress.coding.bits import ByteReader, pack_fixed, unpack_fixed, varint
from lightning_compress.coding.code_lengths import MAX_ALPHABET
from lightning_compress.coding.pieces import tally
from lightning_compress.coding.run_length import join_runs, max_runs, split_runs
from lightning_compress.errors import CorruptArtifactError

__all__ = [
    "CHOICES", "CODECS", "Codec", "check_codec", "decode_symbols", "encode_symbols", "entropy_bits",
]  # fmt: skip

Symbols = NDArray[np.uint16]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """How N symbols below `MAX_ALPHABET` of a tensor become bytes, and come back given its shape.

    Args:
        encode: (N,) symbols and the shape to bytes.
        decode: bytes and the shape to symbols.
        fast: the number of symbols from which it takes in 10 million a second and gives back 25, on
            one thread; None: it never does.
        compared: only there to compare with; never chosen.
    """

    encode: Callable[[Symbols, Shape], bytes]
    decode: Callable[[bytes, Shape], Symbols]
    fast: int | None = None
    compared: bool = False


def _flat(
    encode: Callable[[Symbols], bytes],
    decode: Callable[[bytes, int], Symbols],
    *,
    fast: int | None = None,
    compared: bool = False,
) -> Codec:
    """A codec that does not look at the shape."""
    return Codec(
        lambda symbols, _: encode(symbols),
        lambda data, shape: decode(data, math.prod(shape)),
        fast,
        compared,
    )


def _encode_raw(symbols: Symbols) -> bytes:
    width = int(symbols.max(initial=0)).bit_length()
    return bytes([width]) + pack_fixed(symbols, width)


def _decode_raw(data: bytes, count: int) -> Symbols:
    reader = ByteReader(data)
    width = reader.varint(limit=(MAX_ALPHABET - 1).bit_length(), what="the width of raw symbols")
    return unpack_fixed(reader.rest(), width, count)


def _encode_runs(symbols: Symbols) -> bytes:
    runs, values = split_runs(symbols)
    if not len(values):
        return varint(0)
    coded = huffman.encode(runs)
    head = varint(len(values)) + varint(len(runs)) + varint(len(coded))
    return head + coded + huffman.encode(values - 1)


def _decode_runs(data: bytes, count: int) -> Symbols:
    reader = ByteReader(data)
    kept = reader.varint(limit=count, what="the count of non-zero symbols")
    if kept == 0:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of a run-length stream")
        return np.zeros(count, np.uint16)
    length = reader.varint(limit=max_runs(kept, count), what="the count of zero runs")
    coded = reader.take(reader.varint(limit=len(data), what="a stream's length"), "zero runs")
    runs, values = huffman.decode_together([(coded, length), (reader.rest(), kept)])
    return join_runs(runs, values + np.uint16(1), count)


# Adding a coder is one row here; the earlier row is taken when sizes are equal.
CODECS = {
    "raw": _flat(_encode_raw, _decode_raw, fast=0),
    "arithmetic": _flat(arithmetic.encode, arithmetic.decode, fast=0),
    "rle_huffman": _flat(_encode_runs, _decode_runs, fast=1 << 18),
    "huffman": _flat(huffman.encode, huffman.decode),
    "context": Codec(context.encode, context.decode),
    "relative_index": _flat(relative_index.encode, relative_index.decode, compared=True),
}
# What may be asked for by name, and from which codecs the smallest result is then taken.
CHOICES = {
    "auto": tuple(name for name, codec in CODECS.items() if not codec.compared),
    "fast": tuple(name for name, codec in CODECS.items() if codec.fast is not None),
    **{name: (name,) for name in CODECS},
}


def check_codec(codec: str) -> None:
    """Refuses a name that is no codec.

    Raises:
        ValueError: naming the valid ones.
    """
    if codec not in CHOICES:
        raise ValueError(f"codec={codec!r}: valid are {', '.join(map(repr, CHOICES))}")


def encode_symbols(
    symbols: NDArray[np.integer], codec: str = "auto", shape: Shape | None = None
) -> tuple[str, bytes]:
    """Bytes of (N,) symbols, and the name of the codec used.

    Args:
        symbols: whole numbers from 0 to `MAX_ALPHABET - 1`; 0 is taken as the common one.
        codec: a name in `CHOICES`; "auto" gives the smallest result, "fast" the smallest of those
            codecs that are fast for so many.
        shape: of the tensor that the symbols make up, in its order; None: one axis.

    Raises:
        ValueError: for an unknown codec, or a symbol out of range.

    >>> name, data = encode_symbols(np.array([0] * 997 + [3, 1, 2]))
    >>> decode_symbols(name, data, (1000,), limit=4)[-3:].tolist()
    [3, 1, 2]
    """
    check_codec(codec)
    if len(symbols) and not (symbols.min() >= 0 and symbols.max() < MAX_ALPHABET):
        raise ValueError(f"symbols {symbols.min()} to {symbols.max()}, not 0 to {MAX_ALPHABET - 1}")
    narrow = symbols.astype(np.uint16, copy=False)
    shape = (len(symbols),) if shape is None else shape
    names = CHOICES[codec]
    if codec == "fast":
        names = [name for name in names if len(narrow) >= (CODECS[name].fast or 0)]
    results = ((name, CODECS[name].encode(narrow, shape)) for name in names)
    return min(results, key=lambda result: len(result[1]))


def decode_symbols(codec: str, data: bytes, shape: Shape, *, limit: int) -> Symbols:
    """The symbols of a tensor of this shape that `encode_symbols` made into `data`.

    Memory grows with the shape, whatever the data say: the caller bounds it.

    Raises:
        CorruptArtifactError: when the data are damaged, or hold a symbol of `limit` or above.
    """
    symbols = CODECS[codec].decode(data, shape)
    if symbols.max(initial=0) >= limit:
        raise CorruptArtifactError(f"symbol {symbols.max()}, not below {limit}")
    return symbols


def entropy_bits(symbols: NDArray[np.integer]) -> float:
    """Zero-order entropy of (N,) symbols times N, in bits.

    >>> entropy_bits(np.array([0, 1, 2, 3]))
    8.0
    """
    counts = tally(symbols)
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(symbols) / counts)) if len(counts) else 0.0
