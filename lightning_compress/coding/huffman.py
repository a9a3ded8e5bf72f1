"""Canonical, length-limited Huffman coding, vectorised in both directions.

A stream is: alphabet size, code lengths, the bit length of every block of `BLOCK` symbols but the
last, the codes. Knowing where each block starts, the decoder runs all blocks in lockstep, one table
look-up a symbol (Huffman 1952; canonical form: Schwartz and Kallick 1964).
"""

from __future__ import annotations

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
from lightning_compress.coding.lanes import BLOCK, decode_lanes, decode_tail
from lightning_compress.coding.pieces import tally
from lightning_compress.errors import CorruptArtifactError

__all__ = ["decode", "encode"]

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
    if count == 0:
        return _nothing(data)
    reader = ByteReader(data)
    lengths = read_lengths(reader)
    order, slots, width = canonical(lengths)
    if len(order) == 1:
        _nothing(reader.rest())
        return np.full(count, order[0], np.uint16)
    table = np.repeat(order << 4 | lengths[order], slots)
    return _decode_blocks(reader, table, width, count)


def _nothing(data: bytes) -> Symbols:
    if data:
        raise CorruptArtifactError(f"{len(data)} bytes after the end of a Huffman stream")
    return np.zeros(0, np.uint16)


def _decode_blocks(reader: ByteReader, table: NDArray[np.int64], width: int, count: int) -> Symbols:
    full = (count - 1) // BLOCK
    sizes = reader.take(2 * full, "the block table of a Huffman stream")
    ends = np.cumsum(np.frombuffer(sizes, "<u2"), dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    codes = np.frombuffer(reader.rest(), np.uint8)
    if max(count, starts[-1]) > 8 * len(codes):  # every symbol takes a bit or more
        raise CorruptArtifactError(f"{len(codes)} bytes cannot hold {count} Huffman codes")
    out = np.empty(count, np.uint16)
    for low in range(0, full, _LANES):
        part = slice(low, min(low + _LANES, full))
        lanes = decode_lanes(codes, starts[part], ends[part], table, width)
        out[low * BLOCK : low * BLOCK + lanes.size] = lanes.reshape(-1)
    out[full * BLOCK :] = decode_tail(codes, int(starts[-1]), table, width, count - full * BLOCK)
    return out
