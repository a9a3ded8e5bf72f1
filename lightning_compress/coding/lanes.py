"""The inner loops of Huffman decoding: many blocks in lockstep, and one block by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError

__all__ = ["BLOCK", "Blocks", "decode_block", "decode_lanes"]

BLOCK = 1024  # symbols a block; its bit length costs 16 bits, about 0.3 % of usual streams
_ELSEWHERE = "a block of Huffman codes does not end where it should"
_FEW = 8  # blocks that are faster one by one in plain Python than in lockstep

Ints = NDArray[np.int64]
Symbols = NDArray[np.uint16]


@dataclass(frozen=True)
class Blocks:
    """Full blocks of one stream.

    Args:
        data: the whole code stream.
        starts: (lanes,) the bit at which each block starts.
        ends: (lanes,) the bit after each block.
        table: (2^width,) of `symbol << 4 | length` by the next `width` bits, complete.
        width: the longest code, 1 to 15 bits.
    """

    data: NDArray[np.uint8]
    starts: Ints
    ends: Ints
    table: Ints
    width: int


def decode_lanes(streams: Sequence[Blocks]) -> list[Symbols]:
    """Blocks of several streams, decoded side by side: step i decodes symbol i of every block.

    Returns:
        For each stream: (lanes, BLOCK) symbols.

    Raises:
        CorruptArtifactError: when a block's codes do not end where the block ends.
    """
    lanes = [len(stream.starts) for stream in streams]
    if sum(lanes) <= _FEW:
        return [_one_by_one(stream) for stream in streams]
    windows, position, ends = _joined(streams)
    table = np.concatenate([stream.table for stream in streams])
    sizes = table.astype(np.uint64) & np.uint64(15)
    first = np.cumsum([0, *(len(stream.table) for stream in streams[:-1])], dtype=np.uint64)
    first = first.repeat(lanes)
    shift = np.array([64 - stream.width for stream in streams], np.uint64).repeat(lanes)
    # A window holds 57 bits at least, whatever bit of a byte it starts at.
    refill = 57 // max(stream.width for stream in streams)
    places = np.empty((BLOCK, sum(lanes)), np.int64)
    window = size = np.empty(sum(lanes), np.uint64)
    signed_size = size.view(np.int64)
    for step, (place, index) in enumerate(zip(places.view(np.uint64), places, strict=True)):
        if step % refill == 0:
            window = windows.take(position >> 3, mode="clip")  # clip: damage cannot lead outside
            window <<= (position & 7).view(np.uint64)
        np.right_shift(window, shift, out=place)
        if len(streams) > 1:
            place += first
        sizes.take(index, out=size, mode="clip")
        np.left_shift(window, size, out=window)
        position += signed_size
    if not np.array_equal(position, ends):
        raise CorruptArtifactError(_ELSEWHERE)
    symbols = (table >> 4).astype(np.uint16).take(places)
    return [part.T for part in np.split(symbols, np.cumsum(lanes)[:-1], axis=1)]


def _joined(streams: Sequence[Blocks]) -> tuple[NDArray[np.uint64], Ints, Ints]:
    """The windows of all streams behind each other, and the bits of these that blocks lie between.

    The last window of a stream is its own end: no lane of another stream starts in it.
    """
    windows, starts, ends, before = [], [], [], 0
    for stream in streams:
        base = int(stream.starts[0]) >> 3
        windows.append(_windows(stream.data[base : -(-int(stream.ends[-1]) // 8)]))
        starts.append(stream.starts + 8 * (before - base))
        ends.append(stream.ends + 8 * (before - base))
        before += len(windows[-1])
    return np.concatenate(windows), np.concatenate(starts), np.concatenate(ends)


def _one_by_one(stream: Blocks) -> Symbols:
    table = stream.table.tolist()
    blocks: list[list[int]] = []
    for bounds in zip(stream.starts.tolist(), stream.ends.tolist(), strict=True):
        symbols, left = decode_block(stream.data, *bounds, table, stream.width, BLOCK)
        if left:
            raise CorruptArtifactError(_ELSEWHERE)
        blocks.append(symbols)
    return np.array(blocks, np.uint16)


def _windows(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(len(data) + 1,) the 64 bits that start at each byte and at the end, zeros after it."""
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    return np.ndarray((len(data) + 1,), ">u8", padded, strides=(1,)).astype(np.uint64)


def decode_block(
    data: NDArray[np.uint8], start: int, end: int, table: list[int], width: int, count: int
) -> tuple[list[int], int]:
    """`count` symbols from codes between two bits of a stream, and how many bits they leave.

    In plain Python. Codes that are longer than what there is leave less than none.
    """
    part = int.from_bytes(data[start >> 3 : -(-end // 8)].tobytes(), "big")
    left = end - start
    stream = (part >> -end % 8 & (1 << left) - 1) << width
    mask = (1 << width) - 1
    symbols: list[int] = []
    for _ in range(count):
        entry = table[stream >> max(left, 0) & mask]
        symbols.append(entry >> 4)
        left -= entry & 15
    return symbols, left
