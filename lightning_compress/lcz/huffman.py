"""Canonical, length-limited Huffman coding, vectorised in both directions.

A stream is: alphabet size, code lengths, the bit length of every block of `BLOCK` symbols but the
last, the codes. The decoder decodes all blocks in lockstep, one table look-up a symbol (Huffman
1952; canonical form: Schwartz and Kallick 1964).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import ByteReader, append_codes, count_values, pack_fixed, varint

__all__ = [
    "BLOCK",
    "MAX_ALPHABET",
    "MAX_LENGTH",
    "Blocks",
    "canonical",
    "code_lengths",
    "decode",
    "decode_block",
    "decode_blocks",
    "decode_streams",
    "encode",
    "pack_lengths",
    "read_lengths",
]
MAX_LENGTH = 15  # bits a code: a length fits in 4 bits
MAX_ALPHABET = 4096  # an entry of the decoder's table holds 12 bits of symbol and 4 of length


def code_lengths(counts: NDArray[np.int64], limit: int = MAX_LENGTH) -> NDArray[np.int64]:
    """Code lengths of least total size, none above `limit` bits.

    Package-merge (Larmore and Hirschberg 1990). A lone symbol gets length 1.

    Args:
        counts: (A,) how often each symbol occurs; those that never do get length 0.
        limit: the longest length allowed.

    Raises:
        ValueError: when the symbols in use do not fit in codes of `limit` bits.

    >>> code_lengths(np.array([5, 0, 1, 2]))
    array([1, 0, 2, 2])
    """
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) > 1 << limit:
        raise ValueError(f"{len(used)} symbols do not fit in codes of {limit} bits")
    order = used[np.argsort(counts[used], kind="stable")]
    if len(order) < 2:
        lengths[order] = 1
        return lengths
    leaves, packages = counts[order], counts[:0]
    levels: list[NDArray[np.bool_]] = []
    for _ in range(limit):
        weights = np.concatenate([leaves, packages])
        rank = np.argsort(weights, kind="stable")
        levels.append(rank < len(leaves))
        packages = weights[rank][: len(rank) // 2 * 2].reshape(-1, 2).sum(1)
    take = 2 * (len(order) - 1)
    for is_leaf in reversed(levels):
        cheapest = int(is_leaf[:take].sum())
        lengths[order[:cheapest]] += 1
        take = 2 * (take - cheapest)
    return lengths


def canonical(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Symbols in the order of their codes, the table slots of each, and the table's bits."""
    width = int(lengths.max())
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    return order, 1 << (width - lengths[order]), width


def pack_lengths(lengths: NDArray[np.int64]) -> bytes:
    """Four bits a length; up to 16 unused symbols in a row as 0 and their number less 1.

    >>> pack_lengths(np.array([1, 0, 0, 0, 2, 2])).hex()
    '06102220'
    """
    nibbles: list[int] = []
    for length, group in itertools.groupby(lengths.tolist()):
        run = len(list(group))
        if length:
            nibbles += [length] * run
        else:
            nibbles += [n for at in range(0, run, 16) for n in (0, min(run - at, 16) - 1)]
    return varint(len(lengths)) + pack_fixed(np.array(nibbles, np.uint16), 4)


def read_lengths(reader: ByteReader) -> NDArray[np.int64]:
    """The opposite of `pack_lengths`, and a check that the code is complete.

    Raises:
        CorruptArtifactError: when the lengths are cut off or leave a code without a symbol; a lone
            symbol has length 1.
    """
    size = reader.varint(limit=MAX_ALPHABET, what="the alphabet of a Huffman code")
    spare: list[int] = []  # the second half of a byte, until it is needed

    def nibble() -> int:
        if spare:
            return spare.pop()
        byte = reader.take(1, "the table of a Huffman code")[0]
        spare.append(byte & 15)
        return byte >> 4

    lengths: list[int] = []
    while len(lengths) < size:
        length = nibble()
        lengths += [length] if length else [0] * (nibble() + 1)
    used = [length for length in lengths if length]
    if len(lengths) != size or any(spare) or not lengths or not lengths[-1]:
        raise CorruptArtifactError("the table of a Huffman code does not end where it should")
    if used != [1] and sum(1 << MAX_LENGTH - length for length in used) != 1 << MAX_LENGTH:
        raise CorruptArtifactError("the Huffman code is not complete")
    return np.array(lengths, np.int64)


BLOCK = 1024  # symbols a block; its bit length costs 16 bits, about 0.3 % of usual streams
_WRONG_BLOCK_END = "a block of Huffman codes does not end where it should"
_FEW = 8  # blocks that plain Python decodes faster than lockstep
Ints = NDArray[np.int64]
Symbols = NDArray[np.uint16]


@dataclass(frozen=True)
class Blocks:
    """Full blocks of one stream, all but its last.

    Args:
        data: the whole code stream.
        starts: (blocks,) the bit at which each block starts.
        ends: (blocks,) the bit after each block.
        table: (2^width,) of `symbol << 4 | length` by the next `width` bits, complete.
        width: the longest code, 1 to 15 bits.
    """

    data: NDArray[np.uint8]
    starts: Ints
    ends: Ints
    table: Ints
    width: int


