"""Huffman code lengths: the best ones, the canonical order of their codes, and their bytes."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.bits import ByteReader, pack_fixed, varint
from lightning_compress.errors import CorruptArtifactError

__all__ = [
    "MAX_ALPHABET", "MAX_LENGTH", "canonical", "code_lengths", "pack_lengths", "read_lengths",
]  # fmt: skip

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
