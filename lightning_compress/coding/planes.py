"""The probability of one binary decision at each position, learnt from the waves before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import log2_256

__all__ = ["Plane"]

_HALF = 1 << 15  # probabilities of counts are in units of 1 / 2^16
_PRIOR = 16  # how many observations the whole plane's probability counts for in each table

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]


class Plane:
    """Counts of zeros and ones: of the whole plane, of its nodes, and of each key of each table.

    The logit of a one is its node's, plus a weighed sum of what each table says beyond the plane's.

    Args:
        sizes: how many keys each table has.
        nodes: how many values the node of a position can have.
    """

    def __init__(self, sizes: list[int], nodes: int = 1) -> None:
        self._node_counts = np.zeros((2, nodes), np.int64)
        self._sizes = sizes
        self._counts: dict[int, Ints] = {}  # made when a table is first asked for

    def base(self, nodes: Ints | None, length: int) -> Ints:
        """(N,) the logit of each position's node; None: they are all node 0."""
        zeros, ones = self._node_counts
        logits = log2_256(2 * ones + 1) - log2_256(2 * zeros + 1)
        return np.full(length, logits[0]) if nodes is None else logits[nodes]

    def feature(self, table: int, keys: Ints) -> Ints:
        """(N,) how far the logit of each key lies from the plane's."""
        zeros, ones = self._node_counts.sum(1)
        share = int((2 * ones + 1) * _HALF // (ones + zeros + 1))
        share = min(max(share, 1), 2 * _HALF - 1)
        counts = self._table(table)
        if len(keys) < counts.shape[1]:
            return self._beyond(counts[:, keys], share)
        return self._beyond(counts, share)[keys]

    def _table(self, table: int) -> Ints:
        if table not in self._counts:
            self._counts[table] = np.zeros((2, self._sizes[table]), np.int64)
        return self._counts[table]

    @staticmethod
    def _beyond(counts: Ints, share: int) -> Ints:
        rest = 2 * _HALF - share
        ones = _logs(counts[1], share) - _logs(np.zeros(1, np.int64), share)
        return ones - _logs(counts[0], rest) + _logs(np.zeros(1, np.int64), rest)

    def learn(self, keys: dict[int, Ints], nodes: Ints | None, bits: Bits) -> None:
        """Count a wave: in the tables that `keys` are given for, and in its nodes."""
        everywhere = np.zeros(len(bits), np.int64) if nodes is None else nodes
        _count(self._node_counts, everywhere, bits)
        for table, places in keys.items():
            _count(self._table(table), places, bits)


def _logs(counts: Ints, share: int) -> Ints:
    """Logarithms of counts with the prior added, by a table where that is shorter."""
    longest = int(counts.max(initial=0)) + 1
    if longest < len(counts):
        return log2_256((np.arange(longest) << 16) + _PRIOR * share)[counts]
    return log2_256((counts << 16) + _PRIOR * share)


def _count(counts: Ints, keys: Ints, bits: Bits) -> None:
    size = counts.shape[1]
    ones = np.bincount(keys[bits], minlength=size)
    counts[0] += np.bincount(keys, minlength=size) - ones
    counts[1] += ones
