"""Labels: entries along axes of tensors that stay or go together, as classes of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["Labels", "Ledger", "Space", "Use"]

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Use:
    """One axis of a parameter or buffer along which labelled entries lie.

    Args:
        path: of the tensor in the traced module.
        dim: the axis.
        labels: one an entry of the axis.
        role: "out": a weight that makes the entries; "in": one that reads them, so that zeros
            there hide whatever they hold; "through": all else, such as biases and norms.
    """

    path: str
    dim: int
    labels: Labels
    role: str


@dataclass(frozen=True)
class Space:
    """Labels that were made together: the output of a layer, or an axis of an input."""

    where: str
    labels: Labels


class Ledger:
    """All labels of one trace, what joins them, and what must stay.

    >>> ledger = Ledger()
    >>> one, two = ledger.fresh(2, "one"), ledger.fresh(2, "two")
    >>> ledger.join(one, two)
    >>> ledger.classes().tolist()
    [0, 1, 0, 1]
    """

    def __init__(self) -> None:
        self.count = 0
        self.spaces: list[Space] = []
        self.uses: dict[tuple[str, int], Use] = {}
        self.work: dict[str, float] = {}  # multiply-accumulates of an example for each weight
        self.fixed: list[tuple[Labels, str]] = []
        self.released: list[Labels] = []
        self.sized: dict[str, Labels] = {}  # layers without tensors that know a size
        self._edges: list[tuple[Labels, Labels]] = []

    def fresh(self, size: int, where: str) -> Labels:
        """Labels for entries that nothing is known of yet."""
        labels = np.arange(self.count, self.count + size)
        self.count += size
        self.spaces.append(Space(where, labels))
        return labels

    def join(self, one: Labels, other: Labels) -> None:
        """Let entries share their fate, pair by pair."""
        self._edges.append((one.ravel(), other.ravel()))

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Keep entries whatever happens."""
        if labels is not None and labels.size:
            self.fixed.append((labels.ravel(), reason))

    def release(self, labels: Labels) -> None:
        """Let entries go although inputs or outputs hold them: recurrent states fed back."""
        self.released.append(labels.ravel())

    def use(self, path: str, dim: int, labels: Labels, role: str) -> None:
        """Note where labelled entries lie; an axis that is noted twice joins both."""
        known = self.uses.get((path, dim))
        if known is None:
            self.uses[path, dim] = Use(path, dim, labels, role)
            return
        self.join(known.labels, labels)
        if known.role != role and "through" not in (known.role, role):
            # Made by one layer and read by another, as tied weights are.
            self.uses[path, dim] = Use(path, dim, known.labels, "through")

    def works(self, path: str, positions: float) -> None:
        """Count that each weight of a tensor is multiplied so many times for one example."""
        self.work[path] = self.work.get(path, 0.0) + positions

    def classes(self) -> Labels:
        """The class of each label: what is joined, directly or not, is in one."""
        if not self._edges:
            return np.arange(self.count)
        ends = [np.concatenate(side) for side in zip(*self._edges, strict=True)]
        ones = np.ones(len(ends[0]), dtype=np.int8)
        graph = coo_matrix((ones, tuple(ends)), shape=(self.count, self.count))
        return _by_first(connected_components(graph, directed=False)[1].astype(np.int64))

    def held(self, classes: Labels) -> dict[int, str]:
        """Classes that must stay, with the first reason that was given."""
        free = set(_members(classes, self.released))
        held: dict[int, str] = {}
        for labels, reason in self.fixed:
            edge = reason.startswith(("input", "output"))
            for one in np.unique(classes[labels]).tolist():
                if not (edge and one in free):
                    held.setdefault(one, reason)
        return held


def _members(classes: Labels, labels: Iterable[Labels]) -> list[int]:
    return [one for some in labels for one in np.unique(classes[some]).tolist()]


def _by_first(classes: Labels) -> Labels:
    """The same classes, numbered in the order of their first members."""
    _, first, inverse = np.unique(classes, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse.ravel()]
