"""QualityBudget: steers other callbacks by a measured quality, and rolls back failed trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from math import inf
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.budget.levers import (
    Lever,
    Limits,
    Steerable,
    all_reversible,
    levels_reached,
    lever_of,
)
from lightning_compress.budget.reference import (
    DENSE,
    Reference,
    check_goal,
    check_window_of_run,
    trial_table,
)
from lightning_compress.budget.search import (
    Decision,
    QualitySearch,
    Reading,
    Rules,
    SearchRules,
    SizeSearch,
    Trial,
    recent,
)
from lightning_compress.callbacks.base import check_run_ends, is_trial_run, run_progress
from lightning_compress.callbacks.namespaces import averages_weights
from lightning_compress.callbacks.rollback import (
    SavePoint,
    bytes_now,
    follow_removal,
    make_save_point,
    roll_back,
    steerable_callbacks,
)
from lightning_compress.callbacks.threshold_pruning import ThresholdPruning
from lightning_compress.channels.graph import Kept
from lightning_compress.errors import TargetError, check_choice
from lightning_compress.terminal import ShownArguments

__all__ = [
    "BudgetCallback",
    "QualityBudget",
    "check_company",
]


def check_company(owner: Any, others: Sequence[Any]) -> None:
    """Check the other callbacks of a budget's Trainer.

    Raises:
        TargetError: naming what it cannot steer, or when there is nothing to steer.
    """
    if refused := [one.state_key for one in others if isinstance(one, ThresholdPruning)]:
        raise TargetError(f"{owner.state_key} cannot steer {refused}: use GradualPruning")
    averaging = [one for one in others if averages_weights(one, swa=False)]
    if averaging and others.index(averaging[0]) < others.index(owner):
        kind = type(averaging[0]).__name__
        raise TargetError(
            f"list {owner.state_key} before {kind}, which replaces the weights at the end of a run"
        )
    if not any(isinstance(one, Steerable) for one in others):
        raise TargetError(
            f"{owner.state_key} has nothing to steer: add a GradualPruning, a ChannelPruning "
            "or a QuantizationAwareTraining to the Trainer"
        )


class BudgetCallback(ShownArguments, Callback):
    """Base of `QualityBudget`: search, save point and state, without the hooks of a fit.

    Args:
        monitor: a logged metric.
        max_degradation: see `QualityBudget`.
        max_bytes: the same.
        reference: of the dense model.
        limits: how far the levers go.
        name: prefix of what is logged, and the key of the state.
    """

    steers = True  # it sets the targets of others
    begin: float
    end: float
    search_rules: SearchRules
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
        self._save_point: SavePoint | None = None
        self._kept = inf  # cost of the save point
        self._kept_at = self._undone = 0  # batches that it had seen; that rolling back lost
        self._pending = Decision()
        self._seen = False
        self._stale: object = None
        self._progress = 0.0  # of the run, at the last reading
        self.degradation: float | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    @property
    def schedule_over(self) -> bool:
        """Whether the search has ended."""
        return self._progress >= self.end

    def fit_results(self) -> dict[str, Any]:
        """The search, for fits that run in another process."""
        kept = ("search", "readings", "degradation")
        return {name: getattr(self, name) for name in kept}

    @property
    def history(self) -> list[Trial]:
        """Trials so far."""
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
        """Find the levers.

        Raises:
            TargetError: when there is none, or when sharded weights could not be rolled back.
        """
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(getattr(one, "waiting", None) is not None for one in others):
            raise TargetError(
                f"{self.state_key} must know the deployed part before training: name it in an "
                "attribute of the model, deployed = (...)"
            )
        for one in steerable_callbacks(trainer):
            if sharded := [
                projected.path
                for projected in one.projected_weights
                if projected.shards is not None
            ]:
                raise TargetError(f"{self.state_key} cannot roll back sharded weights: {sharded}")
        found = [lever_of(one, self.limits) for one in others if isinstance(one, Steerable)]
        self.levers = [one for one in found if one is not None]
        if not self.levers:
            raise TargetError(f"{self.state_key}: no callback quantizes weights or prunes")
        return self.levers

    def _begin(self) -> QualitySearch | SizeSearch:
        given = self.search_rules
        self.reference.fix(self.readings, patience=given.patience)
        rules = Rules(
            limit=self.max_degradation or 0.0,
            spread=self.reference.spread / self.reference.scale,
            patience=given.patience,
            confidence=given.confidence,
            stride=given.stride[0],
            least=given.stride[1],
        )
        rank_zero_info(
            f"{self.state_key}: {self.monitor} of the dense model is "
            f"{self.reference.cost(self.reference.dense):.5g}, one reading's spread "
            f"{self.reference.spread:.2g}"
        )
        if self.max_bytes is not None:
            return SizeSearch(self.max_bytes, rules, len(self.levers), all_reversible(self.levers))
        soft = given.undo == "projection"
        return QualitySearch(rules, [lever.step for lever in self.levers], soft)

    def _finish(self) -> bool:
        """Whether to roll back, now that the run ends."""
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

    def _miss(self, trainer: Trainer, what: str) -> None:
        if is_trial_run(trainer):  # it reaches nothing
            return
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
        """The search, the save point and the pending decision."""
        return {
            "search": None if self.search is None else self.search.state_dict(),
            "readings": list(self.readings),
            "pending": astuple(self._pending),
            "memory": self._save_point,
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
        self._save_point = state["memory"]
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


class QualityBudget(BudgetCallback):
    """Compress as far as a measured quality allows, or to a size at the best quality.

    Takes over the sparsity of each `GradualPruning`, what is left by each `ChannelPruning`, and the
    step or the bits of each `QuantizationAwareTraining`, in the same Trainer. After each reading of
    the metric it decides: compress further, wait, or roll back to the last good model (weights,
    channels, masks, grids and optimizer states, from a save point that a checkpoint holds too;
    learning rates and clocks go on). Changes happen at the beginning of the next batch, so that a
    checkpoint's score is of its weights.

    Args:
        monitor: a logged metric. One that begins with "val" is read after each validation that
            logs it, any other after each training epoch.
        max_degradation: how much worse than the dense model's it may be, as a fraction.
        max_bytes: in its place: predicted bytes that the deployed part must fit, at the best
            quality. The zero-order entropy of its weights: the file is a little smaller.
        mode: "min" or "max": which way the metric is better.
        reference: its value of the dense model. A number; None: the readings before `begin`;
            "dense": of the dense run that the command line trains beside, after as many steps (but
            those that were undone): a model that still learns is compared with one that does.
        spread: standard deviation of one reading; None: from the readings before `begin`.
        irreducible: value of the metric that no model can better, such as the entropy of the data
            in nats under a -ELBO: `max_degradation` is of the dense model's distance from it.
        begin: fraction of the run when compression begins.
        end: fraction of the run after which nothing is tried any more: what was found trains on.
        search: `SearchRules` or their fields: patience, confidence, strides, and what a trial
            that fails rolls back.
        limits: `Limits` of the levers or their fields.
        on_miss: "warn" or "raise" when no model was within the budget.
        name: prefix of what is logged, and the key of the state.

    Attributes:
        history: what was tried, one `Trial` each.
        degradation: of the model that the fit ended with, as a fraction; None before, and where no
            model was within the budget.

    Raises:
        ValueError: for values outside their range, and in training when nothing logs the metric.
        TargetError: when there is nothing to steer.

    >>> QualityBudget("val/loss", 0.02).state_key
    'QualityBudget[budget]'
    """

    def __init__(
        self,
        monitor: str,
        max_degradation: float | None = None,
        *,
        max_bytes: float | None = None,
        mode: str = "min",
        reference: float | str | None = None,
        spread: float | None = None,
        irreducible: float = 0.0,
        begin: float = 0.2,
        end: float = 0.85,
        search: SearchRules | Mapping[str, Any] | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        on_miss: str = "warn",
        name: str = "budget",
    ) -> None:
        check_goal(max_degradation, max_bytes)
        check_window_of_run(begin, end)
        check_choice("on_miss", on_miss, ("warn", "raise"))
        super().__init__(
            monitor,
            max_degradation,
            max_bytes,
            reference=Reference(reference, mode, spread, irreducible=irreducible),
            limits=limits if isinstance(limits, Limits) else Limits(**dict(limits or {})),
            name=name,
        )
        given = search if isinstance(search, SearchRules) else SearchRules(**dict(search or {}))
        self.begin, self.end, self.search_rules, self.on_miss = begin, end, given, on_miss

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check the setup before training."""
        self._loaded = None  # what validate or test may have left here
        if stage != "fit":
            return
        check_run_ends(trainer)
        if self.reference.awaits_curve and self.max_bytes is None:
            raise ValueError(
                f"{self.state_key}: reference={DENSE!r} is for the command line, which trains the "
                "dense model first: give a number, or None to measure it before begin"
            )
        check_company(self, trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Find the levers; a resumed run restores their levels."""
        resumed, self._loaded = self._loaded, None
        self._reset()
        if resumed is not None:
            self._restore_state(resumed, self.take_levers(trainer))
            return
        for lever in self.take_levers(trainer):
            lever.move(0.0)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Apply the decision of the last reading."""
        pending, self._pending = self._pending, Decision()
        if pending.restore and self._save_point is not None:
            roll_back(trainer, pl_module, self._save_point, soft=pending.soft)
        if pending.levels is not None:
            for lever, level in zip(self.levers, pending.levels, strict=True):
                lever.move(level)

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the levels."""
        levels = self.search.levels if self.search is not None else (0.0,) * len(self.levers)
        for lever, level in zip(self.levers, levels, strict=True):
            pl_module.log(f"{self.name}/{lever.name}", float(level))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Note the metric of the last validation: not each one logs it."""
        self._stale = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric and decide."""
        if self.monitor.startswith("val") and not trainer.sanity_checking:
            self._read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric and decide."""
        if not self.monitor.startswith("val"):
            self._stale = None
            self._read(trainer, pl_module)
            if not self._seen:
                self._missing(trainer)

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or value is self._stale or self._pending != Decision():
            return
        if trainer.world_size > 1:  # the same verdict everywhere
            value = trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
        self._seen = True
        cost = self.reference.cost(float(value.item() if isinstance(value, Tensor) else value))
        progress = self._progress = run_progress(trainer)
        if self.search is None:
            self.readings.append(cost)
            if progress < self.begin:
                return
            self.search = self._begin()
        if all(lever.arrived for lever in self.levers):
            self.lately.append(cost)
            self._decide(trainer, pl_module, cost, progress)

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, cost: float, progress: float
    ) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        worse = self.reference.worse(cost, batches - self._undone)
        reading = Reading(
            worse,
            bytes_now(trainer, pl_module),
            over=progress >= self.end,
            levels=levels_reached(self.levers, self.search.levels) if self.search else None,
        )
        tried = len(self.history)
        if isinstance(self.search, SizeSearch):
            done = (progress - self.begin) / (self.end - self.begin)
            self._pending = self.search.read(reading, done)
        elif self.search is not None:
            self._pending = self.search.read(reading)
        if self._pending.keep:
            self._save_point, self._kept = make_save_point(trainer, pl_module), recent(self.lately)
            self._kept_at = batches - self._undone
        if self._pending.restore and not self._pending.soft:
            self._undone = batches - self._kept_at
        if self._pending.levels is not None:
            self.lately = []
        for trial in self.history[tried:]:
            rank_zero_info(f"{self.state_key}: {self._line(trial)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the smallest or best model that is within the budget; print the trials.

        Raises:
            ValueError: when nothing logged the metric.
            RuntimeError: when no model was within the budget, if `on_miss` says so.
        """
        if not self._seen:
            self._missing(trainer)
        if self.search is None:
            self._miss(
                trainer, f"the run ended before begin={self.begin!r}: nothing was compressed"
            )
            return
        back = self._finish()
        if back and self._save_point is not None:
            roll_back(trainer, pl_module, self._save_point)
            rank_zero_info(f"{self.state_key}: rolled back to the last model within the budget")
        self._print()
        if self.search.good is None:
            self._miss(
                trainer, "no model was within the budget; the model is that of the last step"
            )
            return
        cost = self._kept if back or not self.lately else recent(self.lately)
        worse = self.degradation = (cost - self.reference.dense) / self.reference.scale
        noise = self.search.rules.confidence * self.search.rules.spread
        if self.max_degradation is not None and worse > self.max_degradation + noise:
            self._miss(
                trainer,
                f"ended {worse:.2%} worse than the dense model: it held on the way, but the "
                "dense one learned on; raise begin, or train longer",
            )

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Any) -> None:  # noqa: ARG002
        """Update the save point for a removal of channels."""
        if self._save_point is not None:
            follow_removal(self._save_point, kept)
