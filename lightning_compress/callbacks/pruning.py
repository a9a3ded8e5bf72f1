"""GradualPruning: when to prune. What to prune is decided in `pruning/`, how in `projection`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.callbacks.base import WeightCallback, check_run_ends, run_progress
from lightning_compress.pruning.criteria import CRITERIA, Criterion
from lightning_compress.pruning.masks import SCOPES, keep_best, pack_mask, unpack_mask
from lightning_compress.schedules import Polynomial, Schedule, check_window
from lightning_compress.targets import Pattern

__all__ = ["GradualPruning"]

_EVENTS = 100  # prune events in a run, where no frequency is given
_DEFAULTS = {"final_sparsity": 0.9, "begin": 0.0, "end": 0.7}


class GradualPruning(WeightCallback):
    """Prune weights while the model trains, after Zhu & Gupta 2017, arXiv:1710.01878.

    Sparsity is the absolute fraction of zeros in the targets. Masks change right after a step of
    the optimizer that owns the targets; pruned weights are exactly zero from then on.

    Args:
        final_sparsity: fraction of zeros at `end`, in [0, 1).
        schedule: a `Schedule` (which brings its own begin, end and final value), or any callable
            from the position in the unit of `begin` and `end` to a sparsity; None: `Polynomial`.
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit; nothing is pruned any more after it.
        frequency: steps between prune events; None: about 100 events from begin to end.
        include: path globs or layer classes; None: the weights of the part that ships.
        exclude: the same, taken away again.
        criterion: "magnitude", or a callable from a weight to its scores, low ones go first.
        granularity: "unstructured".
        scope: "global" compares all targets together, "layer" prunes each by the same fraction.
        min_keep: fraction of each target that stays, whatever the others score: no layer dies by
            accident.
        on_miss: "warn" or "raise" when training ends below the final sparsity.
        name: prefix of what is logged, and the key of the state; two callbacks need two names.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> GradualPruning(final_sparsity=0.8, end=1000).schedule(500)
    0.7000000000000001
    """

    order = 0

    def __init__(
        self,
        *,
        final_sparsity: float = 0.9,
        schedule: Callable[[float], float] | None = None,
        begin: float = 0.0,
        end: float = 0.7,
        frequency: int | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        criterion: str | Criterion = "magnitude",
        granularity: str = "unstructured",
        scope: str = "global",
        min_keep: float = 0.01,
        on_miss: str = "warn",
        name: str = "prune",
    ) -> None:
        super().__init__(include=include, exclude=exclude, name=name)
        given = {"final_sparsity": final_sparsity, "begin": begin, "end": end}
        self.schedule = _schedule(schedule, given)
        if isinstance(self.schedule, Schedule):
            begin, end = self.schedule.begin, self.schedule.end
        self.begin, self.end, self.in_fractions = begin, end, check_window(begin, end)
        if frequency is not None and (not isinstance(frequency, int) or frequency < 1):
            raise ValueError(f"frequency={frequency!r} must be a whole number of steps, 1 or more")
        self.frequency = frequency
        self.criterion = _choice("criterion", criterion, CRITERIA)
        self.make_masks = _choice("scope", scope, SCOPES)
        _choice("granularity", granularity, {"unstructured": None})
        _choice("on_miss", on_miss, {"warn": None, "raise": None})
        if not 0 <= min_keep <= 1 - self._target(self.end):
            raise ValueError(f"min_keep={min_keep!r} must lie between 0 and 1 - final sparsity")
        self.min_keep, self.on_miss = min_keep, on_miss
        self.sparsity = 0.0  # of the targets, as the masks have it
        self._asked = 0.0
        self._last_step = 0
        self._last_bucket = -1
        self._first_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, hook their optimizers and say how many there are."""
        super().on_fit_start(trainer, pl_module)
        if self.in_fractions:
            check_run_ends(trainer)
        skipped = len(self.coverage) - len(self.slots)
        weights = sum(slot.target.numel for slot in self.slots)
        rank_zero_info(
            f"GradualPruning[{self.name}]: {len(self.slots)} targets with {weights:,} weights, "
            f"{skipped} parameters left as they are"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint and read the clock."""
        super().on_train_start(trainer, pl_module)
        self._last_step = self.projector.clock(self.paths())

    def on_weight_step(self, trainer: Trainer) -> None:
        """Prune when an event is due."""
        step = self.projector.clock(self.paths())
        if step == self._last_step:  # another optimizer's step, or the faster of two owners
            return
        self._last_step = step
        position = run_progress(trainer) if self.in_fractions else step
        if self._due(position, step):
            self._prune(position, trainer)

    def _due(self, position: float, step: int) -> bool:
        if position < self.begin:
            return False
        if self._first_step is None:
            self._first_step = step if self.in_fractions else int(self.begin)
        if position >= self.end:
            return self._target(position) > self._asked
        if self.frequency is not None:
            return (step - self._first_step) % self.frequency == 0
        bucket = math.floor(_EVENTS * (position - self.begin) / (self.end - self.begin))
        fresh, self._last_bucket = bucket != self._last_bucket, bucket
        return fresh

    def _target(self, position: float) -> float:
        value = self.schedule(position)
        if not 0 <= value < 1:
            raise ValueError(f"the schedule gave {value!r} at {position}: it must lie in [0, 1)")
        return value

    @torch.no_grad()
    def _prune(self, position: float, trainer: Trainer) -> None:
        # The masks only ever close: a schedule that falls, or a longer second run, opens nothing.
        self._asked = max(self._asked, self._target(position))
        scores = keep_best([self._score(slot) for slot in self.slots], self.min_keep)
        masks = self.make_masks(scores, self._asked)
        for slot, mask in zip(self.slots, masks, strict=True):
            if trainer.world_size > 1:
                shared = trainer.strategy.broadcast(pack_mask(mask))
                mask = unpack_mask(shared, mask.shape)
            slot.set_mask(mask)
            slot.project()
        self.sparsity = self._count()

    def _score(self, slot: Any) -> torch.Tensor:
        scores = self.criterion(slot.values())
        return scores if slot.pruned is None else scores.masked_fill(slot.pruned, -math.inf)

    def _count(self) -> float:
        total = sum(slot.target.numel for slot in self.slots)
        return sum(slot.sparsity * slot.target.numel for slot in self.slots) / total

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the sparsity of the targets."""
        pl_module.log(f"{self.name}/sparsity", self.sparsity)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check that the final sparsity was reached."""
        final = self._target(self.end)
        weights = sum(slot.target.numel for slot in self.slots)
        if round(final * weights) > round(self.sparsity * weights) + len(self.slots):
            message = (
                f"GradualPruning[{self.name}] ended at sparsity {self.sparsity:.4f} instead of "
                f"{final:.4f}: the run ended before end={self.end!r} of the schedule"
            )
            if self.on_miss == "raise":
                raise RuntimeError(message)
            rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), clock and how far the schedule went."""
        masks = {slot.path: slot.pruned for slot in self.slots if slot.pruned is not None}
        return {
            "masks": {path: (pack_mask(~p), tuple(p.shape)) for path, p in masks.items()},
            "steps": [] if self._projector is None else list(self._projector.steps),
            "asked": self._asked,
            "last_bucket": self._last_bucket,
            "first_step": self._first_step,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put masks and clock back.

        Raises:
            ValueError: when the checkpoint holds masks for weights that are no targets now.
        """
        by_path = {slot.path: slot for slot in self.slots}
        if unknown := sorted(set(state["masks"]) - set(by_path)):
            raise ValueError(f"the checkpoint prunes {unknown}, which are no targets of this run")
        for path, (packed, shape) in state["masks"].items():
            by_path[path].set_mask(unpack_mask(packed, shape))
        self.projector.steps[:] = state["steps"]
        self._asked, self._last_bucket = state["asked"], state["last_bucket"]
        self._first_step = state["first_step"]
        self.sparsity = self._count()


def _choice(what: str, given: Any, valid: dict[str, Any]) -> Any:
    if callable(given):
        return given
    if given not in valid:
        raise ValueError(f"{what}={given!r}: valid are {sorted(valid)}")
    return valid[given]


def _schedule(
    schedule: Callable[[float], float] | None, given: dict[str, float]
) -> Callable[[float], float]:
    if schedule is None:
        return Polynomial(**given)
    if not callable(schedule):
        raise ValueError(f"schedule={schedule!r} must be callable, such as Polynomial(...)")
    changed = sorted(key for key, value in given.items() if value != _DEFAULTS[key])
    if isinstance(schedule, Schedule) and changed:
        raise ValueError(f"the schedule brings its own {changed}: set them there alone")
    return schedule
