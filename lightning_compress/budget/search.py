"""Search for the strongest compression within a limit, or the best model within a size.

Pure numbers, no torch: the control laws of `QualityBudget`, readings in, decisions out.

A lever has a level from 0 (leaves the model alone) to 1 (as much as it may); several levers have
one level each. A law is fed each reading of the metric and answers with a `Decision`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

__all__ = [
    "LONGEST",
    "Decision",
    "QualitySearch",
    "Reading",
    "Rules",
    "SearchRules",
    "SizeSearch",
    "Trial",
    "estimated_spread",
    "recent",
    "within_limit",
]
LONGEST = 4  # times the patience: the most readings of a trial
_GUESS = 4.0  # log of the bytes that a whole level saves, before any is measured
_UNDO = ("all", "projection")
_SLACK = 0.03  # of the size: aimed below it, and told from noise: symbols spread as weights train


def recent(readings: Sequence[float]) -> float:
    """Mean of the later half of some readings, without those right after a change.

    >>> recent([9.0, 3.0, 2.0]), recent([4.0])
    (2.5, 4.0)
    """
    return fmean(readings[len(readings) // 2 :])


def estimated_spread(readings: Sequence[float]) -> float:
    """Standard deviation of single readings around a trend that is smooth; 0 for less than 3.

    From second differences, which a straight trend leaves at 0: those of independent noise have
    6 times its variance. By their median size, so that a single outlier does not count.

    >>> estimated_spread([5.0, 4.0, 3.0, 2.0])
    0.0
    """
    trios = zip(readings, readings[1:], readings[2:], strict=False)
    bends = [abs(a - 2 * b + c) for a, b, c in trios]
    return 1.4826 * median(bends) / math.sqrt(6) if bends else 0.0


def within_limit(
    readings: Sequence[float],
    limit: float,
    *,
    spread: float = 0.0,
    patience: int = 4,
    confidence: float = 1.0,
) -> bool | None:
    """Whether the cost has reached a limit since the last change.

    Clear cases are decided early: below the limit by more than the noise, or so far above it that
    even a straight line through the recovery so far would not get there. After `patience` readings
    the mean of the later half decides, but a cost that still falls, fast enough to be there within
    twice as many again, may go on: what was trained is worth more than the readings. After
    `LONGEST` times the patience it must be decided.

    Args:
        readings: costs since the change, in order.
        limit: the highest cost that will do.
        spread: standard deviation of a single reading.
        patience: readings after which it is decided, unless the cost still falls.
        confidence: standard errors that make a case clear.

    Returns:
        True, False, or None to wait for another reading.

    >>> within_limit([1.0], 2.0), within_limit([5.0, 5.0], 2.0), within_limit([5.0, 3.0], 2.0)
    (True, False, None)
    >>> within_limit([1.9], 2.0, spread=0.5) is None
    True
    """
    if not readings or not all(map(math.isfinite, readings)):
        return False if readings else None
    count = len(readings)
    now = recent(readings[-2 * patience :])
    margin = confidence * spread / math.sqrt(min(count - count // 2, patience))
    off = readings[-1] - confidence * spread > limit  # whatever the mean says, it is getting worse
    if now + margin <= limit and not off:
        return True
    if count < patience:
        return None if count < 2 or _may_come(readings, limit, patience, margin) else False
    if now <= limit and not off:
        return True
    left = (now - limit) / max(_pace(readings[-patience:]), 1e-300)
    return None if left <= 2 * patience and count < LONGEST * patience else False


def _may_come(readings: Sequence[float], limit: float, patience: int, margin: float) -> bool:
    """Whether a straight line through all readings, and the noise, comes to the limit in time."""
    pace = max((readings[0] - readings[-1] + margin) / (len(readings) - 1), 0.0)
    return readings[-1] - pace * (3 * patience - len(readings)) - margin <= limit


def _pace(readings: Sequence[float]) -> float:
    """How fast the cost falls, in a reading: from the earlier half's mean to the later one's."""
    half = len(readings) // 2
    if half == 0:
        return 0.0
    return max(fmean(readings[:half]) - fmean(readings[-half:]), 0.0) / (len(readings) - half)


@dataclass(frozen=True)
class Reading:
    """Reading: the cost and state after a validation.

    Args:
        cost: the metric, less is better.
        size: predicted bytes.
        over: whether the time to search is over.
        levels: where the levers are, when some went further than they were set; None: as set.
    """

    cost: float
    size: float
    over: bool = False
    levels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Decision:
    """Decision that follows from a reading.

    Args:
        keep: make the model as it is the save point: it is good.
        restore: roll back to the save point.
        soft: roll back masks and grids alone; the weights stay as they have trained on.
        levels: to bring the levers to, after that; None: as they are.
    """

    keep: bool = False
    restore: bool = False
    levels: tuple[float, ...] | None = None
    soft: bool = False


@dataclass(frozen=True)
class Trial:
    """Trial: one line of the history, with levels and verdict."""

    levels: tuple[float, ...]
    size: float
    cost: float
    readings: int
    verdict: str

    @classmethod
    def of(cls, state: dict[str, Any]) -> Trial:
        """What `asdict` made of a trial, and a file of it."""
        return cls(**{**state, "levels": tuple(state["levels"])})


@dataclass(frozen=True, kw_only=True)
class SearchRules:
    """How `QualityBudget` searches: `QualityBudget(search=...)`.

    Args:
        patience: readings after which a trial must be decided; clear ones are decided earlier.
        confidence: standard errors by which a case is clear.
        stride: of a level (see `Limits`) at first, and the smallest that is tried.
        undo: what a trial that fails rolls back. "all": weights, channels, masks, grids,
            optimizer states. "projection": channels, masks and grids, and weights train on from
            their values; all is rolled back only if that fails too. It loses no steps, and fits a
            model that still learns.

    Raises:
        ValueError: naming the value and what is valid.

    >>> SearchRules(stride=(0.5, 0.1)).patience
    4
    """

    patience: int = 4
    confidence: float = 1.0
    stride: tuple[float, float] = (0.2, 0.025)
    undo: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", tuple(self.stride))
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience={self.patience!r} must be an integer, 1 or more readings")
        if len(self.stride) != 2 or not 0 < self.stride[1] <= self.stride[0] <= 1:
            raise ValueError(
                f"stride={self.stride!r}: give the first and the smallest, both in (0, 1]"
            )
        if not 0 <= self.confidence < math.inf:
            raise ValueError(f"confidence={self.confidence!r} must be 0 or more")
        if self.undo not in _UNDO:
            raise ValueError(f"undo={self.undo!r}: valid are {list(_UNDO)}")


@dataclass(frozen=True)
class Rules:
    """Limit, noise and strides of a search.

    Args:
        limit: the highest cost that will do.
        spread: standard deviation of a single reading.
        patience: readings after which a trial must be decided.
        confidence: standard errors that make a case clear.
        stride: of a level, at first.
        least: the smallest stride that is still tried.
        shrink: of a stride after a trial that failed.
    """

    limit: float
    spread: float = 0.0
    patience: int = 4
    confidence: float = 1.0
    stride: float = 0.2
    least: float = 0.025
    shrink: float = 0.5


@dataclass
class QualitySearch:
    """The smallest model within a limit of cost.

    One lever at a time is raised, the one that has lately saved most for what it cost. A trial
    that meets the limit is kept. One that does not is undone, and its lever tries half as far
    next time. When no lever can move, the model trains on, and they try again.

    Args:
        rules: limit, noise and strides.
        steps: the smallest move of each lever: 0 for continuous ones.
        soft: what a trial trained is kept when it is undone, unless it is no good then either.

    >>> search = QualitySearch(Rules(limit=1.0, patience=2), steps=(0.0,))
    >>> search.read(Reading(cost=0.9, size=100.0))
    Decision(keep=True, restore=False, levels=(0.2,), soft=False)
    >>> search.read(Reading(cost=2.0, size=60.0)).levels is None
    True
    >>> search.read(Reading(cost=2.0, size=60.0))
    Decision(keep=False, restore=True, levels=(0.1,), soft=False)
    """

    rules: Rules
    steps: Sequence[float]
    soft: bool = False
    history: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.steps)
        self.levels = (0.0,) * count
        self.good: Trial | None = None  # the last that met the limit
        self.moved: int | None = None  # the lever that is on trial
        self.softened = False  # the last trial was undone, and its weights are still here
        self.strides = [max(self.rules.stride, step) for step in self.steps]
        self.gains = [math.inf] * count
        self.readings: list[float] = []

    def read(self, reading: Reading) -> Decision:
        """Process a reading of the model at `levels`."""
        self.readings.append(reading.cost)
        if reading.levels is not None:
            self.levels = reading.levels
        verdict = self._judge()
        if reading.over:
            return self._settle(reading, verdict)
        if verdict is None:
            return Decision()
        if self.moved is None:
            return self._rest(reading, met=verdict)
        return self._next(reading, met=verdict)

    def _judge(self) -> bool | None:
        rules = self.rules
        return within_limit(
            self.readings,
            rules.limit,
            spread=rules.spread,
            patience=rules.patience,
            confidence=rules.confidence,
        )

    def _rest(self, reading: Reading, *, met: bool) -> Decision:
        """Between trials: the model as it is, on which nothing was changed lately."""
        if self.softened:
            return self._after_soft(reading, met=met)
        if not met:  # it trains on, until it is good enough to begin with
            self.readings = self.readings[-self.rules.patience :]
            return Decision()
        first = self.good is None
        if not first and len(self.readings) < self.rules.patience:
            return Decision()
        if not first:
            again = 2 * self.rules.least
            self.strides = [max(again, step) for step in self.steps]
        self._note(reading, "good" if first else "trained on")
        return Decision(keep=True, levels=self._raise())

    def _after_soft(self, reading: Reading, *, met: bool) -> Decision:
        """A trial was undone but for its weights: they are kept if they are good."""
        self.softened = False
        if met:
            self._note(reading, "trained on")
            return Decision(keep=True, levels=self._raise())
        self.readings = []
        return Decision(restore=True, levels=self._raise())

    def _next(self, reading: Reading, *, met: bool) -> Decision:
        lever, good = self.moved or 0, self.good
        if good is None:
            raise RuntimeError("a trial without a good model before it")
        saved = math.log(good.size / reading.size) if reading.size > 0 else 0.0
        lost = recent(self.readings) - good.cost
        noise = max(self.rules.spread, 1e-2 * abs(self.rules.limit), 1e-6)
        self.gains[lever] = saved / max(lost, noise)
        if met:
            if saved <= 0:  # at its end: higher levels change nothing
                self.strides[lever] = 0.0
            self._note(reading, "good")
            return Decision(keep=True, levels=self._raise())
        self._note(reading, "too costly")
        self.strides[lever] = self._smaller(lever)
        return self._undo(good)

    def _undo(self, good: Trial, *, further: bool = True) -> Decision:
        self.levels, self.softened = good.levels, self.soft
        if self.soft or not further:
            return Decision(restore=True, levels=self.levels, soft=self.soft)
        return Decision(restore=True, levels=self._raise())

    def _smaller(self, lever: int) -> float:
        stride, step = self.strides[lever], self.steps[lever]
        if stride <= step * (1 + 1e-9):
            return 0.0
        return max(stride * self.rules.shrink, step)

    def _note(self, reading: Reading, verdict: str) -> None:
        cost = recent(self.readings)
        trial = Trial(self.levels, reading.size, cost, len(self.readings), verdict)
        self.history.append(trial)
        if verdict != "too costly":
            self.good = trial
        self.readings, self.moved = [], None

    def _raise(self) -> tuple[float, ...]:
        """Levels for the next trial; those of now when no lever can move."""
        free = [
            lever
            for lever, stride in enumerate(self.strides)
            if stride >= max(self.rules.least * (1 - 1e-9), 1e-12) and self.levels[lever] < 1
        ]
        if free:
            self.moved = max(free, key=lambda lever: (self.gains[lever], -lever))
            raised = min(self.levels[self.moved] + self.strides[self.moved], 1.0)
            self.levels = tuple(
                raised if lever == self.moved else level for lever, level in enumerate(self.levels)
            )
        return self.levels

    def _settle(self, reading: Reading, verdict: bool | None) -> Decision:
        """The search is over: undo an open trial that has not met the limit, train on."""
        noise = self.rules.confidence * self.rules.spread
        near = max(recent(self.readings), self.readings[-1] - noise)
        met = verdict if verdict is not None else near <= self.rules.limit
        if self.moved is not None and not met and self.good is not None:
            self._note(reading, "too costly")
            return self._undo(self.good, further=False)
        fresh = self.moved is not None or self.good is None
        if met and (fresh or self.softened or len(self.readings) >= self.rules.patience):
            self.softened = False
            self._note(reading, "good" if fresh else "trained on")
            return Decision(keep=True)
        if len(self.readings) > self.rules.patience:
            self.readings = self.readings[-self.rules.patience :]
        return Decision()

    def finish(self) -> Decision:
        """End of the run: keep the present model if it meets the limit, else roll back."""
        if self.good is None:
            return Decision()
        unread = not self.readings and (self.moved is not None or self.softened)
        noise = self.rules.confidence * self.rules.spread
        now = max(recent(self.readings), self.readings[-1] - noise) if self.readings else 0.0
        off = bool(self.readings) and now > self.rules.limit
        if unread or off:
            self.levels = self.good.levels
            return Decision(restore=True, levels=self.levels)
        return Decision()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, in plain numbers."""
        return {
            "rules": asdict(self.rules),
            "levels": list(self.levels),
            "good": None if self.good is None else asdict(self.good),
            "moved": self.moved,
            "softened": self.softened,
            "strides": list(self.strides),
            "gains": list(self.gains),
            "readings": list(self.readings),
            "history": [asdict(trial) for trial in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.rules = Rules(**state["rules"])
        self.levels, self.moved = tuple(state["levels"]), state["moved"]
        self.softened = state["softened"]
        self.good = None if state["good"] is None else Trial.of(state["good"])
        self.strides, self.gains = list(state["strides"]), list(state["gains"])
        self.readings = list(state["readings"])
        self.history = [Trial.of(one) for one in state["history"]]


@dataclass
class SizeSearch:
    """The best model within a number of bytes.

    All levers share one level. The bytes come down at a constant rate, in their logarithm, from
    what they are to what they may be; how far to raise follows from what the last raise saved.
    What then fits trains on, and the best of it is kept. Reversible levers go down again while
    the search lasts, where the bytes are fewer than they need be.

    Args:
        max_bytes: that must hold the model.
        rules: noise, patience and strides; the limit is not used.
        count: of levers.
        reversible: whether a lower level of all of them brings back what a higher one took.

    >>> search = SizeSearch(100.0, Rules(limit=0.0), count=1)
    >>> search.read(Reading(cost=1.0, size=400.0, over=True)).levels
    (0.2,)
    >>> search.read(Reading(cost=1.0, size=99.0, over=True))
    Decision(keep=True, restore=False, levels=None, soft=False)
    """

    max_bytes: float
    rules: Rules
    count: int
    reversible: bool = False
    history: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.levels = (0.0,) * self.count
        self.first = 0.0  # bytes when the search begins
        self.slope = _GUESS
        self.before: tuple[float, float] | None = None  # level and size that a slope counts from
        self.good: Trial | None = None  # the best that fits
        self.readings: list[float] = []
        self.fit = False  # whether the model of the last reading does

    def target(self, progress: float) -> float:
        """Bytes that the model should have by now, at a fraction of the search.

        >>> SizeSearch(100.0, Rules(limit=0.0), count=1).target(1.0)
        100.0
        """
        first = max(self.first, self.max_bytes)
        return self.max_bytes * (first / self.max_bytes) ** (1 - min(max(progress, 0.0), 1.0))

    def read(self, reading: Reading, progress: float = 1.0) -> Decision:
        """Take in a reading of the model at `levels`, at a fraction of the search."""
        self.first = self.first or reading.size
        self.readings.append(reading.cost)
        self._learn(reading.size)
        self.fit = reading.size <= self.max_bytes
        if self.fit:
            return self._fits(reading, lower=self.reversible and progress < 1)
        wanted = self.max_bytes if reading.over else self.target(progress)
        if reading.size <= wanted or self.levels[0] >= 1:
            return Decision()
        self._note(reading, "too large")
        return Decision(levels=self._move(reading.size, max(wanted, self._aim)))

    @property
    def _aim(self) -> float:
        return self.max_bytes * (1 - _SLACK)

    def _move(self, size: float, aim: float) -> tuple[float, ...]:
        """Levels that bring a size to another, as far as the last move tells."""
        far = math.log(size / aim) / self.slope
        stride = math.copysign(min(max(abs(far), self.rules.least / 10), self.rules.stride), far)
        self.before = self.before or (self.levels[0], size)
        self.levels = (min(max(self.levels[0] + stride, 0.0), 1.0),) * self.count
        return self.levels

    def _learn(self, size: float) -> None:
        if self.before is None or size <= 0:
            return
        gained, saved = self.levels[0] - self.before[0], math.log(self.before[1] / size)
        if gained * saved > 0 and abs(saved) >= _SLACK:  # less may be the noise of training
            self.slope, self.before = saved / gained, None
        elif abs(gained) * self.slope >= 2 * _SLACK:  # it foresaw what did not come
            self.slope, self.before = self.slope / 2, None

    def _fits(self, reading: Reading, *, lower: bool) -> Decision:
        first = self.good is None
        if not first and len(self.readings) < self.rules.patience:
            return Decision()
        cost, best = recent(self.readings), self.good
        self._note(reading, "fits")
        keep = best is None or cost < best.cost
        if keep:
            self.good = self.history[-1]
        spare = reading.size < self.max_bytes * (1 - 2 * _SLACK) and self.levels[0] > 0
        return Decision(
            keep, levels=self._move(reading.size, self._aim) if lower and spare else None
        )

    def _note(self, reading: Reading, verdict: str) -> None:
        cost, count = recent(self.readings), len(self.readings)
        self.history.append(Trial(self.levels, reading.size, cost, count, verdict))
        self.readings = []

    def finish(self) -> Decision:
        """The run ends: back to the best that fits, where the model of now is clearly worse.

        What has grown since, as weights trained on, does not fit.
        """
        if self.good is None or not (self.fit and self.readings):
            return Decision(restore=self.good is not None and not self.fit)
        count = len(self.readings)
        margin = self.rules.confidence * self.rules.spread / math.sqrt(count - count // 2)
        worse = recent(self.readings) - margin > self.good.cost
        return Decision(restore=worse)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, in plain numbers."""
        return {
            "rules": asdict(self.rules),
            "levels": list(self.levels),
            "first": self.first,
            "fit": self.fit,
            "slope": self.slope,
            "before": None if self.before is None else list(self.before),
            "good": None if self.good is None else asdict(self.good),
            "readings": list(self.readings),
            "history": [asdict(trial) for trial in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.rules, self.levels = Rules(**state["rules"]), tuple(state["levels"])
        self.first, self.slope, self.fit = state["first"], state["slope"], state["fit"]
        self.before = None if state["before"] is None else tuple(state["before"])
        self.readings = list(state["readings"])
        self.history = [Trial.of(one) for one in state["history"]]
        self.good = None if state["good"] is None else Trial.of(state["good"])
