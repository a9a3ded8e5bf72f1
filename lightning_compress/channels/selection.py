"""Select channels so that their number, the parameters or the MACs come down to a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.channels.graph import ChannelGraph, ChannelGroup, Flags
from lightning_compress.channels.trace import Nodes

__all__ = [
    "ABSOLUTE",
    "KINDS",
    "Compare",
    "Costs",
    "Rounding",
    "check_budget",
    "lowest_cost",
    "norm_scales",
    "normalize_by_group",
    "select_for_removal",
    "sum_over_units",
]
KINDS = ("macs", "params", "latency")
Scores = NDArray[np.float64]
Compare = Literal["group", "loss", "fraction"]
# Criteria whose scores are changes of the loss: they can be compared between layers as they are.
ABSOLUTE = ("taylor", "fisher", "obs")


def check_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    """The kind and the fraction of a budget such as `{"macs": 0.25}`.

    Raises:
        ValueError: for another kind, several, or a fraction outside (0, 1).

    >>> check_budget({"macs": 0.25})
    ('macs', 0.25)
    """
    if len(budget) != 1 or next(iter(budget)) not in KINDS:
        raise ValueError(f"budget={dict(budget)!r}: give one of {list(KINDS)} with its fraction")
    kind, fraction = next(iter(budget.items()))
    number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if not number or not 0 < fraction < 1:
        raise ValueError(
            f"budget={{{kind!r}: {fraction!r}}}: the fraction that is left lies in (0, 1)"
        )
    return kind, float(fraction)


@dataclass(frozen=True)
class Rounding:
    """Lower bound of each group, and the multiples in which units are removed.

    Args:
        to: the channels that stay are a multiple of it.
        least: fraction of the units of the dense group that stays in any case.
    """

    to: int = 8
    least: float = 0.0

    def floor(self, group: ChannelGroup, dense: int) -> int:
        """The fewest units that a group keeps; `dense`: what it had at first."""
        asked = max(1, math.ceil(self.least * dense - 1e-9))
        fixed = len(group.units) - len(group.free)
        multiple = self.multiple(group)
        rounded = multiple * math.ceil(max(asked, fixed) / multiple)
        return min(rounded, len(group.units))

    def multiple(self, group: ChannelGroup) -> int:
        """Units that make a multiple of so many channels together: whole norm groups and heads."""
        return self.to // math.gcd(self.to, group.width)

    def step(self, group: ChannelGroup, kept: int) -> int:
        """How many go next from a number that stays."""
        multiple = self.multiple(group)
        return kept % multiple or multiple


class Costs:
    """Cost of a module: a sum of products of sizes, one product for each tensor.

    Args:
        graph: of the module.
        kind: "channels", "params" or "macs".
    """

    def __init__(self, graph: ChannelGraph, kind: str) -> None:
        self.graph, self.kind = graph, kind
        self.constant = 0.0
        self.terms: dict[str, float] = {}
        self.sizes: dict[tuple[str, int], int] = {}
        self.counts: dict[tuple[str, int], Nodes] = {}  # entries of each unit along an axis
        self.touched: dict[int, list[str]] = {}  # tensors by group
        if kind == "channels":
            return
        group_of = graph.group_of()
        for path, shape in graph.shapes.items():
            weight = 1.0 if kind == "params" else graph.work.get(path, 0.0)
            dims = [dim for dim in range(len(shape)) if (path, dim) in graph.axes]
            if not dims or not weight:
                self.constant += weight * math.prod(shape)
                continue
            rest = math.prod(size for dim, size in enumerate(shape) if dim not in dims)
            self.terms[path] = weight * rest
            for dim in dims:
                units = graph.axes[path, dim]
                self.sizes[path, dim] = len(units)
                self.counts[path, dim] = np.bincount(units, minlength=graph.count)
                for group in np.unique(group_of[units]).tolist():
                    self.touched.setdefault(group, []).append(path)

    def total(self) -> float:
        """The present cost."""
        if self.kind == "channels":
            return float(self.graph_units())
        return self.constant + sum(self._term(path, {}) for path in self.terms)

    def graph_units(self) -> int:
        """Units of all groups of which some may go."""
        return sum(len(group.units) for group in self.graph.groups if len(group.free))

    def _term(self, path: str, less: Mapping[tuple[str, int], int]) -> float:
        value = self.terms[path]
        for dim in range(len(self.graph.shapes[path])):
            if (path, dim) in self.sizes:
                value *= self.sizes[path, dim] - less.get((path, dim), 0)
        return value

    def saving(self, group: int, block: Nodes) -> float:
        """By how much the cost falls when units of a group are removed."""
        if self.kind == "channels":
            return float(len(block))
        paths = dict.fromkeys(self.touched.get(group, []))
        less = self._less(paths, block)
        return sum(self._term(path, {}) - self._term(path, less) for path in paths)

    def share(self, group: int) -> float:
        """Cost of the tensors that a group's units make: what it holds, if it stays."""
        units = self.graph.groups[group].units
        if self.kind == "channels":
            return float(len(units))
        made = 0.0
        for path in self.touched.get(group, []):
            for dim in range(len(self.graph.shapes[path])):
                if self.graph.roles.get((path, dim)) == "out" and (path, dim) in self.counts:
                    part = self.counts[path, dim][units].sum() / self.sizes[path, dim]
                    made += self._term(path, {}) * float(part)
        return made

    def take(self, group: int, block: Nodes) -> None:
        """Remove units of a group."""
        for key, count in self._less(dict.fromkeys(self.touched.get(group, [])), block).items():
            self.sizes[key] -= count

    def _less(self, paths: Mapping[str, None], block: Nodes) -> dict[tuple[str, int], int]:
        return {
            (path, dim): int(self.counts[path, dim][block].sum())
            for path in paths
            for dim in range(len(self.graph.shapes[path]))
            if (path, dim) in self.sizes
        }


