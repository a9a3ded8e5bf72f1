"""When masks change: the arithmetic of events, and a clock that can be held. Pure numbers."""

from __future__ import annotations

import math
from typing import Any

from lightning_compress.schedules import check_window

__all__ = ["Events"]

_EVENTS = 100  # in a window, where no frequency is given


class Events:
    """Events between `begin` and `end`, and one at the end if something is unfinished then.

    Positions are steps of the owning optimizer or fractions of the run, in the unit of the
    window. A clock that is held stands still: what it missed shifts all that follows.

    Args:
        begin: first position.
        end: last position.
        frequency: steps between events; None: about `count` events.
        count: of events, where no frequency is given.

    Raises:
        ValueError: for an empty window or a frequency below 1.

    >>> events = Events(0, 10, 4)
    >>> [step for step in range(1, 13) if events.tick(step, step).due(unfinished=True)]
    [4, 8, 10, 11, 12]
    """

    def __init__(
        self, begin: float, end: float, frequency: int | None, *, count: int = _EVENTS
    ) -> None:
        self.count = count
        self.begin, self.end, self.in_fractions = begin, end, check_window(begin, end)
        if frequency is not None and (not isinstance(frequency, int) or frequency < 1):
            raise ValueError(f"frequency={frequency!r} must be a whole number of steps, 1 or more")
        self.frequency = frequency
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.position, self.step = 0.0, 0  # of the clock, without the time it was held
        self._raw, self._raw_step = 0.0, 0
        self._pace = 0.0  # position gained in a step
        self._held, self._held_steps = 0.0, 0
        self._first_step: int | None = None
        self._last_bucket = -1

    @property
    def over(self) -> bool:
        """Whether the clock has come to the end."""
        return self.position >= self.end

    @property
    def done(self) -> float:
        """How much of the window is done, from 0 to 1."""
        return min(max((self.position - self.begin) / (self.end - self.begin), 0.0), 1.0)

    def tick(self, raw: float, step: int, *, hold: bool = False, total: float = math.inf) -> Events:
        """Move on to a position of the run.

        Args:
            raw: the run's position.
            step: the owning optimizer's step.
            hold: let the clock stand still, if it is between begin and end.
            total: the run's last position: the end is never shifted beyond it.
        """
        gained, steps = raw - self._raw, step - self._raw_step
        self._pace = gained / max(steps, 1)
        if hold and self.may_hold(raw, total):
            self._held, self._held_steps = self._held + gained, self._held_steps + steps
        self._raw, self._raw_step = raw, step
        self.position, self.step = raw - self._held, step - self._held_steps
        return self

    def may_hold(self, raw: float, total: float) -> bool:
        """Whether the clock may stand still over the step to a position of the run."""
        position = raw - self._held
        shifted = self._held + raw - self._raw
        inside = self.begin <= position and not self.over
        margin = 1e-9 if self.in_fractions else 0.0  # sums of fractions are not exact
        return inside and self.end + shifted + margin <= total

    def due(self, *, unfinished: bool) -> bool:
        """Whether an event is due at the clock's position; ask once a step.

        Args:
            unfinished: whether something is left to do at the end.
        """
        if self.position < self.begin:
            return False
        if self._first_step is None:
            self._first_step = self.step if self.in_fractions else int(self.begin)
        if self.over:
            return unfinished
        if self.frequency is not None:
            return (self.step - self._first_step) % self.frequency == 0
        bucket = math.floor(self.count * (self.position - self.begin) / (self.end - self.begin))
        fresh, self._last_bucket = bucket != self._last_bucket, bucket
        return fresh

    def ahead(self) -> float:
        """Steps until the next event, from the pace of the last step; infinite if unknown."""
        if self.over:
            return math.inf
        distance = self._next_position() - self.position
        if distance > 0:
            pace = self._pace if self.in_fractions else 1.0
            distance = distance / pace if pace > 0 else math.inf
        steps = distance
        if self.position >= self.begin and self.frequency is not None:
            first = self._first_step
            first = first if first is not None else int(self.begin)
            until = self.frequency - (self.step - first) % self.frequency
            steps = min(steps, until)
        return max(1, math.ceil(steps - 1e-6)) if steps < math.inf else steps

    def horizon(self, reach: float) -> float:
        """Position of the last event within so many steps, of which there is one at least."""
        pace = self._pace if self.in_fractions else 1.0
        if self.frequency is not None and self.position + reach * pace < self.end:
            ahead = self.ahead()
            reach = ahead + (reach - ahead) // self.frequency * self.frequency
        return min(self.position + reach * pace, self.end)

    def _next_position(self) -> float:
        if self.position < self.begin:
            return self.begin
        if self.frequency is not None:
            return self.end
        edge = self.begin + (self._last_bucket + 1) * (self.end - self.begin) / self.count
        return min(edge, self.end)

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the clock back."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = (
    "position",
    "step",
    "_raw",
    "_raw_step",
    "_pace",
    "_held",
    "_held_steps",
    "_first_step",
    "_last_bucket",
)