def decode_blocks(streams: Sequence[Blocks]) -> list[Symbols]:
    """Decode blocks of several streams in lockstep: step i decodes symbol i of every block.

    Returns:
        For each stream: (blocks, BLOCK) symbols.

    Raises:
        CorruptArtifactError: when a block's codes do not end where the block ends.
    """
    counts = [len(stream.starts) for stream in streams]
    if sum(counts) <= _FEW:
        return [_one_by_one(stream) for stream in streams]
    windows, position, ends = _concatenated(streams)
    table = np.concatenate([stream.table for stream in streams])
    sizes = table.astype(np.uint64) & np.uint64(15)
    first = np.cumsum([0, *(len(stream.table) for stream in streams[:-1])], dtype=np.uint64)
    first = first.repeat(counts)
    shift = np.array([64 - stream.width for stream in streams], np.uint64).repeat(counts)
    # A window holds 57 bits at least, whatever bit of a byte it starts at.
    refill = 57 // max(stream.width for stream in streams)
    places = np.empty((BLOCK, sum(counts)), np.int64)
    window = size = np.empty(sum(counts), np.uint64)
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
        raise CorruptArtifactError(_WRONG_BLOCK_END)
    symbols = (table >> 4).astype(np.uint16).take(places)
    return [part.T for part in np.split(symbols, np.cumsum(counts)[:-1], axis=1)]


def _concatenated(streams: Sequence[Blocks]) -> tuple[NDArray[np.uint64], Ints, Ints]:
    """Windows of all streams concatenated, and the first and last bit of each block in them.

    The last window of a stream is its own end: no block of another stream starts in it.
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
            raise CorruptArtifactError(_WRONG_BLOCK_END)
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


_BLOCKS_AT_ONCE = 1024  # blocks coded at once: bounds the working memory to some 50 MB


def encode(symbols: Symbols) -> bytes:
    """A Huffman stream of (N,) symbols below `MAX_ALPHABET`; empty for N = 0.

    >>> decode(encode(np.array([3, 3, 0], np.uint16)), 3)
    array([3, 3, 0], dtype=uint16)
    """
    if not len(symbols):
        return b""
    counts = count_values(symbols)
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
    for start in range(0, len(symbols), BLOCK * _BLOCKS_AT_ONCE):
        part = symbols[start : start + BLOCK * _BLOCKS_AT_ONCE]
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
    return decode_streams([(data, count)])[0]


def decode_streams(streams: Sequence[tuple[bytes, int]]) -> list[Symbols]:
    """Decode several streams in lockstep, which is faster where they are short.

    >>> decode_streams([(encode(np.array([3, 3, 0], np.uint16)), 3), (b"", 0)])
    [array([3, 3, 0], dtype=uint16), array([], dtype=uint16)]
    """
    opened = [_OpenStream(data, count) for data, count in streams]
    group: list[tuple[_OpenStream, slice]] = []
    pending = 0
    for stream in opened:
        for low in range(0, stream.full, _BLOCKS_AT_ONCE):
            part = slice(low, min(low + _BLOCKS_AT_ONCE, stream.full))
            if pending + part.stop - low > _BLOCKS_AT_ONCE:
                _decode_group(group)
                group, pending = [], 0
            group.append((stream, part))
            pending += part.stop - low
    _decode_group(group)
    return [stream.all_symbols() for stream in opened]


class _OpenStream:
    """A Huffman stream whose code table is read.

    Args:
        data: of the stream.
        count: of its symbols, which are to be put into `out`.
    """

    def __init__(self, data: bytes, count: int) -> None:
        self.full = 0  # blocks before the last one, if there is one
        self.codes = np.zeros(0, np.uint8)
        if count == 0:
            self.out = _require_empty(data)
            return
        reader = ByteReader(data)
        lengths = read_lengths(reader)
        order, slots, self.width = canonical(lengths)
        if len(order) == 1:
            _require_empty(reader.rest())
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

    def all_symbols(self) -> Symbols:
        """All symbols, given those of the full blocks."""
        if len(self.codes):
            start, end = int(self.bounds[-1]), 8 * len(self.codes)
            rest = self.out[self.full * BLOCK :]
            table = self.table.tolist()
            rest[:], left = decode_block(self.codes, start, end, table, self.width, len(rest))
            if not 0 <= left < 8 or self.codes[-1] & (1 << left) - 1:
                raise CorruptArtifactError("a Huffman stream does not end where its bytes end")
        return self.out


def _decode_group(group: Sequence[tuple[_OpenStream, slice]]) -> None:
    if group:
        found = decode_blocks([stream.blocks(part) for stream, part in group])
        for (stream, part), symbols in zip(group, found, strict=True):
            stream.out[part.start * BLOCK : part.stop * BLOCK] = symbols.reshape(-1)


def _require_empty(data: bytes) -> Symbols:
    if data:
        raise CorruptArtifactError(f"{len(data)} bytes after the end of a Huffman stream")
    return np.zeros(0, np.uint16)
