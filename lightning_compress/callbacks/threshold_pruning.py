"""ThresholdPruning: masks of the weights that are as large as a threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_compress.callbacks.base import is_trial_run
from lightning_compress.callbacks.mask_callback import MaskCallback
from lightning_compress.errors import check_choice
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.mask_plan import largest_in_rows, normed_axis, threshold_mask
from lightning_compress.schedules import Linear, Schedule
from lightning_compress.targets import Pattern

__all__ = ["ThresholdPruning"]


class ThresholdPruning(MaskCallback):
    """Prune what is smaller than a threshold: `M = |W| >= threshold`, made anew at each event.

    The sparsity follows from the weights and is logged. With a threshold in units of the layer's
    standard deviation this is Han et al. 2015, arXiv:1506.02626; the deviation is that of all the
    layer's weights at the event, pruned ones included.

    Args:
        threshold: at `end`, above 0.
        relative: None: in units of the weights. "std": of each target's standard deviation.
        schedule: how the threshold rises. A `Schedule` brings its shape and window, from 0 to
            `threshold` (its own final value only scales); any other callable gives the threshold
            itself, by position. None: a straight line from 0 at `begin`.
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit; masks do not change after it.
        frequency: steps between events; None: about 100 events from begin to end, in
            short windows fewer: one every four steps, but ten at least.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        min_keep: fraction of each target that stays, the largest weights.
        regrow: None: what is pruned stays so. "straight_through": pruned weights keep training
            by dense gradients, and return when they have grown over the threshold.
        name: prefix of what is logged, and the key of the state; two callbacks need two names.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> ThresholdPruning(threshold=0.1, begin=0, end=100).threshold_at(50)
    0.05
    """

    def __init__(
        self,
        *,
        threshold: float,
        relative: str | None = None,
        schedule: Callable[[float], float] | None = None,
        begin: float = 0.0,
        end: float = 0.7,
        frequency: int | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        min_keep: float = 0.01,
        regrow: str | None = None,
        name: str = "threshold",
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold={threshold!r} must be above 0")
        check_choice("relative", relative, (None, "std"))
        check_choice("regrow", regrow, (None, "straight_through"))
        if not 0 <= min_keep <= 1:
            raise ValueError(f"min_keep={min_keep!r} must lie in [0, 1]")
        if schedule is not None and not callable(schedule):
            raise ValueError(f"schedule={schedule!r} must be callable, such as Linear(...)")
        if isinstance(schedule, Schedule):
            begin, end = schedule.begin, schedule.end
        super().__init__(
            begin=begin,
            end=end,
            frequency=frequency,
            include=include,
            exclude=exclude,
            dense_gradient=regrow is not None,
            name=name,
        )
        self.threshold, self.relative, self.min_keep = threshold, relative, min_keep
        self.schedule = schedule or Linear(begin=begin, end=end)
        self._requested = 0.0

    def threshold_at(self, position: float) -> float:
        """The threshold at a position of the run.

        Raises:
            ValueError: when the schedule gives no threshold.
        """
        value = self.schedule(position)
        if isinstance(self.schedule, Schedule):
            value = self.threshold * (value / (self.schedule.final_sparsity or 1.0))
        if not value >= 0:
            raise ValueError(f"the schedule gave {value!r} at {position}: a threshold is >= 0")
        return value

    def needed(self, position: float) -> bool:
        """At each event until the end, as weights move; then if the threshold is still to rise."""
        return position < self.events.end or self.threshold_at(position) > self._requested

    @torch.no_grad()
    def event(self, trainer: Trainer) -> None:
        """Compare all weights with the current threshold."""
        self._requested = self.threshold_at(self.events.position)
        rules = {"relative": self.relative == "std", "min_keep": self.min_keep}
        masks = []
        for projected in self.projected_weights:
            closed = None if self.dense_gradient else projected.pruned
            mask = threshold_mask(projected.values(), self._requested, closed=closed, **rules)
            if (axis := normed_axis(projected.target)) is not None:
                mask |= largest_in_rows(projected.values(), axis, closed)
            masks.append(mask)
        self.set_masks(self.projected_weights, masks, trainer)
        self.project()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check that the last threshold was applied."""
        final = self.threshold_at(self.events.end)
        if self._requested < final and not is_trial_run(trainer):
            why = f"the run ended before end={self.events.end!r} of the schedule"
            rank_zero_warn(
                f"{self.state_key} ended at threshold {self._requested:.4g} instead of "
                f"{final:.4g}: "
                f"{self.why_no_steps() or why}"
            )

    def on_targets_changed(
        self, trainer: Trainer, module: LightningModule, added: Sequence[ProjectedWeight]
    ) -> None:
        """Compare new targets too, though the threshold may not rise any more."""
        super().on_targets_changed(trainer, module, added)
        if added:
            self._requested = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Masks, hidden values, clock and the last threshold."""
        return {**super().state_dict(), "asked": self._requested}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        super().restore_state(state)
        self._requested = state["asked"]
