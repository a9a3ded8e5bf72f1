"""Gathering: statistics are taken in the steps before an event alone, and freed after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_compress.projection import Slot
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.events import Events
from lightning_compress.pruning.gradients import WHOLE_RUN

__all__ = ["Gathering", "Gatherings"]

_SLACK = 1  # steps: in fractions of the run, how far the next event is away is an estimate


class Gathering:
    """Turns a criterion's statistics on before an event and off after it.

    Args:
        criterion: gathers over `criterion.window` steps; 0: needs no statistics, and begins and
            ends at the event; `WHOLE_RUN`: from the first step on, and any number will do.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.since: int | None = None  # the step at which gathering began

    def look_ahead(
        self,
        slots: Sequence[Slot],
        events: Events,
        step: int,
        *,
        pending: bool,
        needed: Callable[[float], bool],
    ) -> None:
        """Begin when an event is near, or due and waiting; end when none will come.

        Args:
            slots: the targets.
            events: the clock.
            step: the present one.
            pending: an event waits for statistics.
            needed: whether an event at a position would change anything.
        """
        window = self.criterion.window
        if not window:
            return
        ahead, slack = events.ahead(), _SLACK if events.in_fractions else 0
        reach = window + slack if self.since is None else max(window, ahead) + slack
        near = not events.over and ahead <= reach and needed(events.horizon(reach))
        near |= window >= WHOLE_RUN and not events.over
        if self.since is not None and not pending and not near:
            self.stop()
        elif self.since is None and (pending or near):
            self.criterion.begin(slots)
            self.since = step

    def ready(self, step: int, *, late: bool = False) -> bool:
        """Whether there are statistics enough for an event.

        Args:
            step: the present one.
            late: the last event of several: what there is will do.
        """
        if not self.criterion.window:
            return True
        gathered = 0 if self.since is None else step - self.since
        late = late or self.criterion.window >= WHOLE_RUN
        return gathered >= self.criterion.window or (late and gathered > 0)

    def scores(self, slots: Sequence[Slot], wanted: Sequence[Slot]) -> list[Tensor]:
        """Scores of some slots at an event; all of them name what a criterion begins with.

        Args:
            slots: the targets.
            wanted: those to score.
        """
        if not self.criterion.window and self.since is None:
            self.criterion.begin(slots)
            self.since = 0  # until the event is over
        return [self.criterion.scores(slot) for slot in wanted]

    def corrected(self, slot: Slot) -> Tensor | None:
        """New values under a slot's new mask, from a criterion that has an opinion on them."""
        update = getattr(self.criterion, "update", None)
        return None if update is None or slot.pruned is None else update(slot, ~slot.pruned)

    def after_event(self, ahead: float) -> None:
        """Free what was gathered, unless the next window has begun already."""
        if self.since is not None and ahead >= self.criterion.window:
            self.stop()

    def stop(self) -> None:
        """End gathering."""
        self.criterion.end()
        self.since = None

    def reset(self) -> None:
        """End gathering and forget what a criterion keeps of the whole run."""
        self.stop()
        forget = getattr(self.criterion, "reset", None)
        if forget is not None:
            forget()

    def state_dict(self) -> dict[str, Any]:
        """Since when, and the criterion's own state if it has one."""
        own = getattr(self.criterion, "state_dict", None)
        return {"since": self.since, "criterion": None if own is None else own()}

    def restore(self, slots: Sequence[Slot], step: int, state: dict[str, Any]) -> None:
        """Go on gathering; a criterion that saves nothing begins anew at this step."""
        load = getattr(self.criterion, "load_state_dict", None)
        if state["since"] is not None:
            self.criterion.begin(slots)
            self.since = step if load is None else state["since"]
        if load is not None and state["criterion"] is not None:
            load(state["criterion"])


class Gatherings(list[Gathering]):
    """Several at once: the criterion, and what weights grow by."""

    def look_ahead(
        self,
        slots: Sequence[Slot],
        events: Events,
        step: int,
        *,
        pending: bool,
        needed: Callable[[float], bool],
    ) -> None:
        """As `Gathering.look_ahead`."""
        for one in self:
            one.look_ahead(slots, events, step, pending=pending, needed=needed)

    def after_event(self, ahead: float) -> None:
        """As `Gathering.after_event`."""
        for one in self:
            one.after_event(ahead)

    def stop(self) -> None:
        """End all."""
        for one in self:
            one.stop()

    def reset(self) -> None:
        """End all and forget."""
        for one in self:
            one.reset()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each."""
        return [one.state_dict() for one in self]

    def restore(self, slots: Sequence[Slot], step: int, state: list[dict[str, Any]]) -> None:
        """Put the state of each back."""
        for one, saved in zip(self, state, strict=True):
            one.restore(slots, step, saved)
