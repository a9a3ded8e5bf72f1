"""The probability of one binary decision at each position, learnt from the waves before it."""

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
    "Plane",
    "View",
    "Weights",
    "best_view",
    "fit_weights",
    "log2_256",
    "log2_256_of",
    "parts",
    "priors",
    "probability",
]
ONE = 1 << 20  # probabilities are in units of 1 / ONE
WEIGHT_ONE = 32  # a feature's weight is in units of 1 / WEIGHT_ONE
_LIMIT = 16 * 256  # logits beyond it are cut
_MANY = 1 << 12  # bits that weights are first fitted to a few of
_FRACTION = 10  # bits of the mantissa that choose an entry of the logarithm's table
Ints = NDArray[np.signedinteger[Any]]
Bits = NDArray[np.bool_]
Floats = NDArray[np.float32]
_LOG_TABLE = np.rint(256 * np.log2(1 + np.arange(1 << _FRACTION) / (1 << _FRACTION)))
_LOG_TABLE = _LOG_TABLE.astype(np.int64)
_LOGS: list[int] = _LOG_TABLE.tolist()
_PROBABILITY = np.rint(ONE / (1 + np.exp2(-np.arange(-_LIMIT, _LIMIT + 1) / 256))) / ONE


def log2_256(values: Ints) -> Ints:
    """256 times the base-2 logarithm of whole numbers from 1 to 2^53, rounded.

    The exponent, and the ten bits after the leading one by a table.

    >>> log2_256(np.array([1, 2, 3, 1 << 40]))
    array([    0,   256,   406, 10240])
    """
    top = values.astype(np.float64).view(np.int64) >> 52 - _FRACTION  # exact: 11 + 10 bits
    exponent = (top >> _FRACTION) - 1023
    return 256 * exponent + _LOG_TABLE.take(top & (1 << _FRACTION) - 1)


def log2_256_of(value: int) -> int:
    """`log2_256` of one number, which NumPy would take twenty times as long for.

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
    """Weights of least code length, by Newton's method, and how many bits they save.

    Args:
        features: (F, N) logits to be weighed.
        offset: (N,) logits that they are added to.
        bits: (N,) what is coded.

    Returns:
        (F,) whole numbers from -128 to 127, `WEIGHT_ONE` standing for 1.
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
    saved = _nats(base, bits) - _nats(after, bits)
    return whole, saved / math.log(2)


def _newton(weights: Floats, x: Floats, base: Floats, y: Floats) -> Floats:
    """Weights of less code length, from some on."""
    ridge = np.eye(len(x), dtype=np.float32)
    for _ in range(8):
        p = 1 / (1 + np.exp(-(base + weights @ x)))
        gradient = x @ (p - y) + ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + ridge, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 0.05:  # what is left to do is about the square of it
            break
    return weights


def _nats(logits: Floats, bits: NDArray[np.bool_]) -> float:
    """What it costs to code bits with these natural logits."""
    wrong = np.where(bits, -logits, logits)
    costs = np.maximum(wrong, 0) + np.log(1 + np.exp(-np.abs(wrong)))
    return float(costs.sum(dtype=np.float64))


SLAB = 1 << 22  # positions that are worked on at a time, as long as a slice along A is not larger

# Powers 1, 2, 3 of the inverse of the root of x^4 = x + 1, times 2^32: a low-discrepancy lattice.
_LATTICE = (0xD1B54A33, 0xABC98388, 0x8CB92BA7)

# Wave w ends before this many 256ths of a slab: growing by a third, so that little is learnt late.
_ENDS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 40, 54, 73, 99, 134, 181, 256)
_WAVE_OF = np.searchsorted(_ENDS, np.arange(256), side="right").astype(np.uint8)


