"""Zero runs and non-zero values as two streams of symbols (Han et al. 2016, arXiv:1510.00149)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError

__all__ = ["ESCAPE", "join_runs", "max_runs", "split_runs"]

ESCAPE = 255  # this run symbol means: 255 zeros, and no value after them

Symbols = NDArray[np.uint16]


def split_runs(symbols: Symbols) -> tuple[Symbols, Symbols]:
    """Runs of zeros before each value, and the values that are not zero.

    Zeros after the last value are left out: the count of symbols tells them.

    Returns:
        (R,) run symbols up to `ESCAPE` and (V,) values, R >= V.

    >>> runs, values = split_runs(np.array([0, 0, 7, 5, 0], np.uint16))
    >>> runs.tolist(), values.tolist()
    ([2, 0], [7, 5])
    """
    places = np.flatnonzero(symbols)
    gaps = np.diff(places, prepend=-1) - 1
    escapes, remainder = np.divmod(gaps, ESCAPE)
    last = np.cumsum(escapes + 1) - 1  # where each gap's closing run symbol goes
    runs = np.full(last[-1] + 1 if len(last) else 0, ESCAPE, np.uint16)
    runs[last] = remainder
    return runs, symbols[places]


def max_runs(values: int, count: int) -> int:
    """The most run symbols that `values` non-zero symbols among `count` can take."""
    return values + count // ESCAPE


def join_runs(runs: Symbols, values: Symbols, count: int) -> Symbols:
    """The opposite of `split_runs`, for `count` symbols.

    Raises:
        CorruptArtifactError: when runs and values do not belong together or lead past the end.

    >>> join_runs(np.array([2, 0], np.uint16), np.array([7, 5], np.uint16), 5)
    array([0, 0, 7, 5, 0], dtype=uint16)
    """
    closing = runs != ESCAPE
    if int(closing.sum()) != len(values) or not closing[-1:].all():
        raise CorruptArtifactError("the zero runs do not fit the non-zero values")
    if len(runs) and runs.max() > ESCAPE:
        raise CorruptArtifactError(f"a zero run of {runs.max()}, above {ESCAPE}")
    places = np.cumsum(runs + closing, dtype=np.int64)[closing] - 1
    if len(places) and places[-1] >= count:
        raise CorruptArtifactError(f"a zero run leads to {places[-1]}, past the end at {count}")
    out = np.zeros(count, np.uint16)
    out[places] = values
    return out
