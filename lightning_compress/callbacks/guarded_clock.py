"""GuardedClock: event clock of a callback in a fit, which guards may hold."""

from __future__ import annotations

import math
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.callbacks.base import check_run_ends, run_progress
from lightning_compress.callbacks.guards import Guard
from lightning_compress.schedules import EventClock


class HasEvents(Protocol):
    """A callback that does something at the events of a `GuardedClock`."""

    sparsity: float

    @property
    def state_key(self) -> str:
        """Name in messages."""
        ...

    @property
    def is_steered(self) -> bool:
        """Whether a budget sets the target, instead of the schedule."""
        ...

    def before_event(self, trainer: Trainer, step: int) -> None:
        """React to a step of the owning optimizer, before an event may happen."""

    def due(self) -> bool:
        """Whether an event is due at the clock's position, or still waits."""
        ...

    def ready(self, step: int) -> bool:
        """Whether the statistics of an event are complete; if not, it waits."""
        ...

    def on_event(self, trainer: Trainer) -> None:
        """Perform the event."""

    def look_ahead(self, step: int) -> None:
        """Prepare for the next event, after each step."""


class GuardedClock(EventClock):
    """Clock that a callback owns: it follows the run, stops for guards, keeps pending events.

    Args:
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit.
        frequency: steps between events; None: about `count` from begin to end.
        count: of events, where no frequency is given.
        spacing: as for `EventClock`.
    """

    def reset(self) -> None:
        """Reset."""
        super().reset()
        self.last_step = 0  # of the owning optimizer
        self.pending = False  # an event that waits for its statistics
        self._waiting = self._overruled = False  # for a guard; and no longer

    def start(self, trainer: Trainer) -> None:
        """Reset at the start of a fit.

        Raises:
            ValueError: for a window in fractions of a run without an end.
        """
        if self.in_fractions:
            check_run_ends(trainer)
        self.reset()

    def is_due(self, *, needed: bool, steered: bool) -> bool:
        """Whether an event is due: by the schedule, or whenever a steered callback needs one."""
        if steered:
            self.pending = needed
        else:
            due = self.due(unfinished=needed)
            self.pending = needed and (due or self.pending)
        return self.pending

    def advance(self, trainer: Trainer, step: int, owner: HasEvents) -> None:
        """Move on to a step of the owning optimizer, and let an event happen if one is due."""
        if step == self.last_step:  # another optimizer's step, or the faster of two owners
            return
        self.last_step = step
        owner.before_event(trainer, step)
        raw = run_progress(trainer) if self.in_fractions else step
        hold = self._is_held(trainer, raw, owner)
        self.tick(raw, step, hold=hold)
        if not hold and owner.due() and owner.ready(step):
            self.pending = False
            owner.on_event(trainer)
        owner.look_ahead(step)

    def _is_held(self, trainer: Trainer, raw: float, owner: HasEvents) -> bool:
        """Whether a guard holds the clock over this step."""
        guards = [one for one in trainer.callbacks if isinstance(one, Guard)]  # type: ignore[attr-defined]
        blocking = [one.state_key for one in guards if not one.allows(trainer)]
        if (
            owner.is_steered
        ):  # no schedule has to end: a guard may hold an event as long as it likes
            return bool(blocking)
        wait = bool(blocking) and self.may_hold(raw, self._total(trainer, raw))
        over = bool(blocking) and not wait and 0 < self.done < 1
        if over and not self._overruled:
            rank_zero_warn(
                f"{owner.state_key}: {', '.join(blocking)} would still hold the schedule, which "
                "could not end within the run then: it goes on"
            )
        if wait != self._waiting:
            what = f"waits for {', '.join(blocking)}" if wait else "goes on"
            rank_zero_info(f"{owner.state_key} {what} at sparsity {owner.sparsity:.4f}")
        self._waiting, self._overruled = wait, self._overruled or over
        return wait

    def _total(self, trainer: Trainer, raw: float) -> float:
        """The run's last position, in the unit of the window; infinite for an endless run."""
        if self.in_fractions:
            return 1.0
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            return math.inf
        return math.floor(raw / run_progress(trainer) + 1e-6)

    @property
    def wait_state(self) -> tuple[bool, bool, bool]:
        """State of a checkpoint: whether an event waits, a guard holds, a guard was overruled."""
        return self.pending, self._waiting, self._overruled

    @wait_state.setter
    def wait_state(self, saved: tuple[bool, bool, bool]) -> None:
        self.pending, self._waiting, self._overruled = saved
