"""Which runs are not beaten in both size and quality."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(
    points: Sequence[tuple[float, float]], *, higher_is_better: bool = False
) -> list[int]:
    """Return the indices of the points that no other point dominates, smallest size first.

    Args:
        points: pairs (size, quality); smaller sizes are better. Pairs with NaN never win.
        higher_is_better: the direction of the quality.

    A point is dominated when another is at least as good in both values and better in one;
    equal points keep each other.

    >>> pareto_front([(10, 1.0), (20, 0.5), (30, 0.7)])
    [0, 1]
    """
    sign = -1.0 if higher_is_better else 1.0
    known = [(x, sign * y, i) for i, (x, y) in enumerate(points) if not math.isnan(x + y)]
    front: list[tuple[float, float, int]] = []
    for x, y, index in sorted(known):
        # Sorted by size, a point survives only where it improves on the best quality so far.
        if not front or y < front[-1][1] or (x, y) == front[-1][:2]:
            front.append((x, y, index))
    return [index for _, _, index in front]
