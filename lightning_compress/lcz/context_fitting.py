"""Context selection and mixing weights of each bit plane, fitted by the encoder only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.lcz.context_model import (
    WEIGHT_ONE,
    AdaptiveBitModel,
    View,
    Weights,
    fit_weights,
    log2_256,
    priors,
    scan_slices,
)

__all__ = [
    "TWO_PASS_LIMIT",
    "TwoPassModel",
    "fit_plane_weights",
    "fit_two_pass",
]
TWO_PASS_LIMIT = 1 << 19  # positions of the largest tensor for which this is worth its memory
_KEYS = 1 << 17  # that are worked on in one go
_NARROW = 64  # rows that are cheaper to add up in one call, which is slow along this axis
Ints = NDArray[np.signedinteger[Any]]
Bits = NDArray[np.bool_]


class TwoPassModel:
    """Two-pass form of `AdaptiveBitModel`: its logits for all positions of one slab at once.

    Args:
        view: of a tensor of one slab, T tables.
        at: (N,) positions, scan by scan; at least one.
        ends: where each scan ends in `at`.
        bits: (N,) the decisions.
        nodes: (N,) below `kinds`; None: all 0.
        kinds: how many different nodes there can be.
    """

    def __init__(
        self, view: View, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None, kinds: int
    ) -> None:
        lengths = [part.stop - part.start for part in scan_slices(ends)]
        self.view, self.at, self.bits, self.scans = view, at, bits, len(lengths)
        self._scan = np.repeat(np.arange(len(lengths)), lengths)
        self._counted = len(at) - lengths[-1]  # the last scan's are before none
        self._one_positions = np.flatnonzero(bits[: self._counted])
        places = np.zeros(len(at), np.int64) if nodes is None else nodes.copy()
        zeros, ones = self._counts_before(places, kinds)
        self.base: Ints = (log2_256(2 * ones + 1) - log2_256(2 * zeros + 1)).take(places)
        self._totals = zeros.sum(1).tolist(), ones.sum(1).tolist()

    def features(self) -> NDArray[np.float32]:
        """(T, N) logit shift of each context against the plane's own counts.

        Integers below 2^14, since counts are at most 2^19: six of them, times weights of at
        most 2^7, still have an exact sum in single precision.
        """
        prior_counts = np.array([priors(*both) for both in zip(*self._totals, strict=True)]).T
        every = self.view.keys(self.at, range(len(self.view.context_axes)))
        found = np.empty((len(self.view.context_axes), len(self.at)), np.float32)
        for tables in self._context_batches():
            first, keys = 0, np.empty((len(tables), len(self.at)), np.int64)
            for row, table in zip(keys, tables, strict=True):
                np.add(next(every), first, out=row)
                first += self.view.sizes[table]
            found[tables] = self._logit_shifts_at(*_compacted(keys, first), prior_counts)
        return found

    def _context_batches(self) -> Iterator[list[int]]:
        """Batches of consecutive contexts of one number of axes, computed in one call."""
        step = max(_KEYS // len(self.at), 1)
        for _, alike in itertools.groupby(range(len(self.view.context_axes)), self._axes):
            tables = list(alike)
            for first in range(0, len(tables), step):
                yield tables[first : first + step]

    def _axes(self, table: int) -> int:
        return len(self.view.context_axes[table])

    def _counts_before(self, places: Ints, kinds: int) -> tuple[Ints, Ints]:
        """(S, kinds) zeros and ones before each scan; turns `places` into indices of them."""
        count = self.scans * kinds
        places += (self._scan + 1) * kinds
        counted = places[..., : self._counted]
        zeros = np.bincount(counted.reshape(-1), minlength=count).reshape(-1, kinds)
        ones = np.bincount(counted.take(self._one_positions, axis=-1).reshape(-1), minlength=count)
        ones = ones.reshape(-1, kinds)
        zeros -= ones
        places -= kinds
        if kinds < _NARROW:
            return zeros.cumsum(0), ones.cumsum(0)
        for scan in range(1, self.scans):
            zeros[scan] += zeros[scan - 1]
            ones[scan] += ones[scan - 1]
        return zeros, ones

    def _logit_shifts_at(self, keys: Ints, kinds: int, prior_counts: Ints) -> Ints:
        """Logit shifts at (..., N) keys below `kinds`; `keys` is overwritten."""
        zeros, ones = self._counts_before(keys, kinds)
        if zeros.size <= keys.size:
            scan = np.arange(self.scans)[:, None]
            return self._logit_shifts(zeros, ones, scan, prior_counts).take(keys)
        return self._logit_shifts(zeros.take(keys), ones.take(keys), self._scan, prior_counts)

    def _logit_shifts(self, zeros: Ints, ones: Ints, scan: Ints, prior_counts: Ints) -> Ints:
        """Logit shifts of (..., N) counts against the plane's counts before each scan."""
        logs = log2_256(prior_counts)
        shift = logs[1] - logs[0]
        most = int(max(zeros.max(), ones.max())) + 1
        if self.scans * most >= zeros.size:
            of_zeros = log2_256((zeros << 16) + prior_counts[0].take(scan))
            of_ones = log2_256((ones << 16) + prior_counts[1].take(scan))
            return of_ones - of_zeros - shift.take(scan)
        logs = log2_256((np.arange(most) << 16) + prior_counts[:, :, None])
        logs[1] -= shift[:, None]
        first = scan * most
        return logs[1].take(ones + first) - logs[0].take(zeros + first)