@dataclass(frozen=True)
class View:
    """A tensor as a box of A x B x C, in the order of its elements.

    >>> View(2, 3, 4).shape, View(4, 4, 1).subsets
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
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """The axes, and pairs of them, along which counts are kept: 4 positions or more a key."""
        axes = [axis for axis in range(3) if self.shape[axis] > 1]
        sets = [*itertools.combinations(axes, 1), *itertools.combinations(axes, 2)]
        return tuple(subset for subset in sets if self._keys(subset) * 4 <= self._keys((0, 1, 2)))

    @cached_property
    def sizes(self) -> list[int]:
        """How many different keys each of `subsets` has."""
        return [self._keys(subset) for subset in self.subsets]

    def positions(self, table: int) -> int:
        """How many positions share a key of a table."""
        return self._keys((0, 1, 2)) // self.sizes[table]

    def _keys(self, subset: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in subset)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Ranges of positions, cut along A, of about `SLAB` positions each."""
        row = self.b * self.c
        step = max(SLAB // row, 1) * row if row else 1
        for start in range(0, self.a * row, step):
            yield start, min(start + step, self.a * row)

    def waves(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """The positions of a slab in the order of their waves, and where each wave ends.

        Position (a, b, c) is in the wave that the top byte of the lattice's value at it says.
        """
        rows = np.arange(start // (self.b * self.c), stop // (self.b * self.c), dtype=np.uint32)
        along = (rows, np.arange(self.b, dtype=np.uint32), np.arange(self.c, dtype=np.uint32))
        x, y, z = (axis * np.uint32(step) for axis, step in zip(along, _LATTICE, strict=True))
        top = ((x[:, None, None] + y[:, None] + z) >> np.uint32(24)).astype(np.uint8)
        wave = _WAVE_OF[top.reshape(-1)]
        order = np.argsort(wave, kind="stable")
        if stop < 1 << 31:
            order = order.astype(np.int32)  # half the memory
        order += start
        return order, np.cumsum(np.bincount(wave, minlength=len(_ENDS)))

    def keys(self, positions: Ints, tables: Iterable[int]) -> Iterator[Ints]:
        """For each table, when it is asked for: the place of each position in it."""
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
            yield places[self.subsets[table]]()


def parts(ends: Ints) -> list[slice]:
    """The waves that are not empty, given where each ends."""
    pairs = itertools.pairwise([0, *ends.tolist()])
    return [slice(start, stop) for start, stop in pairs if start < stop]


def best_view(symbols: NDArray[np.uint16], shape: tuple[int, ...]) -> View:
    """The view of a tensor whose tables tell most of where its zeros are."""
    views = candidate_views(shape)
    if len(views) == 1:
        return views[0]
    some = (symbols > 0).astype(np.float32)
    return max(views, key=lambda view: _told(_ones(some.reshape(view.shape)), view))


def _ones(some: NDArray[np.float32]) -> dict[tuple[int, ...], Ints]:
    """By subset of the axes: how many ones each key has. Exact below 2^24 ones in a line."""
    pairs = {(0, 1): some.sum(2), (0, 2): some.sum(1), (1, 2): some.sum(0)}
    counts = {subset: ones.astype(np.int64) for subset, ones in pairs.items()}
    first, second = counts[0, 2], counts[1, 2]
    return counts | {(0,): first.sum(1), (1,): second.sum(1), (2,): second.sum(0)}


def _told(ones: dict[tuple[int, ...], Ints], view: View) -> float:
    """Bits that the tables of axes told apart tell, less what it takes to learn them."""
    count = math.prod(view.shape)
    total = float(_bits(ones[0,].sum() / count) * count)
    gains: dict[tuple[int, ...], float] = {}
    for table, subset in enumerate(view.subsets):
        each = view.positions(table)
        left = _entropies(ones[subset], each).sum() * each
        gains[subset] = max(total - left - 0.5 * math.log2(each) * view.sizes[table], 0.0)
    apart = (((0,), (1,), (2,)), ((0, 1), (2,)), ((0, 2), (1,)), ((1, 2), (0,)))
    most = max(sum(gains.get(subset, 0.0) for subset in subsets) for subsets in apart)
    return most + sum(gains.values()) / 10  # tables that tell the same again help at the start


def _entropies(ones: Ints, each: int) -> NDArray[np.float64]:
    """Entropy of a decision, in bits, where so many of `each` were ones."""
    if each < ones.size:
        return _bits(np.arange(each + 1) / each).take(ones)
    return _bits(ones / each)


def _bits(share: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Entropy of a decision, in bits."""
    p = np.clip(share, 1e-9, 1 - 1e-9)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def candidate_views(shape: tuple[int, ...]) -> list[View]:
    """Views of a tensor that are worth a try; the first is the plain one.

    Kernels become C. A matrix next to a convolution has rows or columns that are channels times
    places of a square picture; which, its shape does not tell.

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


_AT_ONCE = 1 << 16  # keys that are worked on in one go, rather than wave by wave, table by table
_HALF = 1 << 15  # probabilities of counts are in units of 1 / 2^16
_PRIOR = 6  # how many observations the whole plane's probability counts for in each table
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
        self._first = np.cumsum([0, *sizes], dtype=np.int32)[:-1, None]
        self._most = max((view.positions(table) for table in self._tables), default=0)
        self._nodes = np.zeros((2, nodes), np.int64)
        self._counts = np.zeros((2, sum(sizes)), np.int64)

    def keys(self, positions: Ints) -> Ints:
        """(T, N) where the counts of each position are, table by table."""
        keys = np.empty((len(self._tables), len(positions)), np.int32)  # half the memory
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
        return self._asked(keys, self._counts, self._most)

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
            for table, row, (start, stop) in zip(self._tables, keys, bounds, strict=True):
                counts, most = self._counts[:, start:stop], self.view.positions(table)
                total += weights[table] * self._asked(row - start, counts, most)
        return base + total // WEIGHT_ONE

    def _asked(self, keys: Ints, counts: Ints, most: int) -> Ints:
        """What counts say at keys: worked out for all there are, or for those that are asked."""
        if keys.size < counts.shape[1]:
            return self._beyond(counts.take(keys, axis=1), most)
        return self._beyond(counts, most).take(keys)

    def _beyond(self, counts: Ints, most: int) -> Ints:
        """How far the logits of (2, ...) counts, up to `most`, lie from the plane's alone."""
        zeros, ones = self._nodes.sum(1).tolist()
        believed = priors(zeros, ones)
        prior = np.array(believed).reshape(2, *[1] * (counts.ndim - 1))
        most = min(most, zeros + ones)
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
