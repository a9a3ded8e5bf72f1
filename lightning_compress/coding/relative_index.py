"""Deep Compression's own layout (Han et al. 2016, arXiv:1510.00149, section 2), to compare with.

Each non-zero value is stored with its distance from the one before, in a fixed number of bits;
a zero is stored as a filler where the distance does not fit. Both streams are Huffman-coded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding import huffman
from lightning_compress.coding.bits import ByteReader, varint
from lightning_compress.errors import CorruptArtifactError

__all__ = ["decode", "encode"]

_WIDTHS = (5, 8)  # bits of a distance: the paper's for fully connected and convolutional layers

Symbols = NDArray[np.uint16]


def encode(symbols: Symbols) -> bytes:
    """The smaller of the streams with the paper's two widths.

    >>> decode(encode(np.array([0] * 40 + [3, 0], np.uint16)), 42)[39:]
    array([0, 3, 0], dtype=uint16)
    """
    return min((_encode(symbols, width) for width in _WIDTHS), key=len)


def _encode(symbols: Symbols, width: int) -> bytes:
    places = np.flatnonzero(symbols)
    if not len(places):
        return varint(0)
    distances = np.diff(places, prepend=-1)  # 1 to 2^width; stored less 1
    fillers, rest = np.divmod(distances - 1, 1 << width)
    last = np.cumsum(fillers + 1) - 1
    steps = np.full(last[-1] + 1, (1 << width) - 1, np.uint16)
    values = np.zeros(len(steps), np.uint16)
    steps[last], values[last] = rest, symbols[places]
    coded = huffman.encode(steps)
    head = varint(len(steps)) + bytes([width]) + varint(len(coded))
    return head + coded + huffman.encode(values)


def decode(data: bytes, count: int) -> Symbols:
    """The `count` symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the streams are damaged or lead past the end.
    """
    reader = ByteReader(data)
    out = np.zeros(count, np.uint16)
    length = reader.varint(limit=count, what="the count of distances")
    if length == 0:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of a relative-index stream")
        return out
    width = reader.take(1, "the width of distances")[0]
    if width not in _WIDTHS:
        raise CorruptArtifactError(f"distances of {width} bits")
    coded = reader.take(reader.varint(limit=len(data), what="a stream's length"), "distances")
    steps, values = huffman.decode_together([(coded, length), (reader.rest(), length)])
    places = np.cumsum(steps.astype(np.int64) + 1) - 1
    if steps.max() >> width or places[-1] >= count:
        raise CorruptArtifactError(f"a distance leads past the end at {count}")
    out[places] = values
    return out
