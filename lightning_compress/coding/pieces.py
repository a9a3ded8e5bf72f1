"""Long arrays piece by piece: NumPy makes 64-bit numbers of what it counts or looks up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["by_piece", "tally"]

Narrow = TypeVar("Narrow", bound=np.integer)

PIECE = 1 << 18  # elements that are worked on at a time: 2 MB of 64-bit numbers


def tally(values: NDArray[np.integer], size: int = 0) -> NDArray[np.intp]:
    """How often each value occurs in (N,) values, as `np.bincount`.

    >>> tally(np.array([2, 0, 2], np.uint8))
    array([1, 0, 2])
    """
    size = max(size, int(values.max()) + 1 if len(values) else 0)
    counts = np.zeros(size, np.intp)
    for piece in _pieces(len(values)):
        counts += np.bincount(values[piece], minlength=size)
    return counts


def by_piece(
    function: Callable[[NDArray[Any]], NDArray[np.integer]],
    values: NDArray[np.integer],
    dtype: type[Narrow],
) -> NDArray[Narrow]:
    """`function` of (N,) values, element by element.

    >>> by_piece(np.square, np.array([1, 2, 3]), np.int32)
    array([1, 4, 9], dtype=int32)
    """
    out = np.empty(len(values), dtype)
    for piece in _pieces(len(values)):
        out[piece] = function(values[piece])
    return out


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, count, PIECE))
