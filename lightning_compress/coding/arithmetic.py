"""Arithmetic coding with one table of frequencies a tensor: fast, and as small as the entropy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.bits import ByteReader, varint
from lightning_compress.coding.code_lengths import MAX_ALPHABET
from lightning_compress.coding.pieces import tally
from lightning_compress.coding.range_coder import decode_static, encode_static
from lightning_compress.errors import CorruptArtifactError

__all__ = ["decode", "encode"]

_TOTAL = 1 << 16  # what the frequencies of a table add up to

Symbols = NDArray[np.uint16]


def encode(symbols: Symbols) -> bytes:
    """The size of the alphabet and the frequencies, then the range-coded symbols.

    >>> decode(encode(np.array([3, 3, 0], np.uint16)), 3)
    array([3, 3, 0], dtype=uint16)
    """
    if not len(symbols):
        return b""
    counts = tally(symbols)
    frequencies = _frequencies(counts)
    table = b"".join(varint(frequency) for frequency in frequencies.tolist())
    head = varint(len(counts)) + table
    return head if frequencies.max() == _TOTAL else head + encode_static(symbols, frequencies)


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shares of `_TOTAL`, 1 or more for every symbol that occurs; rounding falls to the largest."""
    shares = np.maximum(counts * _TOTAL // counts.sum(), counts > 0)
    while (excess := int(shares.sum()) - _TOTAL) > 0:  # many symbols of share 1
        largest = int(shares.argmax())
        shares[largest] -= min(excess, max(int(shares[largest]) // 2, 1))
    shares[shares.argmax()] -= excess
    return shares


def decode(data: bytes, count: int) -> Symbols:
    """The `count` symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the table or the stream is damaged.
    """
    if count == 0:
        if data:
            raise CorruptArtifactError("bytes after the end of an arithmetic stream")
        return np.zeros(0, np.uint16)
    reader = ByteReader(data)
    size = reader.varint(limit=MAX_ALPHABET, what="the alphabet of an arithmetic code")
    table = [reader.varint(limit=_TOTAL, what="a frequency") for _ in range(size)]
    if sum(table) != _TOTAL or not table[-1]:
        raise CorruptArtifactError(f"frequencies add up to {sum(table)}, not {_TOTAL}")
    if table[-1] == _TOTAL:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of an arithmetic stream")
        return np.full(count, size - 1, np.uint16)
    return decode_static(reader.rest(), np.array(table), count)