def select_for_removal(
    graph: ChannelGraph,
    scores: Scores,
    costs: Costs,
    target: float,
    *,
    rounding: Rounding,
    dense: Mapping[str, int],
    overshoot: bool,
    compare: Compare = "group",
) -> Flags:
    """Units to remove, greedily: always the block that is worth least for what it saves.

    Scores that compare within groups say what a unit is worth among the units of its own. A block
    is then worth its share of what the group has left, and more the less of the first group that
    is: the price of a group grows as first size / size, so that groups that cost as a product of
    their sizes shrink alike, and none is stripped because its channels are costly.

    Args:
        graph: of the present module.
        scores: how much each unit is worth; compared over all groups.
        costs: of the present module; consumed.
        target: cost to come down to.
        rounding: in which steps, and to which floor.
        dense: units of each group at first, by name.
        overshoot: whether the last block may bring the cost below the target. Where it may not,
            a block that saves too much waits until the target is lower: what other groups have
            is not worth less for being small.
        compare: "group": scores compare within groups alone; "loss": they are changes of the loss;
            "fraction": equal fractions of all groups go, the next block where most of the first
            group is left behind it; scores choose within groups, and between equal ones.
    """
    left = [float(scores[group.units].sum()) for group in graph.groups]
    order = [group.free[np.argsort(scores[group.free], kind="stable")] for group in graph.groups]
    taken = [0] * len(graph.groups)
    gone = np.zeros(graph.count, dtype=bool)
    cost = costs.total()
    while cost > target * (1 + 1e-9):
        best: tuple[tuple[float, float], int, float, Nodes] | None = None
        for index, group in enumerate(graph.groups):
            kept = len(group.units) - taken[index]
            size = rounding.step(group, kept)
            floor = rounding.floor(group, dense.get(group.name, len(group.units)))
            if kept - size < floor or taken[index] + size > len(group.free):
                continue
            block = order[index][taken[index] : taken[index] + size]
            saved = costs.saving(index, block)
            worth = float(scores[block].sum())
            first = dense.get(group.name, len(group.units))
            if compare != "loss":
                worth *= first / kept / max(left[index], 1e-30)
                if costs.kind == "channels":  # equal fractions of all groups
                    worth *= first
            useful = min(saved, cost - target) if overshoot else saved  # beyond it is no gain
            turn = (size - kept) / first if compare == "fraction" else 0.0
            key = turn, worth / max(useful, 1e-30)
            if best is None or key < best[0]:
                best = key, index, saved, block
        if best is None:
            break
        _, index, saved, block = best
        if not overshoot and cost - saved < target * (1 - 1e-9):
            break
        costs.take(index, block)
        left[index] -= float(scores[block].sum())
        gone[block] = True
        taken[index] += len(block)
        cost -= saved
    return gone


def lowest_cost(
    graph: ChannelGraph, kind: str, *, rounding: Rounding, dense: Mapping[str, int]
) -> float:
    """The lowest cost that rounding and protected units allow."""
    costs = Costs(graph, kind)
    zeros = np.zeros(graph.count)
    gone = select_for_removal(
        graph, zeros, costs, 0.0, rounding=rounding, dense=dense, overshoot=True
    )
    if kind == "channels":
        return costs.total() - float(gone.sum())
    return costs.total()


@torch.no_grad()
def sum_over_units(
    graph: ChannelGraph, values: Mapping[str, Tensor], roles: Sequence[str] = ("out", "in")
) -> Scores:
    """Sum of the scores of each unit's entries.

    Group L2 (DepGraph, Fang et al. 2023, arXiv:2301.12900) is the root of such a sum of squares.

    Args:
        graph: of the module.
        values: a number for each entry of a tensor, by path.
        roles: of the axes that count.
    """
    total = np.zeros(graph.count)
    for (path, dim), units in graph.axes.items():
        if graph.roles[path, dim] not in roles or path not in values:
            continue
        along = values[path].detach().double().cpu().movedim(dim, 0).flatten(1).sum(1)
        np.add.at(total, units, along.numpy())
    return total


@torch.no_grad()
def norm_scales(graph: ChannelGraph, scales: Mapping[str, Tensor], fallback: Scores) -> Scores:
    """Absolute scales of the norms behind each unit: Network Slimming, arXiv:1708.06519.

    Args:
        graph: of the module.
        scales: weights of norm layers, by path.
        fallback: for groups without any.
    """
    found, seen = np.zeros(graph.count), np.zeros(graph.count, dtype=bool)
    for (path, dim), units in graph.axes.items():
        if dim == 0 and path in scales:
            np.add.at(found, units, scales[path].detach().double().abs().cpu().numpy())
            seen[units] = True
    scores = normalize_by_group(graph, fallback)
    for group in graph.groups:
        if seen[group.units].all():
            scores[group.units] = found[group.units]
    return normalize_by_group(graph, scores)


def normalize_by_group(graph: ChannelGraph, scores: Scores) -> Scores:
    """Scores over the mean of their group, so that groups of different scale can be compared."""
    scores = scores.copy()
    for group in graph.groups:
        mean = scores[group.units].mean()
        if mean > 0:
            scores[group.units] /= mean
    return scores
