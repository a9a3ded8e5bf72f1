"""What a budget knows in a fit: its levers, its search, the model to go back to; and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from math import inf
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_compress.adaptive.levers import Lever, Limits
from lightning_compress.adaptive.readings import recent
from lightning_compress.adaptive.reference import Reference
from lightning_compress.adaptive.search import Decision, QualitySearch, Rules, Trial
from lightning_compress.adaptive.sizing import SizeSearch
from lightning_compress.adaptive.table import trial_table
from lightning_compress.callbacks.memory import Memory, steered
from lightning_compress.callbacks.threshold import ThresholdPruning
from lightning_compress.errors import TargetError

__all__ = ["BudgetCallback", "check_company"]


def check_company(owner: Any, others: Sequence[Any]) -> None:
    """Check what a budget shares a Trainer with.

    Raises:
        TargetError: naming what it cannot steer, or that there is nothing to.
    """
    if refused := [one.state_key for one in others if isinstance(one, ThresholdPruning)]:
        raise TargetError(f"{owner.state_key} cannot steer {refused}: use GradualPruning")
    averaging = [one for one in others if isinstance(one, WeightAveraging)]
    if averaging and others.index(averaging[0]) < others.index(owner):
        kind = type(averaging[0]).__name__
        raise TargetError(f"list {owner.state_key} before {kind}, which ends a run with its own")
    if not any(hasattr(one, "lever") for one in others):
        raise TargetError(
            f"{owner.state_key} has nothing to steer: add a GradualPruning, a ChannelPruning "
            "or a QuantizationAwareTraining to the Trainer"
        )


class BudgetCallback(Callback):
    """Base of `QualityBudget`: all but when it reads and acts.

    Args:
        monitor: a logged metric.
        max_degradation: see `QualityBudget`.
        max_bytes: the same.
        reference: of the dense model.
        limits: how far the levers go.
        name: prefix of what is logged, and the key of the state.
    """

    steers = True  # others leave it to this one how far they go
    begin: float
    patience: int
    confidence: float
    stride: tuple[float, ...]
    undo: str
    on_miss: str

    def __init__(
        self,
        monitor: str,
        max_degradation: float | None,
        max_bytes: float | None,
        *,
        reference: Reference,
        limits: Limits,
        name: str,
    ) -> None:
        self.monitor, self.max_degradation, self.max_bytes = monitor, max_degradation, max_bytes
        self.reference, self.limits, self.name = reference, limits, name
        self.levers: list[Lever] = []
        self._loaded: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.search: QualitySearch | SizeSearch | None = None
        self.readings: list[float] = []  # costs of the dense model, before the search
        self.lately: list[float] = []  # costs since the model was last changed
        self._memory: Memory | None = None
        self._kept = inf  # cost of the model that is remembered
        self._kept_at = self._undone = 0  # batches that it had seen; that were lost by going back
        self._pending = Decision()
        self._seen = False
        self._stale: object = None

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    @property
    def history(self) -> list[Trial]:
        """What was tried so far."""
        return [] if self.search is None else self.search.history

    def take_dense(self, rows: Sequence[tuple[int, str, float]]) -> None:
        """Take a dense run's readings as reference: `(batches seen, metric, value)` of `History`.

        Raises:
            ValueError: when they hold none of the metric.
        """
        pairs = [(at, value) for at, metric, value in rows if metric == self.monitor]
        if not pairs:
            known = sorted({metric for _, metric, _ in rows})
            raise ValueError(f"{self.state_key}: the dense run logged no {self.monitor!r}: {known}")
        self.reference.take(pairs)

    def take_levers(self, trainer: Trainer) -> list[Lever]:
        """Find what can be moved.

        Raises:
            TargetError: when that is nothing, or when sharded weights could not go back.
        """
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for one in steered(trainer):
            if sharded := [slot.path for slot in one.slots if slot.shards is not None]:
                raise TargetError(
                    f"{self.state_key} cannot go back with sharded weights: {sharded}"
                )
        found = [one.lever(self.limits) for one in others if hasattr(one, "lever")]
        self.levers = [one for one in found if one is not None]
        if not self.levers:
            raise TargetError(f"{self.state_key}: no callback quantizes weights or prunes")
        return self.levers

    def _begin(self) -> QualitySearch | SizeSearch:
        self.reference.fix(self.readings, patience=self.patience)
        rules = Rules(
            limit=self.max_degradation or 0.0,
            spread=self.reference.spread / self.reference.scale,
            patience=self.patience,
            confidence=self.confidence,
            stride=self.stride[0],
            least=self.stride[1],
        )
        rank_zero_info(
            f"{self.state_key}: {self.monitor} of the dense model is "
            f"{self.reference.cost(self.reference.dense):.5g}, one reading's spread "
            f"{self.reference.spread:.2g}"
        )
        if self.max_bytes is not None:
            return SizeSearch(self.max_bytes, rules, len(self.levers))
        soft = self.undo == "projection"
        return QualitySearch(rules, [lever.step for lever in self.levers], soft)

    def _finish(self) -> bool:
        """Whether to go back, now that the run ends."""
        pending, self._pending = self._pending, Decision()
        if pending.restore or self.search is None:
            return pending.restore
        back = self.search.finish().restore
        # A model that only trained on since it was kept is off where the dense one got better.
        trained_on = isinstance(self.search, QualitySearch) and self.search.moved is None
        better = bool(self.lately) and recent(self.lately) < self._kept
        return back and not (trained_on and better)

    @rank_zero_only
    def _print(self) -> None:
        trial_table(self.history, self.levers, self.monitor)

    def _miss(self, what: str) -> None:
        if self.on_miss == "raise":
            raise RuntimeError(f"{self.state_key}: {what}")
        rank_zero_warn(f"{self.state_key}: {what}")

    def _missing(self, trainer: Trainer) -> None:
        known = sorted(trainer.callback_metrics)
        raise ValueError(f"{self.state_key}: nothing logs monitor={self.monitor!r}; found {known}")

    def _line(self, trial: Trial) -> str:
        pairs = zip(self.levers, trial.levels, strict=True)
        settings = ", ".join(lever.setting(level) for lever, level in pairs)
        worse = f"{self.monitor} {trial.cost:+.2%} worse"
        return f"{settings}: {trial.size:,.0f} bytes, {worse}: {trial.verdict}"

    def state_dict(self) -> dict[str, Any]:
        """The search, the last good model and what is still to be done."""
        return {
            "search": None if self.search is None else self.search.state_dict(),
            "readings": list(self.readings),
            "pending": astuple(self._pending),
            "memory": self._memory,
            "seen": self._seen,
            "lately": list(self.lately),
            "kept": (self._kept, self._kept_at, self._undone),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = state_dict

    def _restore_state(self, state: dict[str, Any], levers: Sequence[Lever]) -> None:
        self.readings, self._seen = list(state["readings"]), state["seen"]
        keep, restore, levels, soft = state["pending"]
        self._pending = Decision(keep, restore, None if levels is None else tuple(levels), soft)
        self._memory = state["memory"]
        self._kept, self._kept_at, self._undone = state["kept"]
        self.lately = list(state["lately"])
        if state["search"] is not None:
            if len(state["search"]["levels"]) != len(levers):
                raise ValueError(
                    f"{self.state_key}: the checkpoint steers {len(state['search']['levels'])} "
                    f"levers, this run {[lever.name for lever in levers]}"
                )
            self.search = self._begin()
            self.search.load_state_dict(state["search"])
