"""The inner loops of Huffman decoding: many blocks in lockstep, and the last block by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError

__all__ = ["BLOCK", "decode_lanes", "decode_tail"]

BLOCK = 1024  # symbols a block; its bit length costs 16 bits, about 0.3 % of usual streams

Table = NDArray[np.int64]


def decode_lanes(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    table: Table,
    width: int,
) -> NDArray[np.uint16]:
    """Full blocks, decoded side by side: step i decodes symbol i of every block.

    Args:
        data: the whole code stream.
        starts: (lanes,) the bit at which each block starts.
        ends: (lanes,) the bit after each block.
        table: (2^width,) of `symbol << 4 | length` by the next `width` bits, complete.
        width: the longest code, 1 to 15 bits.

    Returns:
        (lanes, BLOCK) symbols.

    Raises:
        CorruptArtifactError: when a block's codes do not end where the block ends.
    """
    base = int(starts[0]) >> 3
    windows = _windows(data[base : -(-int(ends[-1]) // 8)])
    position = starts - 8 * base
    out = np.empty((BLOCK, len(starts)), np.uint16)
    entries = table.astype(np.uint64)
    index, entry = np.empty(len(starts), np.uint64), np.empty(len(starts), np.uint64)
    signed_index, signed_entry = index.view(np.int64), entry.view(np.int64)
    shift, low_bits = np.uint64(64 - width), np.uint64(15)
    refill = 57 // width  # a window holds 57 bits at least, whatever bit of a byte it starts at
    window = index
    for step in range(BLOCK):
        if step % refill == 0:
            window = windows.take(position >> 3, mode="clip")  # clip: damage cannot lead outside
            window <<= (position & 7).view(np.uint64)
        np.right_shift(window, shift, out=index)
        entries.take(signed_index, out=entry, mode="clip")
        out[step] = entry
        np.bitwise_and(entry, low_bits, out=entry)
        np.left_shift(window, entry, out=window)
        position += signed_entry
    if not np.array_equal(position + 8 * base, ends):
        raise CorruptArtifactError("a block of Huffman codes does not end where it should")
    return (out >> 4).T


def _windows(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(len(data) + 1,) the 64 bits that start at each byte and at the end, zeros after it."""
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    return np.ndarray((len(data) + 1,), ">u8", padded, strides=(1,)).astype(np.uint64)


def decode_tail(
    data: NDArray[np.uint8], start: int, table: Table, width: int, count: int
) -> NDArray[np.uint16]:
    """The last block, up to `BLOCK` symbols from the bit `start` to the end of `data`.

    One block alone is faster in plain Python than as a single lane.

    Raises:
        CorruptArtifactError: when the codes do not end in the last byte, filled with zeros.
    """
    rest = data[start >> 3 :].tobytes()
    left = 8 * len(rest) - (start & 7)
    stream = (int.from_bytes(rest, "big") & (1 << left) - 1) << width
    entries, mask = table.tolist(), (1 << width) - 1
    symbols: list[int] = []
    for _ in range(count):
        entry = entries[stream >> max(left, 0) & mask]
        symbols.append(entry >> 4)
        left -= entry & 15
    if not 0 <= left < 8 or stream >> width & (1 << left) - 1:
        raise CorruptArtifactError("a Huffman stream does not end where its bytes end")
    return np.array(symbols, np.uint16)
