"""Zero-order entropy: the bits that an ideal coder without contexts needs, with NumPy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["entropy_of_counts"]


def entropy_of_counts(counts: NDArray[np.integer]) -> float:
    """Bits of all symbols together, from how often each occurs.

    >>> entropy_of_counts(np.array([2, 0, 1, 1]))
    6.0
    """
    counts = counts[counts > 0]
    return float(counts @ np.log2(counts.sum() / counts)) if len(counts) else 0.0
