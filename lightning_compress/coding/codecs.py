"""Symbol codecs by name: small whole numbers to bytes and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding import huffman
from lightning_compress.coding.bits import ByteReader, pack_fixed, unpack_fixed, varint
from lightning_compress.coding.code_lengths import MAX_ALPHABET
from lightning_compress.coding.run_length import join_runs, max_runs, split_runs
from lightning_compress.errors import CorruptArtifactError

__all__ = ["CODECS", "Codec", "check_codec", "decode_symbols", "encode_symbols", "entropy_bits"]

Symbols = NDArray[np.uint16]


@dataclass(frozen=True)
class Codec:
    """How (N,) symbols below `MAX_ALPHABET` become bytes, and come back given N."""

    encode: Callable[[Symbols], bytes]
    decode: Callable[[bytes, int], Symbols]


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
    runs = huffman.decode(coded, length)
    return join_runs(runs, huffman.decode(reader.rest(), kept) + np.uint16(1), count)


# Adding a coder is one row here. "auto" takes the smallest result, the earlier row when equal.
CODECS = {
    "huffman": Codec(huffman.encode, huffman.decode),
    "rle_huffman": Codec(_encode_runs, _decode_runs),
    "raw": Codec(_encode_raw, _decode_raw),
}


def check_codec(codec: str) -> None:
    """Refuses a name that is no codec.

    Raises:
        ValueError: naming the valid ones.
    """
    if codec not in ("auto", *CODECS):
        raise ValueError(f"codec={codec!r}: valid are {', '.join(map(repr, ('auto', *CODECS)))}")


def encode_symbols(symbols: NDArray[np.integer], codec: str = "auto") -> tuple[str, bytes]:
    """Bytes of (N,) symbols, and the name of the codec used.

    Args:
        symbols: whole numbers from 0 to `MAX_ALPHABET - 1`; 0 is taken as the common one.
        codec: a name in `CODECS`, or "auto" for the one with the smallest result.

    Raises:
        ValueError: for an unknown codec, or a symbol out of range.

    >>> name, data = encode_symbols(np.array([0] * 997 + [3, 1, 2]))
    >>> name, decode_symbols(name, data, 1000, limit=4)[-3:].tolist()
    ('rle_huffman', [3, 1, 2])
    """
    check_codec(codec)
    if len(symbols) and not (symbols.min() >= 0 and symbols.max() < MAX_ALPHABET):
        raise ValueError(f"symbols {symbols.min()} to {symbols.max()}, not 0 to {MAX_ALPHABET - 1}")
    narrow = symbols.astype(np.uint16, copy=False)
    names = tuple(CODECS) if codec == "auto" else (codec,)
    return min(((name, CODECS[name].encode(narrow)) for name in names), key=lambda x: len(x[1]))


def decode_symbols(codec: str, data: bytes, count: int, *, limit: int) -> Symbols:
    """The `count` symbols that `encode_symbols` made into `data`.

    Memory grows with `count`, whatever the data say: the caller bounds it.

    Raises:
        CorruptArtifactError: when the data are damaged, or hold a symbol of `limit` or above.
    """
    symbols = CODECS[codec].decode(data, count)
    if symbols.max(initial=0) >= limit:
        raise CorruptArtifactError(f"symbol {symbols.max()}, not below {limit}")
    return symbols


def entropy_bits(symbols: NDArray[np.integer]) -> float:
    """Zero-order entropy of (N,) symbols times N, in bits.

    >>> entropy_bits(np.array([0, 1, 2, 3]))
    8.0
    """
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(symbols) / counts)) if len(counts) else 0.0
