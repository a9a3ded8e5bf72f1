"""The order in which the context coder visits a tensor: a few growing waves spread over all of it.

A wave holds positions of every row, column and kernel place in proportion, so that what the waves
before it say of a row holds for the row, and a whole wave is modelled and coded in one call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["SLAB", "View", "best_view", "parts"]

SLAB = 1 << 22  # positions that are worked on at a time, as long as a slice along A is not larger
# Powers 1, 2, 3 of the inverse of the root of x^4 = x + 1, times 2^32: a low-discrepancy lattice.
_LATTICE = (0xD1B54A33, 0xABC98388, 0x8CB92BA7)
# Wave w ends before this many 256ths of a slab: growing by a third, so that little is learnt late.
_ENDS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 40, 54, 73, 99, 134, 181, 256)
_WAVE_OF = np.searchsorted(_ENDS, np.arange(256), side="right").astype(np.uint8)

Ints = NDArray[np.int64]


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
        order = np.argsort(wave, kind="stable") + start
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
