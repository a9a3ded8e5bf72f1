"""The control laws of `QualityBudget`: readings in, what to do out. Pure numbers, no torch.

A lever has a level from 0 (leaves the model alone) to 1 (as much as it may); several levers have
one level each. A law is fed each reading of the metric and answers with a `Decision`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_compress.adaptive.readings import judge, recent

__all__ = ["Decision", "QualitySearch", "Reading", "Rules", "Trial"]


@dataclass(frozen=True)
class Reading:
    """What is known after a validation.

    Args:
        cost: the metric, less is better.
        size: predicted bytes.
        over: whether the time to search is over.
        levels: where the levers are, when some went further than they were told; None: there.
    """

    cost: float
    size: float
    over: bool = False
    levels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Decision:
    """What follows from a reading.

    Args:
        keep: remember the model as it is: it is good.
        restore: go back to the model last remembered.
        soft: to its masks and grids alone: weights stay as they have trained on.
        levels: to bring the levers to, after that; None: as they are.
    """

    keep: bool = False
    restore: bool = False
    levels: tuple[float, ...] | None = None
    soft: bool = False


@dataclass(frozen=True)
class Trial:
    """One line of the history: what was tried, and what came of it."""

    levels: tuple[float, ...]
    size: float
    cost: float
    readings: int
    verdict: str

    @classmethod
    def of(cls, state: dict[str, Any]) -> Trial:
        """What `asdict` made of a trial, and a file of it."""
        return cls(**{**state, "levels": tuple(state["levels"])})


@dataclass(frozen=True)
class Rules:
    """How a search proceeds.

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
        """Take in a reading of the model at `levels`."""
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
        return judge(
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
        """The run ends: the model of now where it meets the limit, else the last good one."""
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
        """Put it back."""
        self.rules = Rules(**state["rules"])
        self.levels, self.moved = tuple(state["levels"]), state["moved"]
        self.softened = state["softened"]
        self.good = None if state["good"] is None else Trial.of(state["good"])
        self.strides, self.gains = list(state["strides"]), list(state["gains"])
        self.readings = list(state["readings"])
        self.history = [Trial.of(one) for one in state["history"]]
