"""The probability of one binary decision at each position, learnt from the waves before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import WEIGHT_ONE, log2_256
from lightning_compress.coding.waves import View

__all__ = ["Plane", "Weights", "beyond", "own_logits", "start"]

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

    @property
    def total(self) -> Ints:
        """(2, 1) the zeros and ones that have been counted."""
        return self._nodes.sum(1, keepdims=True)

    def of_nodes(self, nodes: Ints | None) -> Ints:
        """(2, N) the zeros and ones that have been counted of each node; None: (2, 1)."""
        return self._nodes if nodes is None else self._nodes.take(nodes, axis=1)

    def of_keys(self, table: int, keys: Ints) -> Ints:
        """(2, N) the zeros and ones that have been counted of each key of a table."""
        return self._table(table).take(keys, axis=1)

    def logits(self, weights: Weights, keys: dict[int, Ints], nodes: Ints | None) -> Ints:
        """The logit of a one at each of N positions; (1,) if it is the same at all of them.

        Args:
            weights: of the tables to be asked.
            keys: (N,) by table.
            nodes: (N,) of the positions; None: all 0.
        """
        base = own_logits(self._nodes)
        if nodes is not None:
            base = base.take(nodes)
        if not weights:
            return base
        prior = start(self.total)
        total = sum(w * self._feature(table, keys[table], prior) for table, w in weights.items())
        return base + total // WEIGHT_ONE

    def _feature(self, table: int, keys: Ints, prior: Ints) -> Ints:
        """The feature of each key: worked out for all there are, or for those in `keys`."""
        counts = self._table(table)
        if len(keys) < counts.shape[1]:
            return self._beyond(counts.take(keys, axis=1), prior, table)
        return self._beyond(counts, prior, table).take(keys)

    def _beyond(self, counts: Ints, prior: Ints, table: int) -> Ints:
        most = min(self.view.positions(table), int(self._nodes.sum()))
        if 2 * most >= counts.shape[1]:
            return beyond(counts, prior)
        logs = log2_256((np.arange(most + 1) << 16) + prior)
        logs -= logs[:, :1]
        return logs[1].take(counts[1]) - logs[0].take(counts[0])

    def learn(self, keys: dict[int, Ints], nodes: Ints | None, bits: Bits) -> None:
        """Count a wave: in its nodes, and in the tables that `keys` are given for."""
        ones = bits.astype(np.int64)
        if nodes is None:
            self._nodes += np.bincount(ones, minlength=2)[:, None]
        else:
            _count(self._nodes, nodes, ones)
        for table, places in keys.items():
            _count(self._table(table), places, ones)

    def _table(self, table: int) -> Ints:
        if table not in self._tables:
            self._tables[table] = np.zeros((2, self.view.sizes[table]), np.int64)
        return self._tables[table]


def own_logits(counts: Ints) -> Ints:
    """(N,) what (2, N) counts of a node say by themselves."""
    logs = log2_256(2 * counts + 1)
    return logs[1] - logs[0]


def start(total: Ints) -> Ints:
    """(2, N) what a key's counts start from, times 2^16: shares of the plane's (2, N) total."""
    zeros, ones = total
    share = (2 * ones + 1) * _HALF // (ones + zeros + 1)
    share = np.minimum(np.maximum(share, 1), 2 * _HALF - 1)
    return np.stack([2 * _HALF - share, share]) * _PRIOR


def beyond(counts: Ints, prior: Ints) -> Ints:
    """(N,) features: how far the logits of (2, N) counts lie from those of the `prior` alone."""
    logs = log2_256((counts << 16) + prior) - log2_256(prior)
    return logs[1] - logs[0]


def _count(counts: Ints, keys: Ints, ones: Ints) -> None:
    """Takes as long as there are keys, however many there could be; `bincount` does not."""
    np.add.at(counts.reshape(-1), keys + counts.shape[1] * ones, 1)