def _compacted(keys: Ints, kinds: int) -> tuple[Ints, int]:
    """Keys renumbered without those that do not occur, and their number."""
    if keys.size > kinds:
        return keys, kinds
    met = np.zeros(kinds, np.int64)
    met[keys] = 1
    places = np.cumsum(met)
    return places.take(keys) - 1, int(places[-1])


_FIT = 1 << 14  # positions that weights are fitted to
_SHORT = 1 << 18  # positions whose scans are taken two at a time
_WORTH = 24  # bits that a plane's weights must save to be stored
_SMALLEST = 2  # weights below it, in units of 1 / WEIGHT_ONE, are left out
_FEW = 512  # decisions in a plane that are too few to fit weights from


def fit_plane_weights(
    plane: AdaptiveBitModel, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None
) -> Weights:
    """Mixing weights by context for one plane, fitted to the first slab.

    Args:
        plane: without counts; useless afterwards.
        at: (N,) positions, scan by scan.
        ends: where each scan ends in `at`.
        bits: (N,) the decisions.
        nodes: (N,) of the positions; None: all 0.
    """
    if not plane.view.context_axes or len(at) < _FEW:
        return {}
    step = -(-len(at) // _FIT)
    if len(at) <= _SHORT:  # two scans at a time: half the calls, for a byte in ten thousand
        ends = ends[::-2][::-1]
    base, features = _sampled_features(plane, at, ends, bits, nodes, step)
    return _useful_weights(base, features, bits[::step], len(at))


def fit_two_pass(two_pass: TwoPassModel) -> tuple[Weights, Ints]:
    """Mixing weights by context from a two-pass fit, and the (N,) logits they give."""
    count = len(two_pass.at)
    if not two_pass.view.context_axes or count < _FEW:
        return {}, two_pass.base
    step = -(-count // _FIT)
    features = two_pass.features()
    weights = _useful_weights(
        two_pass.base[::step], features[:, ::step], two_pass.bits[::step], count
    )
    return weights, two_pass.base + _weighted_sum(features, weights)


def _useful_weights(base: Ints, features: NDArray[Any], bits: Bits, count: int) -> Weights:
    """The weights of `count` such decisions, empty if they save fewer bits than they cost."""
    weights, saved = fit_weights(features, base, bits)
    if saved * count / len(bits) <= _WORTH:
        return {}
    return {table: w for table, w in enumerate(weights.tolist()) if abs(w) >= _SMALLEST}


def _sampled_features(
    plane: AdaptiveBitModel, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None, step: int
) -> tuple[Ints, Ints]:
    """The base logits (n,) and features (tables, n) of every `step`-th position.

    All positions count, as they will when the plane is coded; logits are worked out for few.
    """
    count = -(-len(at) // step)
    base = np.empty(count, np.int64)
    features = np.empty((len(plane.view.context_axes), count), np.int64)
    for part, keys in plane.scans(at, ends):
        own = None if nodes is None else nodes[part]
        some = slice(-part.start % step, None, step)
        to = slice(-(-part.start // step), -(-part.stop // step))
        base[to] = plane.base(None if own is None else own[some])
        features[:, to] = plane.features(keys[:, some])
        if part.stop < len(at):
            plane.update(keys, own, bits[part])
    return base, features


def _weighted_sum(features: NDArray[np.float32], weights: Weights) -> Ints:
    """(N,) weighted sum of the features, exact: see `TwoPassModel.features`."""
    each = np.zeros(len(features), np.float32)
    each[list(weights)] = list(weights.values())
    return (each @ features).astype(np.int64) // WEIGHT_ONE
