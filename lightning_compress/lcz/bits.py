"""Bit and byte streams: variable-length codes, fixed-width fields, bounded reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError

__all__ = [
    "ByteReader",
    "append_codes",
    "chunks",
    "count_values",
    "map_in_chunks",
    "pack_fixed",
    "unpack_fixed",
    "varint",
]
Ints = NDArray[np.int64]


def varint(value: int) -> bytes:
    """An integer as little-endian groups of seven bits (LEB128).

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class ByteReader:
    """Sequential reader of bytes that never reads past their end.

    >>> reader = ByteReader(varint(300) + b"rest")
    >>> reader.varint(limit=1000, what="count"), reader.rest()
    (300, b'rest')
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes.

        Raises:
            CorruptArtifactError: when fewer are left.
        """
        left = len(self._data) - self._at
        if length > left:
            raise CorruptArtifactError(f"{what} needs {length} bytes where {left} are left")
        self._at += length
        return self._data[self._at - length : self._at]

    def varint(self, *, limit: int, what: str) -> int:
        """The next `varint`.

        Raises:
            CorruptArtifactError: when it is above `limit`, too long, or cut off.
        """
        value = 0
        for shift in range(0, 64, 7):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            raise CorruptArtifactError(f"{what} is longer than 64 bits")
        if value > limit:
            raise CorruptArtifactError(f"{what} is {value}, above the possible {limit}")
        return value

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(len(self._data) - self._at, "the rest")


def append_codes(words: Ints, offset: int, codes: Ints, sizes: Ints) -> int:
    """Append codes to a zeroed bit stream, most significant bit first.

    Args:
        words: the stream in 64-bit words, with one word of slack; changed in place.
        offset: the bit at which the first code starts.
        codes: (N,) codes, N > 0.
        sizes: (N,) their sizes, 1 to 32 bits each.

    Returns:
        The bit after the last code.

    >>> words = np.zeros(2, np.int64)
    >>> append_codes(words, 0, np.array([1, 2]), np.array([1, 3]))
    4
    >>> words.astype(">i8").tobytes()[0] == 0b1010_0000
    True
    """
    ends = np.cumsum(sizes) + offset
    starts = ends - sizes
    word = starts >> 6
    room = 64 - (starts & 63) - sizes  # bits left in the word after the code; < 0: it spills over
    shifted = codes << np.maximum(room, 0)
    spill = np.flatnonzero(room < 0)
    over = -room[spill]
    shifted[spill] = codes[spill] >> over
    words[word[spill] + 1] |= codes[spill] << (64 - over)  # one spill a word at most
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] |= np.bitwise_or.reduceat(shifted, first)
    return int(ends[-1])


def pack_fixed(values: NDArray[np.uint16], width: int) -> bytes:
    """Integers in `width` bits each, highest bit first; the last byte is filled with zeros.

    >>> pack_fixed(np.array([1, 2, 3], np.uint16), 2).hex()
    '6c'
    """
    if width == 0:
        return b""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint16)
    return np.packbits((values[:, None] >> shifts & 1).astype(np.uint8)).tobytes()


def unpack_fixed(data: bytes, width: int, count: int) -> NDArray[np.uint16]:
    """The opposite of `pack_fixed`.

    Raises:
        CorruptArtifactError: when the length does not fit, or the padding is not zero.

    >>> unpack_fixed(bytes.fromhex("6c"), 2, 3)
    array([1, 2, 3], dtype=uint16)
    """
    used = width * count
    if len(data) != -(-used // 8):
        raise CorruptArtifactError(f"{len(data)} bytes do not hold {count} fields of {width} bits")
    packed, values = np.frombuffer(data, np.uint8), np.zeros(count, np.uint16)
    for piece in chunks(count):  # each but the first begins at a byte too: 8 divides `CHUNK`
        bits = np.unpackbits(packed[piece.start * width // 8 : -(-piece.stop * width // 8)])
        used = (piece.stop - piece.start) * width
        if bits[used:].any():
            raise CorruptArtifactError("the bits after the last field are not zero")
        part = values[piece]
        for place in range(width):
            part <<= np.uint16(1)
            part |= bits[place:used:width]
    return values


Scalar = TypeVar("Scalar", bound=np.generic)
CHUNK = 1 << 18  # elements of a chunk: 2 MB of 64-bit numbers


def count_values(values: NDArray[np.integer], size: int = 0) -> NDArray[np.intp]:
    """Number of occurrences of each value in (N,) values, as `np.bincount`.

    >>> count_values(np.array([2, 0, 2], np.uint8))
    array([1, 0, 2])
    """
    size = max(size, int(values.max()) + 1 if len(values) else 0)
    counts = np.zeros(size, np.intp)
    for piece in chunks(len(values)):
        counts += np.bincount(values[piece], minlength=size)
    return counts


def map_in_chunks(
    function: Callable[[NDArray[Any]], NDArray[Any]],
    values: NDArray[Any],
    dtype: type[Scalar] | np.dtype[Scalar],
) -> NDArray[Scalar]:
    """Elementwise `function` of (N,) values, in chunks of bounded memory.

    >>> map_in_chunks(np.square, np.array([1, 2, 3]), np.int32)
    array([1, 4, 9], dtype=int32)
    """
    out = np.empty(len(values), dtype)
    for piece in chunks(len(values)):
        out[piece] = function(values[piece])
    return out


def chunks(count: int) -> Iterator[slice]:
    """Slices of `CHUNK` elements each, the last one shorter, of `count` elements.

    >>> list(chunks(CHUNK + 1))
    [slice(0, 262144, None), slice(262144, 262145, None)]
    """
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
