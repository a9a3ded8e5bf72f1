"""Adaptive binary probability models, their contexts, and the scan order of a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ONE",
    "SLAB",
    "WEIGHT_ONE",
    "AdaptiveBitModel",
    "View",
    "Weights",
    "best_view",
    "count_dtype",
    "fit_weights",
    "log2_256",
    "log2_256_of",
    "priors",
    "probability",
    "scan_slices",
]
ONE = 1 << 20  # probabilities are in units of 1 / ONE
WEIGHT_ONE = 32  # a feature's weight is in units of 1 / WEIGHT_ONE
_LIMIT = 16 * 256  # logits beyond it are cut
_MANY = 1 << 12  # bits above which weights are first fitted to every eighth
_FRACTION = 10  # bits of the mantissa that choose an entry of the logarithm's table
Ints = NDArray[np.signedinteger[Any]]
Bits = NDArray[np.bool_]
Floats = NDArray[np.float32]
_LOG_TABLE = np.rint(256 * np.log2(1 + np.arange(1 << _FRACTION) / (1 << _FRACTION)))
_LOG_TABLE = _LOG_TABLE.astype(np.int64)
_LOGS: list[int] = _LOG_TABLE.tolist()
_PROBABILITY = np.rint(ONE / (1 + np.exp2(-np.arange(-_LIMIT, _LIMIT + 1) / 256))) / ONE


def log2_256(values: Ints) -> Ints:
    """256 times the base-2 logarithm of integers from 1 to 2^53, rounded.

    The exponent, and the ten bits after the leading one by a table.

    >>> log2_256(np.array([1, 2, 3, 1 << 40]))
    array([    0,   256,   406, 10240])
    """
    top = values.astype(np.float64).view(np.int64) >> 52 - _FRACTION  # exact: 11 + 10 bits
    exponent = (top >> _FRACTION) - 1023
    return 256 * exponent + _LOG_TABLE.take(top & (1 << _FRACTION) - 1)


def log2_256_of(value: int) -> int:
    """`log2_256` of one integer, twenty times as fast as by NumPy.

    >>> [log2_256_of(value) for value in (1, 2, 3, 1 << 40)]
    [0, 256, 406, 10240]
    """
    exponent = value.bit_length() - 1
    return 256 * exponent + _LOGS[(value << _FRACTION >> exponent) - (1 << _FRACTION)]


def probability(logits: Ints) -> NDArray[np.float64]:
    """Probabilities of (N,) logits: exact multiples of 1 / ONE, from 2^-16 to 1 - 2^-16.

    >>> probability(np.array([0, 256])).tolist()[0]
    0.5
    """
    return _PROBABILITY.take(logits + _LIMIT, mode="clip")


def fit_weights(
    features: NDArray[Any], offset: Ints, bits: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], float]:
    """Mixing weights of minimal code length, by Newton's method, and the bits they save.

    Args:
        features: (F, N) logits to be weighted.
        offset: (N,) logits that they are added to.
        bits: (N,) the decisions.

    Returns:
        (F,) integers from -128 to 127, `WEIGHT_ONE` standing for 1.
    """
    unit = math.log(2) / 256
    # Half the bits of a double are plenty: the weights end in steps of 1 / WEIGHT_ONE.
    x = np.multiply(features, unit, dtype=np.float32)
    base, y = np.multiply(offset, unit, dtype=np.float32), bits.astype(np.float32)
    weights = np.zeros(len(x), np.float32)
    for step in (8, 1) if len(y) > _MANY else (1,):  # close by means of a few, then to the point
        weights = _newton(weights, np.ascontiguousarray(x[:, ::step]), base[::step], y[::step])
    whole = np.clip(np.rint(weights * WEIGHT_ONE), -128, 127).astype(np.int64)
    after = base + (whole / WEIGHT_ONE).astype(np.float32) @ x
    saved = _code_length(base, bits) - _code_length(after, bits)
    return whole, saved / math.log(2)


def _newton(weights: Floats, x: Floats, base: Floats, y: Floats) -> Floats:
    """Newton iterations from initial weights."""
    ridge = np.eye(len(x), dtype=np.float32)
    for _ in range(8):
        p = 1 / (1 + np.exp(-(base + weights @ x)))
        gradient = x @ (p - y) + ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + ridge, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 0.05:  # what is left to do is about the square of it
            break
    return weights


def _code_length(logits: Floats, bits: NDArray[np.bool_]) -> float:
    """Code length of bits in nats under these natural logits."""
    wrong = np.where(bits, -logits, logits)
    costs = np.maximum(wrong, 0) + np.log(1 + np.exp(-np.abs(wrong)))
    return float(costs.sum(dtype=np.float64))


SLAB = 1 << 22  # positions that are worked on at a time, as long as a slice along A is not larger

# Powers 1, 2, 3 of the inverse of the root of x^4 = x + 1, times 2^32: a low-discrepancy lattice.
_LATTICE = (0xD1B54A33, 0xABC98388, 0x8CB92BA7)

# Scan w ends before this many 256ths of a slab: growing by a third, so that little is learned late.
_SCAN_ENDS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 40, 54, 73, 99, 134, 181, 256)
_SCAN_OF = np.searchsorted(_SCAN_ENDS, np.arange(256), side="right").astype(np.uint8)


@dataclass(frozen=True)
class View:
    """A tensor as a box of A x B x C, in the order of its elements.

    >>> View(2, 3, 4).shape, View(4, 4, 1).context_axes
    ((2, 3, 4), ((0,), (1,)))
    """

    a: int
    b: int
    c: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The three lengths."""
        return self.a, self.b, self.c

    @cached_property
    def context_axes(self) -> tuple[tuple[int, ...], ...]:
        """The axes and pairs of axes that define contexts, with 4 positions or more a key."""
        axes = [axis for axis in range(3) if self.shape[axis] > 1]
        sets = [*itertools.combinations(axes, 1), *itertools.combinations(axes, 2)]
        return tuple(subset for subset in sets if self._keys(subset) * 4 <= self._keys((0, 1, 2)))

    @cached_property
    def sizes(self) -> list[int]:
        """How many different keys each of `context_axes` has."""
        return [self._keys(subset) for subset in self.context_axes]

    def positions(self, table: int) -> int:
        """Number of positions that share a key of a context."""
        return self._keys((0, 1, 2)) // self.sizes[table]

    def _keys(self, subset: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in subset)

    @property
    def slab(self) -> int:
        """Positions of the largest slab: about `SLAB`, or one slice along A if that is more."""
        row = self.b * self.c
        return min(max(SLAB // row, 1), self.a) * row if row else 0

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Ranges of positions, cut along A."""
        end = self._keys((0, 1, 2))
        for start in range(0, end, self.slab or 1):
            yield start, min(start + self.slab, end)

    def scan_order(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Scan order of a slab: its positions, scan by scan, and where each scan ends.

        The top byte of the lattice's value at (a, b, c) selects the scan of that position.
        """
        rows = np.arange(start // (self.b * self.c), stop // (self.b * self.c), dtype=np.uint32)
        along = (rows, np.arange(self.b, dtype=np.uint32), np.arange(self.c, dtype=np.uint32))
        x, y, z = (axis * np.uint32(step) for axis, step in zip(along, _LATTICE, strict=True))
        top = ((x[:, None, None] + y[:, None] + z) >> np.uint32(24)).astype(np.uint8)
        scan = _SCAN_OF[top.reshape(-1)]
        order = np.argsort(scan, kind="stable")
        if stop < 1 << 31:
            order = order.astype(np.int32)  # half the memory
        order += start
        return order, np.cumsum(np.bincount(scan, minlength=len(_SCAN_ENDS)))

    def keys(self, positions: Ints, tables: Iterable[int]) -> Iterator[Ints]:
        """Key of each position, for one context after the other."""
        row = self.b * self.c
        pairs = positions // self.c if self.c > 1 else positions
        first = positions // row
        places = {
            (0,): lambda: first,
            (1,): lambda: pairs - first * self.b,
            (2,): lambda: positions - pairs * self.c,
            (0, 1): lambda: pairs,
            (0, 2): lambda: positions - (pairs - first) * self.c,
            (1, 2): lambda: positions - first * row,
        }
        for table in tables:
            yield places[self.context_axes[table]]()


def scan_slices(ends: Ints) -> list[slice]:
    """Slices of the scans that are not empty, given where each ends."""
    pairs = itertools.pairwise([0, *ends.tolist()])
    return [slice(start, stop) for start, stop in pairs if start < stop]


def best_view(symbols: NDArray[np.uint16], shape: tuple[int, ...]) -> View:
    """The view of a tensor whose contexts save most bits of its zero flags."""
    views = candidate_views(shape)
    if len(views) == 1:
        return views[0]
    some = (symbols > 0).astype(np.float32)
    return max(
        views, key=lambda view: _bits_saved(_ones_by_context(some.reshape(view.shape)), view)
    )


def _ones_by_context(some: NDArray[np.float32]) -> dict[tuple[int, ...], Ints]:
    """By axes of a context: number of ones of each key. Exact below 2^24 ones in a line."""
    pairs = {(0, 1): some.sum(2), (0, 2): some.sum(1), (1, 2): some.sum(0)}
    counts = {subset: ones.astype(np.int64) for subset, ones in pairs.items()}
    first, second = counts[0, 2], counts[1, 2]
    return counts | {(0,): first.sum(1), (1,): second.sum(1), (2,): second.sum(0)}


def _bits_saved(ones: dict[tuple[int, ...], Ints], view: View) -> float:
    """Estimate of the bits that contexts on disjoint axes save, less their learning cost."""
    count = math.prod(view.shape)
    total = float(_binary_entropy(ones[0,].sum() / count) * count)
    gains: dict[tuple[int, ...], float] = {}
    for table, subset in enumerate(view.context_axes):
        each = view.positions(table)
        left = _decision_entropies(ones[subset], each).sum() * each
        gains[subset] = max(total - left - 0.5 * math.log2(each) * view.sizes[table], 0.0)
    apart = (((0,), (1,), (2,)), ((0, 1), (2,)), ((0, 2), (1,)), ((1, 2), (0,)))
    most = max(sum(gains.get(subset, 0.0) for subset in context_axes) for context_axes in apart)
    return most + sum(gains.values()) / 10  # redundant contexts help at the start


def _decision_entropies(ones: Ints, each: int) -> NDArray[np.float64]:
    """Binary entropy of each key in bits, where `ones` of `each` decisions were ones."""
    if each < ones.size:
        return _binary_entropy(np.arange(each + 1) / each).take(ones)
    return _binary_entropy(ones / each)


def _binary_entropy(share: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Binary entropy of a share of ones, in bits."""
    p = np.clip(share, 1e-9, 1 - 1e-9)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def candidate_views(shape: tuple[int, ...]) -> list[View]:
    """Candidate views of a tensor; the first is the plain one.

    Kernels become C. A matrix next to a convolution has rows or columns that are channels times
    positions of a square image; its shape does not say which.

    >>> [view.shape for view in candidate_views((8, 4, 3, 3))]
    [(8, 4, 9)]
    >>> [view.shape for view in candidate_views((18, 5))]
    [(18, 5, 1), (2, 9, 5)]
    """
    if len(shape) != 2:
        first, second = (*shape[:2], 1, 1)[:2]
        return [View(first, second, math.prod(shape[2:]))]
    rows, columns = shape
    views = [View(rows, columns, 1)]
    for side in range(3, 17):
        square = side * side
        if rows % square == 0 and rows > square:
            views.append(View(rows // square, square, columns))
        if columns % square == 0 and columns > square:
            views.append(View(rows, columns // square, square))
    return views


_BATCH = 1 << 16  # keys computed in one call, instead of by scan and context
_HALF_UNIT = 1 << 15  # probabilities of counts are in units of 1 / 2^16
_PRIOR = 6  # how many observations the whole plane's probability counts for in each table
Weights = dict[int, int]  # by table


class AdaptiveBitModel:
    """Adaptive binary model of one bit plane: counts of its nodes and of each context's keys.

    The logit of a one is its node's, plus a weighted sum of the logit shift of each context. The
    counts of all contexts are in one array, so that one call updates them.

    Args:
        view: of the tensor; gives the contexts.
        nodes: how many values the node of a position can have.
        tables: indices of the T contexts in use; None: all.
    """

    def __init__(self, view: View, nodes: int = 1, tables: Iterable[int] | None = None) -> None:
        self.view = view
        self._tables = tuple(range(len(view.context_axes)) if tables is None else tables)
        sizes = [view.sizes[table] for table in self._tables]
        self._first = np.cumsum([0, *sizes], dtype=np.int32)[:-1, None]
        self._most = max((view.positions(table) for table in self._tables), default=0)
        self._nodes = np.zeros((2, nodes), np.int64)
        self._counts = np.zeros((2, sum(sizes)), count_dtype(self._most))

    def keys(self, positions: Ints) -> Ints:
        """(T, N) index of each position's counts, by context."""
        keys = np.empty((len(self._tables), len(positions)), np.int32)  # half the memory
        for row, places in zip(keys, self.view.keys(positions, self._tables), strict=True):
            row[:] = places
        keys += self._first
        return keys

    def scans(self, at: Ints, ends: Ints) -> Iterator[tuple[slice, Ints]]:
        """The scans that are not empty, each with its keys."""
        keys = self.keys(at) if len(at) * len(self._tables) <= _BATCH else None
        for part in scan_slices(ends):
            yield part, self.keys(at[part]) if keys is None else keys[:, part]

    def base(self, nodes: Ints | None) -> Ints:
        """(N,) logit of each position's node; (1,) for None, where all have node 0."""
        if nodes is None:
            zeros, ones = self._nodes[:, 0].tolist()
            return np.array([log2_256_of(2 * ones + 1) - log2_256_of(2 * zeros + 1)])
        logs = log2_256(2 * self._nodes + 1)
        return (logs[1] - logs[0]).take(nodes)

    def features(self, keys: Ints) -> Ints:
        """(T, N) logit shift at (T, N) keys against the plane's own counts."""
        return self._logit_shifts_at(keys, self._counts, self._most)

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
        if keys.size <= _BATCH:
            total = (self.features(keys) * np.array(each)[:, None]).sum(0)
        else:  # table by table: not all features in memory at once
            total = np.zeros(keys.shape[1], np.int64)
            bounds = itertools.pairwise([*self._first[:, 0].tolist(), self._counts.shape[1]])
            for table, row, (start, stop) in zip(self._tables, keys, bounds, strict=True):
                counts, most = self._counts[:, start:stop], self.view.positions(table)
                total += weights[table] * self._logit_shifts_at(row - start, counts, most)
        return base + total // WEIGHT_ONE

    def _logit_shifts_at(self, keys: Ints, counts: Ints, most: int) -> Ints:
        """Logit shifts at keys, computed for all keys or for these, whichever are fewer."""
        if keys.size < counts.shape[1]:
            return self._logit_shifts(counts.take(keys, axis=1), most)
        return self._logit_shifts(counts, most).take(keys)

    def _logit_shifts(self, counts: Ints, most: int) -> Ints:
        """Logit shifts of (2, ...) counts up to `most` against the plane's own counts."""
        zeros, ones = self._nodes.sum(1).tolist()
        prior_counts = priors(zeros, ones)
        prior = np.array(prior_counts).reshape(2, *[1] * (counts.ndim - 1))
        most = min(most, zeros + ones)
        if 2 * most < counts[0].size:
            logs = log2_256((np.arange(most + 1) << 16) + prior.reshape(2, 1))
            found = logs[1].take(counts[1]) - logs[0].take(counts[0])
        else:
            logs = log2_256((counts.astype(np.int64) << 16) + prior)
            found = logs[1] - logs[0]
        found -= log2_256_of(prior_counts[1]) - log2_256_of(prior_counts[0])
        return found

    def update(self, keys: Ints, nodes: Ints | None, bits: Bits) -> None:
        """Add the bits of a scan to the counts of nodes and contexts."""
        ones = bits.astype(np.int64)
        if nodes is None:
            self._nodes += np.bincount(ones, minlength=2)[:, None]
        else:
            _add_counts(self._nodes, nodes, ones)
        for rows in (keys,) if keys.size <= _BATCH else keys:
            _add_counts(self._counts, rows, ones)


def count_dtype(most: int) -> np.dtype[np.signedinteger[Any]]:
    """The smaller of two dtypes of counts up to `most`."""
    return np.dtype(np.int32 if most < 1 << 31 else np.int64)


def priors(zeros: int, ones: int) -> tuple[int, int]:
    """Prior counts of each key from the plane's counts, in units of 1 / 2^16."""
    share = (2 * ones + 1) * _HALF_UNIT // (ones + zeros + 1)
    share = min(max(share, 1), 2 * _HALF_UNIT - 1)
    return _PRIOR * (2 * _HALF_UNIT - share), _PRIOR * share


def _add_counts(counts: Ints, keys: Ints, ones: Ints) -> None:
    """Add decisions to counts, in time linear in the keys (`bincount`: in all possible keys)."""
    places = (keys + counts.shape[1] * ones).reshape(-1)
    np.add.at(counts.reshape(-1), places, counts.dtype.type(1))  # of one dtype: twice as fast
