"""Judging a noisy metric: what several readings say of a limit. Pure numbers.

Costs are always such that less is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

__all__ = ["LONGEST", "estimated_spread", "judge", "recent"]

LONGEST = 4  # times the patience: the most readings of a trial


def recent(readings: Sequence[float]) -> float:
    """Mean of the later half of some readings: what came right after a change counts no more.

    >>> recent([9.0, 3.0, 2.0]), recent([4.0])
    (2.5, 4.0)
    """
    return fmean(readings[len(readings) // 2 :])


def estimated_spread(readings: Sequence[float]) -> float:
    """Standard deviation of single readings around a trend that is smooth; 0 for less than 3.

    From second differences, which a straight trend leaves at 0: those of independent noise have
    6 times its variance. By their median size, so that a single outlier does not count.

    >>> estimated_spread([5.0, 4.0, 3.0, 2.0])
    0.0
    """
    trios = zip(readings, readings[1:], readings[2:], strict=False)
    bends = [abs(a - 2 * b + c) for a, b, c in trios]
    return 1.4826 * median(bends) / math.sqrt(6) if bends else 0.0


def judge(
    readings: Sequence[float],
    limit: float,
    *,
    spread: float = 0.0,
    patience: int = 4,
    confidence: float = 1.0,
) -> bool | None:
    """Whether the cost has come to a limit since something changed.

    Clear cases are decided early: below the limit by more than the noise, or so far above it that
    even a straight line through the recovery so far would not get there. After `patience` readings
    the mean of the later half decides, but a cost that still falls, fast enough to be there within
    twice as many again, may go on: what was trained is worth more than the readings. After
    `LONGEST` times the patience it must be decided.

    Args:
        readings: costs since the change, in order.
        limit: the highest cost that will do.
        spread: standard deviation of a single reading.
        patience: readings after which it is decided, unless the cost still falls.
        confidence: standard errors that make a case clear.

    Returns:
        True, False, or None to wait for another reading.

    >>> judge([1.0], 2.0), judge([5.0, 5.0], 2.0), judge([5.0, 3.0], 2.0)
    (True, False, None)
    >>> judge([1.9], 2.0, spread=0.5) is None
    True
    """
    if not readings or not all(map(math.isfinite, readings)):
        return False if readings else None
    count = len(readings)
    now = recent(readings[-2 * patience :])
    margin = confidence * spread / math.sqrt(min(count - count // 2, patience))
    off = readings[-1] - confidence * spread > limit  # whatever the mean says, it is getting worse
    if now + margin <= limit and not off:
        return True
    if count < patience:
        return None if count < 2 or _may_come(readings, limit, patience, margin) else False
    if now <= limit and not off:
        return True
    left = (now - limit) / max(_pace(readings[-patience:]), 1e-300)
    return None if left <= 2 * patience and count < LONGEST * patience else False


def _may_come(readings: Sequence[float], limit: float, patience: int, margin: float) -> bool:
    """Whether a straight line through all readings, and the noise, comes to the limit in time."""
    pace = max((readings[0] - readings[-1] + margin) / (len(readings) - 1), 0.0)
    return readings[-1] - pace * (3 * patience - len(readings)) - margin <= limit


def _pace(readings: Sequence[float]) -> float:
    """How fast the cost falls, in a reading: from the earlier half's mean to the later one's."""
    half = len(readings) // 2
    if half == 0:
        return 0.0
    return max(fmean(readings[:half]) - fmean(readings[-half:]), 0.0) / (len(readings) - half)
