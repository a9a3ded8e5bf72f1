"""Units: what is pruned as one, with a score each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.pruning.layout import Layout
from lightning_compress.sharding import Shards

__all__ = ["Granularity", "Units", "largest"]


@dataclass(frozen=True)
class Units:
    """What is pruned in one weight: units with a score each, and the way back to weights.

    Args:
        scores: one a unit, of any shape; infinite where a unit must stay.
        closed: True where a unit is pruned already and stays so, of the same shape; or None.
        capacity: number of units that may go.
        shape: of the weight.
        spread: from a unit mask (of the shape of `scores`) to the weight's mask.
        shards: of a weight that is spread over processes: `scores` and `closed` are one's part.
        size: weights in each unit: one number, or one a unit, of the shape of `scores`.
    """

    scores: Tensor
    closed: Tensor | None
    capacity: int
    shape: torch.Size
    spread: Callable[[Tensor], Tensor]
    shards: Shards | None = None
    size: int | Tensor = 1

    @property
    def largest(self) -> int:
        """Weights in the largest unit."""
        return largest(self.size)

    @property
    def open(self) -> int:
        """Number of units that may stay: what is not closed."""
        return self.capacity - (0 if self.closed is None else self.count(self.closed))

    def count(self, flags: Tensor) -> int:
        """How many are True, over all processes that share the weight."""
        found = flags.sum()
        return int(found if self.shards is None else self.shards.sum(found))


def largest(size: int | Tensor) -> int:
    """The largest of the sizes of units; see `Units.size`."""
    return size if isinstance(size, int) else int(size.max())


class Granularity(Protocol):
    """Pools scores of weights into scores of units."""

    @property
    def limit(self) -> float:
        """The sparsity at which all is pruned that may be: 1, or 1 - n/m for n:m."""
        ...

    @property
    def pools(self) -> bool:
        """Whether a unit holds more than one weight."""
        ...

    def units(
        self, scores: Tensor, layout: Layout, *, closed: Tensor | None, signed: bool
    ) -> Units:
        """Units of one weight.

        Args:
            scores: of the weight's shape.
            layout: of the weight.
            closed: True where a weight is pruned and must not return.
            signed: scores may be negative: pool by the sum instead of the L2 norm.
        """
        ...

    def size(self, shape: torch.Size, layout: Layout) -> int | Tensor:
        """Weights in each unit of a weight of a shape; see `Units.size`."""
        ...

    def rest(self, shapes: Mapping[str, torch.Size], layouts: Mapping[str, Layout]) -> list[str]:
        """What of the weights stays dense whatever is asked, in words."""
        ...
