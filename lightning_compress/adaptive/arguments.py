"""Checks of what a budget is asked for, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["check_goal", "check_search", "check_window_of_run"]


def check_goal(max_degradation: float | None, max_bytes: float | None) -> None:
    """Check that there is one goal.

    Raises:
        ValueError: naming the value.
    """
    if (max_degradation is None) == (max_bytes is None):
        raise ValueError("give one of max_degradation and max_bytes")
    if max_degradation is not None and not 0 <= max_degradation < math.inf:
        raise ValueError(f"max_degradation={max_degradation!r} must be a fraction, 0 or more")
    if max_bytes is not None and not 0 < max_bytes < math.inf:
        raise ValueError(f"max_bytes={max_bytes!r} must be above 0")


def check_window_of_run(begin: float, end: float) -> None:
    """Check two fractions of a run.

    Raises:
        ValueError: naming them.
    """
    if not 0 <= begin < end <= 1:
        raise ValueError(f"begin={begin!r}, end={end!r}: fractions of the run, 0 <= begin < end")


def check_search(
    patience: int, stride: Sequence[float], spread: float | None, confidence: float
) -> None:
    """Check how a search proceeds.

    Raises:
        ValueError: naming the value and what is valid.
    """
    if not isinstance(patience, int) or patience < 1:
        raise ValueError(f"patience={patience!r} must be a whole number of readings, 1 or more")
    if len(stride) != 2 or not 0 < stride[1] <= stride[0] <= 1:
        raise ValueError(f"stride={stride!r}: give the first and the smallest, both in (0, 1]")
    for what, value in (("spread", spread), ("confidence", confidence)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{what}={value!r} must be 0 or more")
