"""Canonical, length-limited Huffman coding, vectorised in both directions.

A stream is: alphabet size, code lengths, the bit length of every block of `BLOCK` symbols but the
last, the codes. Knowing where each block starts, the decoder runs all blocks in lockstep, one table
look-up a symbol (Huffman 1952; canonical form: Schwartz and Kallick 1964).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.bits import ByteReader, append_codes
from lightning_compress.coding.code_lengths import (
    MAX_ALPHABET,
    canonical,
    code_lengths,
    pack_lengths,
    read_lengths,
)
from lightning_compress.coding.lanes import BLOCK, Blocks, decode_block, decode_lanes
from lightning_compress.coding.pieces import tally
from lightning_compress.errors import CorruptArtifactError

__all__ = ["decode", "decode_together", "encode"]

_LANES = 1024  # blocks that are coded in one go: bounds the working memory to some 50 MB

Symbols = NDArray[np.uint16]


def encode(symbols: Symbols) -> bytes:
    """A Huffman stream of (N,) symbols below `MAX_ALPHABET`; nothing at all for N = 0.

    >>> decode(encode(np.array([3, 3, 0], np.uint16)), 3)
    array([3, 3, 0], dtype=uint16)
    """
    if not len(symbols):
        return b""
    counts = tally(symbols)
    if len(counts) > MAX_ALPHABET:
        raise ValueError(f"symbol {len(counts) - 1} is not below {MAX_ALPHABET}")
    lengths = code_lengths(counts)
    table = pack_lengths(lengths)
    if np.count_nonzero(counts) == 1:
        return table
    sizes, codes = _encode_blocks(symbols, lengths, int(counts @ lengths))
    return table + sizes[:-1].astype("<u2").tobytes() + codes


def _encode_blocks(
    symbols: Symbols, lengths: NDArray[np.int64], bits: int
) -> tuple[NDArray[np.int64], bytes]:
    order, slots, width = canonical(lengths)
    codes = np.zeros_like(lengths)
    codes[order] = (np.cumsum(slots) - slots) >> (width - lengths[order])
    words, offset = np.zeros(bits // 64 + 2, np.int64), 0
    blocks: list[NDArray[np.int64]] = []
    for start in range(0, len(symbols), BLOCK * _LANES):
        part = symbols[start : start + BLOCK * _LANES]
        sizes = lengths.take(part)
        blocks.append(np.add.reduceat(sizes, np.arange(0, len(part), BLOCK)))
        offset = append_codes(words, offset, codes.take(part), sizes)
    return np.concatenate(blocks), words.astype(">i8").tobytes()[: -(-bits // 8)]


def decode(data: bytes, count: int) -> Symbols:
    """The `count` symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the code is not complete, a block does not end where it should,
            or bytes are missing or left over.
    """
    return decode_together([(data, count)])[0]


def decode_together(streams: Sequence[tuple[bytes, int]]) -> list[Symbols]:
    """As `decode` of each of some streams; side by side, which is faster where they are short.

    >>> decode_together([(encode(np.array([3, 3, 0], np.uint16)), 3), (b"", 0)])
    [array([3, 3, 0], dtype=uint16), array([], dtype=uint16)]
    """
    opened = [_Stream(data, count) for data, count in streams]
    group: list[tuple[_Stream, slice]] = []
    lanes = 0
    for stream in opened:
        for low in range(0, stream.full, _LANES):
            part = slice(low, min(low + _LANES, stream.full))
            if lanes + part.stop - low > _LANES:
                _decode_group(group)
                group, lanes = [], 0
            group.append((stream, part))
            lanes += part.stop - low
    _decode_group(group)
    return [stream.whole() for stream in opened]


class _Stream:
    """A stream whose table is read.

    Args:
        data: of the stream.
        count: of its symbols, which are to be put into `out`.
    """

    def __init__(self, data: bytes, count: int) -> None:
        self.full = 0  # blocks before the last one, if there is one
        self.codes = np.zeros(0, np.uint8)
        if count == 0:
            self.out = _nothing(data)
            return
        reader = ByteReader(data)
        lengths = read_lengths(reader)
        order, slots, self.width = canonical(lengths)
        if len(order) == 1:
            _nothing(reader.rest())
            self.out = np.full(count, order[0], np.uint16)
            return
        self.table = np.repeat(order << 4 | lengths[order], slots)
        self.full = (count - 1) // BLOCK
        sizes = reader.take(2 * self.full, "the block table of a Huffman stream")
        ends = np.cumsum(np.frombuffer(sizes, "<u2"), dtype=np.int64)
        self.bounds = np.concatenate([np.zeros(1, np.int64), ends])
        self.codes = np.frombuffer(reader.rest(), np.uint8)
        if max(count, self.bounds[-1]) > 8 * len(self.codes):  # every symbol takes a bit or more
            raise CorruptArtifactError(f"{len(self.codes)} bytes cannot hold {count} Huffman codes")
        self.out = np.empty(count, np.uint16)

    def blocks(self, part: slice) -> Blocks:
        """Some of its full blocks."""
        starts, ends = self.bounds[:-1][part], self.bounds[1:][part]
        return Blocks(self.codes, starts, ends, self.table, self.width)

    def whole(self) -> Symbols:
        """All symbols, given those of the full blocks."""
        if len(self.codes):
            start, end = int(self.bounds[-1]), 8 * len(self.codes)
            rest = self.out[self.full * BLOCK :]
            table = self.table.tolist()
            rest[:], left = decode_block(self.codes, start, end, table, self.width, len(rest))
            if not 0 <= left < 8 or self.codes[-1] & (1 << left) - 1:
                raise CorruptArtifactError("a Huffman stream does not end where its bytes end")
        return self.out


def _decode_group(group: Sequence[tuple[_Stream, slice]]) -> None:
    if group:
        found = decode_lanes([stream.blocks(part) for stream, part in group])
        for (stream, part), lanes in zip(group, found, strict=True):
            stream.out[part.start * BLOCK : part.stop * BLOCK] = lanes.reshape(-1)


def _nothing(data: bytes) -> Symbols:
    if data:
        raise CorruptArtifactError(f"{len(data)} bytes after the end of a Huffman stream")
    return np.zeros(0, np.uint16)
