"""What the counts say before each wave, for all waves in one go: the encoder knows all bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import log2_256
from lightning_compress.coding.planes import priors
from lightning_compress.coding.waves import View, parts

__all__ = ["AT_ONCE", "Foresight"]

AT_ONCE = 1 << 19  # positions of the largest tensor for which this is worth its memory
_KEYS = 1 << 17  # that are worked on in one go
_NARROW = 64  # rows that are cheaper to add up in one call, which is slow along this axis

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]


class Foresight:
    """The logits that a `Plane` that learns wave by wave gives to the positions of one slab.

    Args:
        view: of a tensor of one slab, T tables.
        at: (N,) positions, wave by wave; at least one.
        ends: where each wave ends in `at`.
        bits: (N,) the decisions.
        nodes: (N,) below `kinds`; None: all 0.
        kinds: how many different nodes there can be.
    """

    def __init__(
        self, view: View, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None, kinds: int
    ) -> None:
        lengths = [part.stop - part.start for part in parts(ends)]
        self.view, self.at, self.bits, self.waves = view, at, bits, len(lengths)
        self._wave = np.repeat(np.arange(len(lengths)), lengths)
        self._counted = len(at) - lengths[-1]  # the last wave's are before none
        self._ones = np.flatnonzero(bits[: self._counted])
        places = np.zeros(len(at), np.int64) if nodes is None else nodes.copy()
        zeros, ones = self._before(places, kinds)
        self.base: Ints = (log2_256(2 * ones + 1) - log2_256(2 * zeros + 1)).take(places)
        self._totals = zeros.sum(1).tolist(), ones.sum(1).tolist()

    def features(self) -> NDArray[np.float32]:
        """(T, N) what the counts of each table say beyond the plane's.

        Whole numbers below 2^14, since counts are at most 2^19: six of them, times weights of at
        most 2^7, still have an exact sum in single precision.
        """
        believed = np.array([priors(*both) for both in zip(*self._totals, strict=True)]).T
        every = self.view.keys(self.at, range(len(self.view.subsets)))
        found = np.empty((len(self.view.subsets), len(self.at)), np.float32)
        for tables in self._together():
            first, keys = 0, np.empty((len(tables), len(self.at)), np.int64)
            for row, table in zip(keys, tables, strict=True):
                np.add(next(every), first, out=row)
                first += self.view.sizes[table]
            found[tables] = self._asked(*_met(keys, first), believed)
        return found

    def _together(self) -> Iterator[list[int]]:
        """Tables that follow each other and are worked on in one go: of like counts, and few."""
        step = max(_KEYS // len(self.at), 1)
        for _, alike in itertools.groupby(range(len(self.view.subsets)), self._axes):
            tables = list(alike)
            for first in range(0, len(tables), step):
                yield tables[first : first + step]

    def _axes(self, table: int) -> int:
        return len(self.view.subsets[table])

    def _before(self, places: Ints, kinds: int) -> tuple[Ints, Ints]:
        """(W, kinds) zeros, and ones, before each wave; makes (..., N) kinds places in these."""
        count = self.waves * kinds
        places += (self._wave + 1) * kinds
        counted = places[..., : self._counted]
        zeros = np.bincount(counted.reshape(-1), minlength=count).reshape(-1, kinds)
        ones = np.bincount(counted.take(self._ones, axis=-1).reshape(-1), minlength=count)
        ones = ones.reshape(-1, kinds)
        zeros -= ones
        places -= kinds
        if kinds < _NARROW:
            return zeros.cumsum(0), ones.cumsum(0)
        for wave in range(1, self.waves):
            zeros[wave] += zeros[wave - 1]
            ones[wave] += ones[wave - 1]
        return zeros, ones

    def _asked(self, keys: Ints, kinds: int, believed: Ints) -> Ints:
        """What counts say at (..., N) keys below `kinds`, which become something else."""
        zeros, ones = self._before(keys, kinds)
        if zeros.size <= keys.size:
            wave = np.arange(self.waves)[:, None]
            return self._beyond(zeros, ones, wave, believed).take(keys)
        return self._beyond(zeros.take(keys), ones.take(keys), self._wave, believed)

    def _beyond(self, zeros: Ints, ones: Ints, wave: Ints, believed: Ints) -> Ints:
        """How far the logits of (..., N) counts lie from those of the plane's before waves."""
        logs = log2_256(believed)
        shift = logs[1] - logs[0]
        most = int(max(zeros.max(), ones.max())) + 1
        if self.waves * most >= zeros.size:
            of_zeros = log2_256((zeros << 16) + believed[0].take(wave))
            of_ones = log2_256((ones << 16) + believed[1].take(wave))
            return of_ones - of_zeros - shift.take(wave)
        logs = log2_256((np.arange(most) << 16) + believed[:, :, None])
        logs[1] -= shift[:, None]
        first = wave * most
        return logs[1].take(ones + first) - logs[0].take(zeros + first)


def _met(keys: Ints, kinds: int) -> tuple[Ints, int]:
    """Keys, and how many they can be, without those that do not occur if these may be most."""
    if keys.size > kinds:
        return keys, kinds
    met = np.zeros(kinds, np.int64)
    met[keys] = 1
    places = np.cumsum(met)
    return places.take(keys) - 1, int(places[-1])
