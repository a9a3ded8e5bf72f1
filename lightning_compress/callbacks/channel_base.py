"""What channel pruning knows in a fit: which channels stay; saved, resumed, taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.adaptive.levers import ChannelLever, Lever, Limits
from lightning_compress.callbacks.channel_carry import place_inputs
from lightning_compress.callbacks.masking import MaskCallback
from lightning_compress.pruning.channel_budget import Compare, Scores
from lightning_compress.pruning.channel_files import CHANNELS
from lightning_compress.pruning.channel_goal import Goal
from lightning_compress.pruning.channel_plan import ChannelPlan
from lightning_compress.pruning.channel_scores import ABSOLUTE
from lightning_compress.pruning.channel_training import Cutter
from lightning_compress.pruning.channels import Flags
from lightning_compress.pruning.criteria import CRITERIA, Criterion, make_criterion
from lightning_compress.pruning.gathering import Gathering, Gatherings
from lightning_compress.state import removed_channels

__all__ = ["ChannelCallback"]

_SCOPES = ("global", "layer")


class ChannelCallback(MaskCallback):
    """Base of `ChannelPruning`: all but when channels go.

    Args:
        goal: how much is to be left.
        scope: see `ChannelPruning`.
        criterion: the same.
        channelwise: the same.
        window: as for `MaskCallback`.
    """

    order = -1  # channels go before masks and grids

    def __init__(
        self,
        *,
        goal: Goal,
        scope: str,
        criterion: str | Callable[[Tensor], Tensor] | Criterion,
        channelwise: Sequence[Any],
        **window: Any,
    ) -> None:
        super().__init__(dense_gradient=False, **window)
        self.goal, self.criterion, self.channelwise = goal, criterion, tuple(channelwise)
        by_norms = criterion == "batchnorm"
        if isinstance(criterion, str) and not by_norms and criterion not in CRITERIA:
            valid = sorted([*CRITERIA, "batchnorm"])
            raise ValueError(f"criterion={criterion!r}: valid are {valid}")
        if scope not in _SCOPES:
            raise ValueError(f"scope={scope!r}: valid are {list(_SCOPES)}")
        self.scope = scope
        self._gatherings = Gatherings(
            [Gathering(make_criterion("magnitude" if by_norms else criterion))]
        )
        self.plan: ChannelPlan | None = None
        self.cutter: Cutter | None = None
        self.kept: dict[str, list[int]] = {}  # of the units of each group at first: what stays
        self.refused: dict[str, str] = {}
        self._tapped: dict[str, str] = {}
        self._inputs: dict[str, Any] | None = None  # of the model that came back
        self._led = False  # whether somebody will say how far to go
        self._leaving: Flags | None = None
        self._fading = 0  # steps since they were chosen
        self._resumed: tuple[list[int] | None, int] | None = None

    @property
    def _compare(self) -> Compare:
        if self.scope == "layer":
            return "fraction"
        return "loss" if self.criterion in ABSOLUTE else "group"

    def claim(self, what: str, done: str) -> None:
        """Channels are no masks: another callback may mask what stays."""

    def _make_plan(
        self, module: nn.Module, inputs: Mapping[str, Sequence[Any]], *, tell: bool = True
    ) -> None:
        self.plan = ChannelPlan(
            module,
            inputs,
            targets=[*self.paths(), *self._embeddings()],
            channelwise=self.channelwise,
            tapped=self._tapped,
            refused=self.refused,
        )
        goal, first = self.goal, self.goal.begin(self.plan.graph)
        self.cutter = Cutter(
            self.plan,
            self.projector,
            rounding=goal.rounding,
            dense=goal.dense,
            kept=self.kept,
            compare=self._compare,
        )
        if first and (said := goal.measure(self.cutter, self._scores)):
            rank_zero_info(f"{self.state_key}: {said}")
        goal.check(self.plan.graph, led=self._led)
        if self._resumed is not None and self._resumed[0] is not None:
            units, self._fading = self._resumed
            self._leaving = self.plan.graph.flags(np.array(units, dtype=np.int64))
        self._resumed = None
        for group in self.plan.graph.groups if tell else ():
            if len(group.free) < len(group.units):
                why = ", ".join(group.reasons)
                rank_zero_info(f"{self.state_key}: channels of {group.name} stay: {why}")
        self.sparsity = self._count()

    def _embeddings(self) -> list[str]:
        """They are no matrix products, so that masks leave them alone; channels they have."""
        return [row.path for row in self.coverage if row.reason.startswith("Embedding is no")]

    @property
    def kind(self) -> str:
        """What is counted: "channels", "params" or "macs"; "latency" until it is measured."""
        return self.goal.kind

    @property
    def left(self) -> float:
        """The part of it that is left."""
        return self.goal.left(self.cutter)

    @property
    def least(self) -> float:
        """The part of it that no rounding can avoid."""
        return self.goal.least

    def steer(self, left: float) -> None:
        """Take the schedule's place, in a fit: which part of the cost to leave, from now on.

        Whole blocks of channels go until no more than that is left; none comes back.

        Args:
            left: in (0, 1]; of the channels, or of what `budget` counts.

        Raises:
            ValueError: for a part outside of that.
        """
        self.goal.steer(left)

    def lever(self, limits: Limits) -> Lever:
        """What a `QualityBudget` moves."""
        return ChannelLever(self, limits.min_channels)

    def snapshot(self) -> dict[str, Any]:
        """What of the state belongs to the channels of now."""
        return {
            "asked": self.goal.part.asked,
            "kept": {name: list(one) for name, one in self.kept.items()},
            "inputs": None if self.plan is None else dict(self.plan.inputs),
        }

    def back_to(self, snapshot: dict[str, Any]) -> None:
        """The channels of a snapshot are to be those of now: nothing fades any more."""
        self.goal.part.asked = snapshot["asked"]
        self.kept.clear()
        self.kept.update({name: list(one) for name, one in snapshot["kept"].items()})
        self._inputs = snapshot["inputs"]
        self._leaving, self._fading, self._pending = None, 0, False

    def on_channels_restored(self, module: nn.Module) -> None:
        """Look at the module that has its channels again."""
        self._gatherings.reset()
        assert self.plan is not None
        inputs = place_inputs(module, self._inputs or self.plan.inputs)
        self._make_plan(module, inputs, tell=False)

    @property
    def led(self) -> bool:
        """Whether somebody else says how far to go."""
        return self.goal.steered is not None

    @property
    def arrived(self) -> bool:
        """Whether all is gone that is to go at this position."""
        return self._leaving is None and not self.needed(self.events.position)

    def needed(self, position: float) -> bool:
        """Whether more is to go at a position."""
        return self.plan is not None and self.goal.needs(position)

    def _scores(self) -> Scores:
        assert self.cutter is not None
        if self.criterion in ("magnitude", "batchnorm"):
            return self.cutter.own_scores(str(self.criterion))
        wanted = self._gatherings[0].scores(self.slots, self.slots)
        given = {slot.target.path: one for slot, one in zip(self.slots, wanted, strict=True)}
        return self.cutter.given_scores(self.criterion, given)

    def project(self) -> None:
        """Nothing of this callback shows between events."""

    def _settle(self) -> None:
        """Masks are other callbacks' own."""

    def _count(self) -> float:
        """Fraction of the channels that is gone."""
        return 0.0 if self.plan is None else self.goal.gone_units(self.plan.graph)

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Say which entries stay, so that the full model can be cut before it is loaded."""
        if lost := removed_channels(pl_module):
            checkpoint[CHANNELS] = asdict(lost)

    def state_dict(self) -> dict[str, Any]:
        """Clock, what stays, what fades, what the first model cost, statistics."""
        leaving = None if self._leaving is None else np.flatnonzero(self._leaving).tolist()
        return {
            **super().state_dict(),
            "masks": {},
            "latents": {},
            **self.goal.state_dict(),
            "kept": dict(self.kept),
            "leaving": (leaving, self._fading),
            "refused": dict(self.refused),
            "gathering": self._gatherings.state_dict(),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put everything back, and find the channels of the smaller model."""
        super().restore_state(state)
        self.goal.load_state_dict(state)
        self.refused = dict(state["refused"])
        self.kept = dict(state["kept"])
        self._resumed = state["leaving"]
        step = self.projector.clock(self.paths())
        self._gatherings.restore(self.slots, step, state["gathering"])
