"""The probability of one binary decision at each position, learnt from the waves before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import WEIGHT_ONE, log2_256
from lightning_compress.coding.waves import View

__all__ = ["Plane", "Weights"]

_HALF = 1 << 15  # probabilities of counts are in units of 1 / 2^16
_PRIOR = 6  # how many observations the whole plane's probability counts for in each table

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]
Weights = dict[int, int]  # by table


class Plane:
    """Counts of zeros and ones: of the plane's nodes, and of each key of each table.

    The logit of a one is its node's, plus a weighed sum of what each table says beyond the plane's.

    Args:
        view: whose tables there are.
        nodes: how many values the node of a position can have.
    """

    def __init__(self, view: View, nodes: int = 1) -> None:
        self.view = view
        self._nodes = np.zeros((2, nodes), np.int64)
        self._tables: dict[int, Ints] = {}  # made when they are first asked for

    def logits(
        self, count: int, weights: Weights, keys: dict[int, Ints], nodes: Ints | None
    ) -> Ints:
        """The logit of a one at each of N positions.

        Args:
            count: N.
            weights: of the tables to be asked.
            keys: (N,) by table.
            nodes: (N,) of the positions; None: all 0.
        """
        base = self.base(nodes)
        total = np.zeros(count, np.int64)
        for table, weight in weights.items():
            total += self.feature(table, keys[table], weight)
        total //= WEIGHT_ONE
        total += base
        return total

    def base(self, nodes: Ints | None) -> Ints:
        """The logit of each position's node; None: of the one node, (1,)."""
        zeros, ones = log2_256(2 * self._nodes + 1)
        return ones - zeros if nodes is None else (ones - zeros).take(nodes)

    def feature(self, table: int, keys: Ints, weight: int = 1) -> Ints:
        """(N,) how far the logit of each key lies from the plane's, times `weight`.

        A key has seen what was counted, and the plane's share of ones `_PRIOR` times.
        """
        counts = self._table(table)
        few = len(keys) < counts.shape[1]
        beyond = self._beyond(counts.take(keys, axis=1) if few else counts, table)
        beyond *= weight
        return beyond if few else beyond.take(keys)

    def _beyond(self, counts: Ints, table: int) -> Ints:
        """(K,) the feature of keys with these (2, K) counts."""
        zeros, ones = self._nodes.sum(1).tolist()
        share = min(max((2 * ones + 1) * _HALF // (ones + zeros + 1), 1), 2 * _HALF - 1)
        prior = np.array([[2 * _HALF - share], [share]]) * _PRIOR
        most = min(self.view.positions(table), zeros + ones)
        if 2 * most < counts.shape[1]:
            logs = log2_256((np.arange(most + 1) << 16) + prior)
            logs -= logs[:, :1]
            return logs[1].take(counts[1]) - logs[0].take(counts[0])
        logs = log2_256((counts << 16) + prior) - log2_256(prior)
        return logs[1] - logs[0]

    def learn(self, keys: dict[int, Ints], nodes: Ints | None, bits: Bits) -> None:
        """Count a wave: in its nodes, and in the tables that `keys` are given for."""
        ones = np.flatnonzero(bits)
        if nodes is None:
            self._nodes += np.array([[len(bits) - len(ones)], [len(ones)]])
        else:
            _count(self._nodes, nodes, ones)
        for table, places in keys.items():
            _count(self._table(table), places, ones)

    def _table(self, table: int) -> Ints:
        if table not in self._tables:
            self._tables[table] = np.zeros((2, self.view.sizes[table]), np.int64)
        return self._tables[table]


def _count(counts: Ints, keys: Ints, ones: NDArray[np.intp]) -> None:
    size = counts.shape[1]
    more = np.bincount(keys.take(ones), minlength=size)
    counts[0] += np.bincount(keys, minlength=size) - more
    counts[1] += more
