"""Schedules: from a step, or a fraction of the run, to a value. Pure numbers, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Constant",
    "Cosine",
    "EventClock",
    "Linear",
    "Polynomial",
    "Schedule",
    "Staircase",
    "check_window",
]
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
    "_buckets",
)

_EVENTS = 100  # in a window, where no frequency is given
_FEWEST = 10  # of them, however far apart they are to lie


def check_window(begin: float, end: float) -> bool:
    """Check a window and tell its unit: True for fractions of the run, False for steps.

    Integers count optimizer steps, floats in [0, 1] are fractions of the run; 0 fits both.

    Raises:
        ValueError: when begin >= end, a bound is negative, a fraction exceeds 1, or the two
            bounds are of different units.

    >>> check_window(0.0, 0.7), check_window(0, 1000)
    (True, False)
    """
    for name, bound in (("begin", begin), ("end", end)):
        whole = isinstance(bound, int) and not isinstance(bound, bool)
        if not whole and not isinstance(bound, float):
            raise ValueError(f"{name}={bound!r}: give an int (steps) or a float in [0, 1]")
        if not bound >= 0 or (not whole and bound > 1):
            raise ValueError(f"{name}={bound!r}: steps are >= 0, fractions lie in [0, 1]")
    if begin >= end:
        raise ValueError(f"begin={begin!r} must be smaller than end={end!r}")
    if begin != 0 and isinstance(begin, float) != isinstance(end, float):
        raise ValueError(
            f"begin={begin!r} and end={end!r} mix steps (int) with fractions of the run (float)"
        )
    return isinstance(end, float)


def _check_sparsity(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: a sparsity lies in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from `initial_sparsity` at `begin` to `final_sparsity` at `end`.

    Called with a step or a fraction of the run, whichever `begin` and `end` are given in; before
    `begin` the value is 0, after `end` it stays final.

    Raises:
        ValueError: for a sparsity outside [0, 1) or an empty window.
    """

    final_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    begin: float = 0.0
    end: float = 0.7

    def __post_init__(self) -> None:
        _check_sparsity("final_sparsity", self.final_sparsity)
        _check_sparsity("initial_sparsity", self.initial_sparsity)
        check_window(self.begin, self.end)

    def _shape(self, position: float) -> float:
        """How much of the way is done at a position in [0, 1]: from 0 to 1."""
        raise NotImplementedError

    def __call__(self, step: float) -> float:
        """The value at a step, or at a fraction of the run."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return float(self.final_sparsity)
        position = (step - self.begin) / (self.end - self.begin)
        span = self.final_sparsity - self.initial_sparsity
        return self.initial_sparsity + span * self._shape(position)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The final value at once, from `begin` on (one-shot pruning).

    >>> schedule = Constant(final_sparsity=0.5, begin=0.2)
    >>> schedule(0.1), schedule(0.2)
    (0.0, 0.5)
    """

    def _shape(self, position: float) -> float:  # noqa: ARG002 - the same everywhere
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line.

    >>> Linear(final_sparsity=0.8, begin=0, end=100)(50)
    0.4
    """

    def _shape(self, position: float) -> float:
        return position


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """Fast at first, then slower: `1 - (1 - t)^power`, cubic in Zhu & Gupta, arXiv:1710.01878.

    Raises:
        ValueError: for a power that is not above 0.

    >>> Polynomial(final_sparsity=0.8, begin=0, end=100)(50)
    0.7000000000000001
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power={self.power!r} must be above 0")

    def _shape(self, position: float) -> float:
        return 1.0 - (1.0 - position) ** self.power


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Slow at both ends: `(1 - cos(pi t)) / 2`.

    >>> round(Cosine(final_sparsity=0.8, begin=0, end=100)(50), 6)
    0.4
    """

    def _shape(self, position: float) -> float:
        return (1.0 - math.cos(math.pi * position)) / 2.0


@dataclass(frozen=True, kw_only=True)
class Staircase(Schedule):
    """Equal jumps: the first of `stairs` at `begin`, the last one at `end`.

    Raises:
        ValueError: for fewer than 2 stairs.

    >>> schedule = Staircase(final_sparsity=0.8, begin=0, end=100, stairs=5)
    >>> schedule(0), schedule(49), schedule(50), schedule(100)
    (0.0, 0.2, 0.4, 0.8)
    """

    stairs: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stairs < 2:
            raise ValueError(f"stairs={self.stairs!r} must be 2 or more")

    def _shape(self, position: float) -> float:
        return math.floor(position * (self.stairs - 1)) / (self.stairs - 1)


class EventClock:
    """Clock of the events in a window, with one at its end if something is unfinished then.

    Positions are steps of the owning optimizer or fractions of the run, in the unit of the
    window. A clock that is held stands still: what it missed shifts all that follows.

    Args:
        begin: first position.
        end: last position.
        frequency: steps between events; None: about `count` events.
        count: of events, where no frequency is given.
        spacing: steps from one to the next, at least, where that leaves ten of them.

    Raises:
        ValueError: for an empty window or a frequency below 1.

    >>> events = EventClock(0, 10, 4)
    >>> [step for step in range(1, 13) if events.tick(step, step).due(unfinished=True)]
    [4, 8, 10, 11, 12]
    """

    def __init__(
        self,
        begin: float,
        end: float,
        frequency: int | None,
        *,
        count: int = _EVENTS,
        spacing: int = 1,
    ) -> None:
        self.count, self.spacing = count, spacing
        self.begin, self.end, self.in_fractions = begin, end, check_window(begin, end)
        if frequency is not None and (not isinstance(frequency, int) or frequency < 1):
            raise ValueError(f"frequency={frequency!r} must be an integer, 1 or more steps")
        self.frequency = frequency
        self.reset()

    def reset(self) -> None:
        """Reset."""
        self.position, self.step = 0.0, 0  # of the clock, without the time it was held
        self._raw, self._raw_step = 0.0, 0
        self._pace = 0.0  # position gained in a step
        self._held, self._held_steps = 0.0, 0
        self._first_step: int | None = None
        self._last_bucket = -1
        self._buckets = self.count  # of the window, with an event each

    @property
    def over(self) -> bool:
        """Whether the clock has come to the end."""
        return self.position >= self.end

    @property
    def done(self) -> float:
        """How much of the window is done, from 0 to 1."""
        return min(max((self.position - self.begin) / (self.end - self.begin), 0.0), 1.0)

    def tick(
        self, raw: float, step: int, *, hold: bool = False, total: float = math.inf
    ) -> EventClock:
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
            self._buckets = self._spaced()
        if self.over:
            return unfinished
        if self.frequency is not None:
            return (self.step - self._first_step) % self.frequency == 0
        bucket = math.floor(self._buckets * (self.position - self.begin) / (self.end - self.begin))
        fresh, self._last_bucket = bucket != self._last_bucket, bucket
        return fresh

    def _spaced(self) -> int:
        """How many events the window has room for."""
        pace = self._pace if self.in_fractions else 1.0
        steps = (self.end - self.begin) / pace if pace > 0 else math.inf
        return int(min(self.count, max(_FEWEST, steps / self.spacing + 1e-6)))

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
        edge = self.begin + (self._last_bucket + 1) * (self.end - self.begin) / self._buckets
        return min(edge, self.end)

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the clock back."""
        for name in _STATE:  # a version before 0.2 had `count` events in any window
            setattr(self, name, state.get(name, self.count))
