"""The probability of one binary decision at each position, learnt from the waves before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import WEIGHT_ONE, log2_256, log2_256_of
from lightning_compress.coding.waves import View, parts

__all__ = ["Plane", "Weights", "priors"]

_AT_ONCE = 1 << 18  # keys that are worked on in one go, rather than wave by wave, table by table
_HALF = 1 << 15  # probabilities of counts are in units of 1 / 2^16
_PRIOR = 6  # how many observations the whole plane's probability counts for in each table

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]
Weights = dict[int, int]  # by table


class Plane:
    """Counts of zeros and ones: of the plane's nodes, and of each key of each table.

    The logit of a one is its node's, plus a weighed sum of what each table says beyond the plane's.
    All tables stand behind each other in one array, so that one call does for all of them.

    Args:
        view: whose tables there are.
        nodes: how many values the node of a position can have.
        tables: those that are counted, T of them; None: all.
    """

    def __init__(self, view: View, nodes: int = 1, tables: Iterable[int] | None = None) -> None:
        self.view = view
        self._tables = tuple(range(len(view.subsets)) if tables is None else tables)
        sizes = [view.sizes[table] for table in self._tables]
        self._first = np.cumsum([0, *sizes], dtype=np.int64)[:-1, None]
        self._most = max((view.positions(table) for table in self._tables), default=0)
        self._nodes = np.zeros((2, nodes), np.int64)
        self._counts = np.zeros((2, sum(sizes)), np.int64)

    def keys(self, positions: Ints) -> Ints:
        """(T, N) where the counts of each position are, table by table."""
        keys = np.empty((len(self._tables), len(positions)), np.int64)
        for row, places in zip(keys, self.view.keys(positions, self._tables), strict=True):
            row[:] = places
        keys += self._first
        return keys

    def waves(self, at: Ints, ends: Ints) -> Iterator[tuple[slice, Ints]]:
        """The waves that are not empty, with their keys: those of a few positions all at once."""
        keys = self.keys(at) if len(at) * len(self._tables) <= _AT_ONCE else None
        for part in parts(ends):
            yield part, self.keys(at[part]) if keys is None else keys[:, part]

    def base(self, nodes: Ints | None) -> Ints:
        """(N,) what the node of each position says by itself; None: (1,), all have node 0."""
        if nodes is None:
            zeros, ones = self._nodes[:, 0].tolist()
            return np.array([log2_256_of(2 * ones + 1) - log2_256_of(2 * zeros + 1)])
        logs = log2_256(2 * self._nodes + 1)
        return (logs[1] - logs[0]).take(nodes)

    def features(self, keys: Ints) -> Ints:
        """(T, N) what the counts of each of (T, N) keys say beyond what the plane's do."""
        return self._asked(keys, self._counts)

    def logits(self, weights: Weights, keys: Ints, nodes: Ints | None) -> Ints:
        """The logit of a one at each of N positions; (1,) if it is the same at all of them.

        Args:
            weights: of the tables, in their order.
            keys: (T, N) of the positions.
            nodes: (N,) of the positions; None: all 0.
        """
        base = self.base(nodes)
        if not weights:
            return base
        each = [weights[table] for table in self._tables]
        if keys.size <= _AT_ONCE:
            total = (self.features(keys) * np.array(each)[:, None]).sum(0)
        else:  # table by table: not all features in memory at once
            total = np.zeros(keys.shape[1], np.int64)
            bounds = itertools.pairwise([*self._first[:, 0].tolist(), self._counts.shape[1]])
            for row, weight, (start, stop) in zip(keys, each, bounds, strict=True):
                total += weight * self._asked(row - start, self._counts[:, start:stop])
        return base + total // WEIGHT_ONE

    def _asked(self, keys: Ints, counts: Ints) -> Ints:
        """What counts say at keys: worked out for all there are, or for those that are asked."""
        if keys.size < counts.shape[1]:
            return self._beyond(counts.take(keys, axis=1))
        return self._beyond(counts).take(keys)

    def _beyond(self, counts: Ints) -> Ints:
        """How far the logits of (2, ...) counts lie from those of the plane's alone."""
        zeros, ones = self._nodes.sum(1).tolist()
        believed = priors(zeros, ones)
        prior = np.array(believed).reshape(2, *[1] * (counts.ndim - 1))
        most = min(self._most, zeros + ones)
        if 2 * most < counts[0].size:
            logs = log2_256((np.arange(most + 1) << 16) + prior.reshape(2, 1))
            found = logs[1].take(counts[1]) - logs[0].take(counts[0])
        else:
            logs = log2_256((counts << 16) + prior)
            found = logs[1] - logs[0]
        found -= log2_256_of(believed[1]) - log2_256_of(believed[0])
        return found

    def learn(self, keys: Ints, nodes: Ints | None, bits: Bits) -> None:
        """Count a wave: in its nodes, and in the tables."""
        ones = bits.astype(np.int64)
        if nodes is None:
            self._nodes += np.bincount(ones, minlength=2)[:, None]
        else:
            _count(self._nodes, nodes, ones)
        for rows in (keys,) if keys.size <= _AT_ONCE else keys:
            _count(self._counts, rows, ones)


def priors(zeros: int, ones: int) -> tuple[int, int]:
    """What the counts of a plane add to those of each key, in units of 1 / 2^16."""
    share = (2 * ones + 1) * _HALF // (ones + zeros + 1)
    share = min(max(share, 1), 2 * _HALF - 1)
    return _PRIOR * (2 * _HALF - share), _PRIOR * share


def _count(counts: Ints, keys: Ints, ones: Ints) -> None:
    """Takes as long as there are keys, however many there could be; `bincount` does not."""
    np.add.at(counts.reshape(-1), (keys + counts.shape[1] * ones).reshape(-1), 1)
