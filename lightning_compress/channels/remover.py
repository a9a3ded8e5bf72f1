"""Remove channels as a module trains: scores, fading, removal, and the channel budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.channels.graph import ChannelGraph, Flags, Kept
from lightning_compress.channels.plan import ChannelPlan
from lightning_compress.channels.resize import scaled, select_optimizer_state, shrink
from lightning_compress.channels.selection import (
    ABSOLUTE,
    Compare,
    Costs,
    Rounding,
    Scores,
    check_budget,
    lowest_cost,
    norm_scales,
    normalize_by_group,
    select_for_removal,
    sum_over_units,
)
from lightning_compress.projection import ProjectedWeight, Projector
from lightning_compress.pruning.sparsity_groups import make_schedules
from lightning_compress.removed import RemovedChannels
from lightning_compress.schedules import Schedule
from lightning_compress.state import note_removed
from lightning_compress.targets import is_normed

__all__ = [
    "ChannelBudget",
    "ChannelRemover",
]
_SHOWN = 5  # groups that an error names
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


class ChannelRemover:
    """Removes channels from a module, its optimizers and its projector together.

    Args:
        plan: the channels of the module.
        projector: of the module: it holds the values that train where others are shown.
        rounding: multiples in which channels are removed.
        dense: units of each group at first, by name; finer where units become finer.
        kept: of these, those that stay, by the name of the group; follows each removal.
        compare: how channels of different groups compare, see `select_for_removal`.
    """

    def __init__(
        self,
        plan: ChannelPlan,
        projector: Projector,
        *,
        rounding: Rounding,
        dense: dict[str, int],
        kept: dict[str, list[int]],
        compare: Compare = "group",
    ) -> None:
        self.plan, self.projector = plan, projector
        self.compare: Compare = compare
        self.rounding, self.dense, self.kept = rounding, dense, kept

    def cost(self, kind: str) -> float:
        """What the module costs now."""
        return Costs(self.plan.graph, kind).total()

    def choose(
        self,
        scores: Scores,
        kind: str,
        target: float,
        *,
        overshoot: bool = True,
    ) -> Flags:
        """Units to remove, so that the cost comes down to a target; see `select_for_removal`."""
        graph = self.plan.graph
        return select_for_removal(
            graph,
            scores,
            Costs(graph, kind),
            target,
            rounding=self.rounding,
            dense=self.dense,
            overshoot=overshoot,
            compare=self.compare,
        )

    def own_scores(self, criterion: str) -> Scores:
        """Scores by "magnitude" or "batchnorm"."""
        graph = self.plan.graph
        squares = {path: one.square() for path, one in self._trained().items()}
        scores = sum_over_units(graph, squares)
        if criterion == "batchnorm":
            return norm_scales(graph, self.norm_weights(), scores)
        return normalize_by_group(graph, np.sqrt(scores))

    def given_scores(self, criterion: object, values: Mapping[str, Tensor]) -> Scores:
        """Scores of units from those of the weights that make them, by path."""
        scores = sum_over_units(self.plan.graph, values, ("out",))
        return scores if criterion in ABSOLUTE else normalize_by_group(self.plan.graph, scores)

    def fast_enough(self, scores: Scores, left: float) -> tuple[float, float]:
        """The largest part of the MACs that takes no more than a part of the time.

        Returns:
            The part of the MACs, 0 if there is none, and the time of the last try.
        """
        total, low, high, ratio = self.cost("macs"), 0.0, 1.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            ratio = self.plan.latency_ratio(self.choose(scores, "macs", middle * total))
            low, high = (middle, high) if ratio <= left else (low, middle)
        return low, ratio

    def norm_weights(self) -> dict[str, Tensor]:
        """Scales of norm layers, by path."""
        found = {}
        for root in self.plan.inputs:
            for path, layer in self.plan.module.get_submodule(root).named_modules():
                if isinstance(layer, _NORMS) and layer.weight is not None:
                    found[".".join(filter(None, (root, path, "weight")))] = layer.weight
        return found

    @torch.no_grad()
    def push(self, amount: float) -> None:
        """Shrink scales of norms by an amount, not beyond 0: the proximal step of an L1 term."""
        for scale in self.norm_weights().values():
            scale.copy_(scale.sign() * (scale.abs() - amount).clamp(min=0))

    @torch.no_grad()
    def fade(self, leaving: Flags, factor: float) -> None:
        """Multiply what reads the units that leave."""
        graph, tensors = self.plan.graph, dict(self.plan.module.named_parameters())
        for (path, dim), units in graph.axes.items():
            gone = leaving[units]
            if graph.roles[path, dim] != "in" or is_normed(path) or not gone.any():
                continue  # a parametrization would bring the rest up
            shape = [1] * tensors[path].dim()
            shape[dim] = -1
            scale = torch.from_numpy(np.where(gone, factor, 1.0)).reshape(shape)
            self._write(tensors[path], partial(torch.mul, scale.to(tensors[path])))

    @torch.no_grad()
    def remove(
        self,
        gone: Flags,
        optimizers: Sequence[Optimizer],
        tell: Callable[[Kept, Mapping[str, int]], None],
    ) -> list[str]:
        """Remove units from everything that has them, and check that nothing else changed.

        Args:
            gone: a flag for each unit.
            optimizers: all of them.
            tell: called with the kept entries and the sizes of layers without tensors, so that
                others follow.

        Returns:
            What is reset, in words.

        Raises:
            RuntimeError: when the smaller module is not the one whose units are 0.
        """
        module = self.plan.module
        parameters = dict(module.named_parameters())
        for path, zeroed in self.plan.masked_values(self._trained(), gone).items():
            self._write(parameters[path], lambda _, zeroed=zeroed: zeroed)
        expected = self.plan.outputs()
        kept, sized = self.plan.kept(gone)
        for path, factors in kept.factors.items():
            self._write(parameters[path], partial(scaled, factors=factors))
        cut = {parameters[path]: dims for path, dims in kept.items() if path in parameters}
        notes = select_optimizer_state(optimizers, cut)
        projected_weights = self._projected_weights()
        for parameter, dims in cut.items():
            if (projected := projected_weights.get(id(parameter))) is not None:
                projected.select(dims)
        lost = self._lost(gone, kept, sized)
        shrink(module, dict(kept), sized=sized)  # what is scaled was written above
        note_removed(module, lost)
        tell(kept, sized)
        groups = {layer: one.name for one in self.plan.graph.groups for layer in one.layers}
        self.plan.check(expected, gone)
        self.plan.after(gone)
        self._follow_groups(groups)
        return notes

    def _follow_groups(self, before: Mapping[str, str]) -> None:
        """Count on where groups are others now.

        A single attention head that is left is no unit any more: its channels are, in a group for
        queries and keys and one for values.

        Args:
            before: the name of the group that each layer was in.
        """
        kept, dense = dict(self.kept), dict(self.dense)
        for group in self.plan.graph.groups:
            source = before.get(group.name, group.name)
            each, rest = divmod(len(group.units), max(len(kept.get(source, ())), 1))
            if source not in kept or rest or not each:
                continue
            self.kept[group.name] = [one * each + at for one in kept[source] for at in range(each)]
            self.dense[group.name] = dense[source] * each

    def _trained(self) -> dict[str, Tensor]:
        """The values that the optimizer updates, by path: latent ones where others show."""
        projected_weights = self._projected_weights()
        return {
            path: projected_weights[id(one)].values()
            if id(one) in projected_weights
            else one.detach()
            for path, one in self.plan.module.named_parameters()
        }

    def _write(self, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        projected = self._projected_weights().get(id(parameter))
        if projected is None:
            parameter.copy_(change(parameter.detach()))
        else:
            projected.set_values(change(projected.values()))
            projected.project()

    def _projected_weights(self) -> dict[int, ProjectedWeight]:
        return {
            id(projected.parameter): projected
            for projected in self.projector.projected_weights.values()
        }

    def _lost(self, gone: Flags, kept: Kept, sized: Mapping[str, int]) -> RemovedChannels:
        tensors: dict[str, Any] = dict(self.plan.module.named_parameters())
        tensors |= dict(self.plan.module.named_buffers())
        for group in self.plan.graph.groups:
            before = self.kept.get(group.name, list(range(len(group.units))))
            pairs = zip(before, gone[group.units].tolist(), strict=True)
            self.kept[group.name] = [one for one, goes in pairs if not goes]
        some = {name: tuple(one) for name, one in self.kept.items() if len(one) < self.dense[name]}
        shapes = {path: tuple(tensors[path].shape) for path in kept}
        return RemovedChannels(shapes, dict(sized), some)


def _held(graph: ChannelGraph, kind: str, rounding: Rounding) -> str:
    """What holds the most of a cost, and why, in words; "" where nothing is held."""
    costs, shares = Costs(graph, kind), []
    total = max(costs.total(), 1e-30)
    for index, group in enumerate(graph.groups):
        floor = rounding.floor(group, len(group.units))
        if not floor or (kind == "channels" and not len(group.free)):
            continue
        part = costs.share(index) * floor / len(group.units) / total
        unknown = f"{floor * group.width} of {len(group.units) * group.width} channels at least"
        why = ", ".join(group.reasons) if len(group.free) < len(group.units) else unknown
        shares.append((part, f"{group.name} ({part:.0%} of the {kind}: {why})"))
    shares.sort(key=lambda one: -one[0])
    names = [said for part, said in shares[:_SHOWN] if part > 0]
    more = len([part for part, _ in shares if part > 0]) - len(names)
    said = "; ".join(names) + (f"; and {more} more" if more > 0 else "")
    return f". What holds it: {said}" if names else ""


class ChannelBudget:
    """Channel budget: the fraction of a cost that is left, by a schedule or steered.

    Args:
        final_sparsity: fraction of the channels that is gone at the end.
        budget: in its place, what is left of a cost.
        schedule: of the fraction that is gone.
        window: begin and end of the schedule.
        rounding: multiples in which channels are removed.

    Raises:
        ValueError: for values outside their range.

    >>> rules = {"schedule": None, "window": (0, 9), "rounding": Rounding()}
    >>> budget = ChannelBudget(0.5, budget={"macs": 0.25}, **rules)
    >>> budget.kind, budget.gone(9), budget.final
    ('macs', 0.75, 0.25)
    """

    def __init__(
        self,
        final_sparsity: float,
        *,
        budget: Mapping[str, float] | None,
        schedule: Callable[[float], float] | None,
        window: tuple[float, float],
        rounding: Rounding,
    ) -> None:
        self.kind, self.fraction = check_budget(budget) if budget else ("channels", None)
        gone = final_sparsity if self.fraction is None else 1 - self.fraction
        self.part = make_schedules(gone, schedule, *window)[0]
        curve = self.part.curve
        self.window = (curve.begin, curve.end) if isinstance(curve, Schedule) else window
        self.rounding = rounding
        self.steered: float | None = None  # fraction that is left, set by `steer`
        self.dense: dict[str, int] = {}  # units of each group at first
        self.channels: dict[str, int] = {}  # that each layer made at first
        self.total = 0.0  # cost at first
        self.least = 0.0  # part of it that no rounding can avoid

    @property
    def final(self) -> float:
        """The part that the schedule leaves in the end."""
        return 1 - self.part.target(self.window[1])

    def gone(self, position: float) -> float:
        """The fraction that is to be gone at a position."""
        return self.part.target(position) if self.steered is None else 1 - self.steered

    def needs(self, position: float) -> bool:
        """Whether more is asked for at a position than ever before."""
        return self.gone(position) > self.part.requested

    def request(self, position: float) -> float:
        """The cost to come down to at a position: it never rises, whatever a schedule does."""
        return (1 - self.part.request(self.gone(position))) * self.total

    def steer(self, left: float) -> None:
        """Leave a part of the cost from now on.

        Raises:
            ValueError: for a part outside (0, 1].
        """
        if not 0 < left <= 1:
            raise ValueError(f"left={left!r} must lie in (0, 1]")
        self.steered = float(left)

    def left(self, remover: ChannelRemover | None) -> float:
        """The part of the cost that is left."""
        return 1.0 if remover is None else remover.cost(self.kind) / self.total

    def gone_units(self, graph: ChannelGraph) -> float:
        """Fraction of the first model's channels that a graph has no more."""
        groups = [one for one in graph.groups if len(one.free)]
        dense = sum(self.dense.get(one.name, len(one.units)) for one in groups)
        return 1 - sum(len(one.units) for one in groups) / max(dense, 1)

    def begin(self, graph: ChannelGraph) -> bool:
        """Take a model as the first one, unless there was one; says whether it is."""
        first = not self.dense
        if first:
            self.dense = {one.name: len(one.units) for one in graph.groups}
            layers = [layer for one in graph.groups for layer in one.layers]
            self.channels = {layer: graph.channels_of(layer) for layer in layers}
        return first

    def measure(self, remover: ChannelRemover, scores: Callable[[], Scores]) -> str:
        """Take the first model's cost as the whole.

        A latency becomes MACs: the largest part of them that is fast enough.

        Returns:
            What a latency became, in words.

        Raises:
            ValueError: for a latency that no number of channels has.
        """
        said = ""
        if self.kind == "latency" and self.fraction is not None:
            part, ratio = remover.fast_enough(scores(), self.fraction)
            if not part:
                raise ValueError(
                    f"budget={{'latency': {self.fraction}}} cannot be met: with as few channels as "
                    f"{self._rounding} allow, the time is {ratio:.3f} of now"
                )
            said = f"{self.fraction} of the latency is {part:.3f} of the MACs"
            self._count_macs(part)
        self.total = remover.cost(self.kind)
        return said

    def _count_macs(self, part: float) -> None:
        self.kind = "macs"
        self.part.curve = make_schedules(1 - part, None, *self.window)[0].curve

    @property
    def _rounding(self) -> str:
        return f"round_to={self.rounding.to} and min_keep={self.rounding.least}"

    def check(self, graph: ChannelGraph, *, steered: bool, closest: bool = False) -> str:
        """Check that a model can come down to what is asked.

        Args:
            graph: of the model.
            steered: a `QualityBudget` sets how far it goes, and the schedule's end does not
                count.
            closest: ask for the least that there is, where a model cannot come down so far.

        Returns:
            What `closest` changed, in words.

        Raises:
            ValueError: when it cannot; with the closest that there is.
        """
        least = lowest_cost(graph, self.kind, rounding=self.rounding, dense=self.dense)
        self.least = least / self.total
        nothing = f"{self._rounding} leave nothing that may go"
        if steered and self.least >= 1 and not closest:
            raise ValueError(nothing)
        if steered or least <= self.total * self.final * (1 + 1e-9):
            return nothing if self.least >= 1 else ""
        asked, nearest = f"final_sparsity={1 - self.final:.4g}", 1 - self.least
        if self.fraction is not None:
            asked, nearest = f"budget={{{self.kind!r}: {self.final:.4g}}}", self.least
        said = f"{asked} cannot be met with {self._rounding}: the closest is {nearest:.4f}"
        said += _held(graph, self.kind, self.rounding)
        if not closest:
            raise ValueError(said)
        self.part.curve = make_schedules(1 - self.least, None, *self.window)[0].curve
        return said

    def state_dict(self) -> dict[str, Any]:
        """Progress of the budget, as plain data."""
        return {
            "asked": self.part.requested,
            "steered": self.steered,
            "cost": (self.kind, self.total, self.final),
            "dense": dict(self.dense),
            "channels": dict(self.channels),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.part.requested, self.steered = state["asked"], state["steered"]
        kind, self.total, final = state["cost"]
        if kind != self.kind:  # a latency that was measured
            self._count_macs(final)
        self.dense = dict(state["dense"])
        self.channels = dict(state.get("channels", {}))
