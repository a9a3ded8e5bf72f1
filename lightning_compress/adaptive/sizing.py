"""The control law for a given size: compress until it fits, then keep the best. Pure numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_compress.adaptive.readings import recent
from lightning_compress.adaptive.search import Decision, Reading, Rules, Trial

__all__ = ["SizeSearch"]

_GUESS = 4.0  # log of the bytes that a whole level saves, before any is measured
_SLACK = 0.03  # of the size: what is aimed below it, as symbols spread while weights train on


@dataclass
class SizeSearch:
    """The best model within a number of bytes.

    All levers share one level. The bytes come down at a constant rate, in their logarithm, from
    what they are to what they may be; how far to raise follows from what the last raise saved.
    What then fits trains on, and the best of it is kept.

    Args:
        max_bytes: that must hold the model.
        rules: noise, patience and strides; the limit is not used.
        count: of levers.

    >>> search = SizeSearch(100.0, Rules(limit=0.0), count=1)
    >>> search.read(Reading(cost=1.0, size=400.0, over=True)).levels
    (0.2,)
    >>> search.read(Reading(cost=1.0, size=99.0, over=True))
    Decision(keep=True, restore=False, levels=None, soft=False)
    """

    max_bytes: float
    rules: Rules
    count: int
    history: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.levels = (0.0,) * self.count
        self.first = 0.0  # bytes when the search begins
        self.slope = _GUESS
        self.before: tuple[float, float] | None = None  # level and size of the last raise
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
            return self._fits(reading)
        wanted = self.max_bytes if reading.over else self.target(progress)
        if reading.size <= wanted or self.levels[0] >= 1:
            return Decision()
        aim = max(wanted, self.max_bytes * (1 - _SLACK))
        far = math.log(reading.size / aim) / self.slope
        stride = min(max(far, self.rules.least / 10), self.rules.stride)
        self._note(reading, "too large")
        self.before = (self.levels[0], reading.size)
        self.levels = (min(self.levels[0] + stride, 1.0),) * self.count
        return Decision(levels=self.levels)

    def _learn(self, size: float) -> None:
        if self.before is None or size <= 0:
            return
        gained, saved = self.levels[0] - self.before[0], math.log(self.before[1] / size)
        if gained > 0 and saved > 0:
            self.slope, self.before = saved / gained, None

    def _fits(self, reading: Reading) -> Decision:
        first = self.good is None
        if not first and len(self.readings) < self.rules.patience:
            return Decision()
        cost, best = recent(self.readings), self.good
        self._note(reading, "fits")
        if best is None or cost < best.cost:
            self.good = self.history[-1]
            return Decision(keep=True)
        return Decision()

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
        """Put it back."""
        self.rules, self.levels = Rules(**state["rules"]), tuple(state["levels"])
        self.first, self.slope, self.fit = state["first"], state["slope"], state["fit"]
        self.before = None if state["before"] is None else tuple(state["before"])
        self.readings = list(state["readings"])
        self.history = [Trial.of(one) for one in state["history"]]
        self.good = None if state["good"] is None else Trial.of(state["good"])
