"""Which tables a plane is coded with, and their weights: fitted before anything of it is coded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.lcz.context_model import (
    WEIGHT_ONE,
    Plane,
    View,
    Weights,
    fit_weights,
    log2_256,
    parts,
    priors,
)

__all__ = [
    "AT_ONCE",
    "Foresight",
    "fitted",
    "fitted_ahead",
]
AT_ONCE = 1 << 19  # positions of the largest tensor for which this is worth its memory
_KEYS = 1 << 17  # that are worked on in one go
_NARROW = 64  # rows that are cheaper to add up in one call, which is slow along this axis
Ints = NDArray[np.signedinteger[Any]]
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


_FIT = 1 << 14  # positions that weights are fitted to
_SHORT = 1 << 18  # positions whose waves are taken two at a time
_WORTH = 24  # bits that a plane's weights must save to be stored
_SMALLEST = 2  # weights below it, in units of 1 / WEIGHT_ONE, are left out
_FEW = 512  # decisions in a plane that are too few to learn weights from


def fitted(plane: Plane, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None) -> Weights:
    """The weights of the tables that are worth it, by table, for one plane of the first slab.

    Args:
        plane: without counts; useless afterwards.
        at: (N,) positions, wave by wave.
        ends: where each wave ends in `at`.
        bits: (N,) the decisions.
        nodes: (N,) of the positions; None: all 0.
    """
    if not plane.view.subsets or len(at) < _FEW:
        return {}
    step = -(-len(at) // _FIT)
    if len(at) <= _SHORT:  # two waves at a time: half the calls, for a byte in ten thousand
        ends = ends[::-2][::-1]
    base, features = _sampled(plane, at, ends, bits, nodes, step)
    return _worth(base, features, bits[::step], len(at))


def fitted_ahead(ahead: Foresight) -> tuple[Weights, Ints]:
    """The same of a plane that is foreseen, and the logits (N,) that they make."""
    count = len(ahead.at)
    if not ahead.view.subsets or count < _FEW:
        return {}, ahead.base
    step = -(-count // _FIT)
    features = ahead.features()
    weights = _worth(ahead.base[::step], features[:, ::step], ahead.bits[::step], count)
    return weights, ahead.base + _mixed(features, weights)


def _worth(base: Ints, features: NDArray[Any], bits: Bits, count: int) -> Weights:
    """Those of the tables that save more than they take, for so many decisions like these."""
    weights, saved = fit_weights(features, base, bits)
    if saved * count / len(bits) <= _WORTH:
        return {}
    return {table: w for table, w in enumerate(weights.tolist()) if abs(w) >= _SMALLEST}


def _sampled(
    plane: Plane, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None, step: int
) -> tuple[Ints, Ints]:
    """The base logits (n,) and features (tables, n) of every `step`-th position.

    All positions count, as they will when the plane is coded; logits are worked out for few.
    """
    count = -(-len(at) // step)
    base = np.empty(count, np.int64)
    features = np.empty((len(plane.view.subsets), count), np.int64)
    for part, keys in plane.waves(at, ends):
        own = None if nodes is None else nodes[part]
        some = slice(-part.start % step, None, step)
        to = slice(-(-part.start // step), -(-part.stop // step))
        base[to] = plane.base(None if own is None else own[some])
        features[:, to] = plane.features(keys[:, some])
        if part.stop < len(at):
            plane.learn(keys, own, bits[part])
    return base, features


def _mixed(features: NDArray[np.float32], weights: Weights) -> Ints:
    """(N,) the weighed sum of the features, exact: see `Foresight.features`."""
    each = np.zeros(len(features), np.float32)
    each[list(weights)] = list(weights.values())
    return (each @ features).astype(np.int64) // WEIGHT_ONE
