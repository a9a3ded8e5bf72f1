"""How much of a model is to be left: what was asked for, where that is now, whether it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_compress.pruning.channel_budget import Rounding, Scores, check_budget, floor_of
from lightning_compress.pruning.channel_training import Cutter
from lightning_compress.pruning.channels import ChannelGraph
from lightning_compress.pruning.parts import make_schedules
from lightning_compress.schedules import Schedule

__all__ = ["Goal"]


class Goal:
    """The part of a cost that is to be left, by a schedule or as somebody else says.

    Args:
        final_sparsity: fraction of the channels that is gone at the end.
        budget: in its place, what is left of a cost.
        schedule: of the fraction that is gone.
        window: begin and end of the schedule.
        rounding: in which steps channels go.

    Raises:
        ValueError: for values outside their range.

    >>> goal = Goal(0.5, budget={"macs": 0.25}, schedule=None, window=(0, 9), rounding=Rounding())
    >>> goal.kind, goal.gone(9), goal.final
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
        self.steered: float | None = None  # the part that is to be left, as somebody else says
        self.dense: dict[str, int] = {}  # units of each group at first
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
        return self.gone(position) > self.part.asked

    def ask(self, position: float) -> float:
        """The cost to come down to at a position: it never rises, whatever a schedule does."""
        return (1 - self.part.ask(self.gone(position))) * self.total

    def steer(self, left: float) -> None:
        """Leave a part of the cost from now on.

        Raises:
            ValueError: for a part outside (0, 1].
        """
        if not 0 < left <= 1:
            raise ValueError(f"left={left!r} must lie in (0, 1]")
        self.steered = float(left)

    def left(self, cutter: Cutter | None) -> float:
        """The part of the cost that is left."""
        return 1.0 if cutter is None else cutter.cost(self.kind) / self.total

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
        return first

    def measure(self, cutter: Cutter, scores: Callable[[], Scores]) -> str:
        """Take the first model's cost as the whole.

        A latency becomes MACs: the largest part of them that is fast enough.

        Returns:
            What a latency became, in words.

        Raises:
            ValueError: for a latency that no number of channels has.
        """
        said = ""
        if self.kind == "latency" and self.fraction is not None:
            part, ratio = cutter.fast_enough(scores(), self.fraction)
            if not part:
                raise ValueError(
                    f"budget={{'latency': {self.fraction}}} cannot be met: with as few channels as "
                    f"{self._rounding} allow, the time is {ratio:.3f} of now"
                )
            said = f"{self.fraction} of the latency is {part:.3f} of the MACs"
            self._count_macs(part)
        self.total = cutter.cost(self.kind)
        return said

    def _count_macs(self, part: float) -> None:
        self.kind = "macs"
        self.part.curve = make_schedules(1 - part, None, *self.window)[0].curve

    @property
    def _rounding(self) -> str:
        return f"round_to={self.rounding.to} and min_keep={self.rounding.least}"

    def check(self, graph: ChannelGraph, *, led: bool) -> None:
        """Check that a model can come down to what is asked.

        Args:
            graph: of the model.
            led: whether somebody else will say how far, so that a schedule's end does not count.

        Raises:
            ValueError: when it cannot; with the closest that there is.
        """
        least = floor_of(graph, self.kind, rounding=self.rounding, dense=self.dense)
        self.least = least / self.total
        if led and self.least >= 1:
            raise ValueError(f"{self._rounding} leave nothing that may go")
        if led or least <= self.total * self.final * (1 + 1e-9):
            return
        asked, closest = f"final_sparsity={1 - self.final:.4g}", 1 - self.least
        if self.fraction is not None:
            asked, closest = f"budget={{{self.kind!r}: {self.final:.4g}}}", self.least
        raise ValueError(
            f"{asked} cannot be met with {self._rounding}: the closest is {closest:.4f}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was asked, of what."""
        return {
            "asked": self.part.asked,
            "steered": self.steered,
            "cost": (self.kind, self.total, self.final),
            "dense": dict(self.dense),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.part.asked, self.steered = state["asked"], state["steered"]
        kind, self.total, final = state["cost"]
        if kind != self.kind:  # a latency that was measured
            self._count_macs(final)
        self.dense = dict(state["dense"])
