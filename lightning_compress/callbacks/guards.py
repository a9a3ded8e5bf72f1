"""Guards: hold pruning schedules while a GAN's balance or a VAE's posterior is off."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_compress.errors import check_choice
from lightning_compress.terminal import ShownArguments

__all__ = ["BalanceGuard", "Guard", "PosteriorGuard"]

_MEASURES = ("loss", "accuracy", "distance")
_STATE = ("readings", "paused", "recent", "reference")


class Guard(ShownArguments, Callback):
    """Watch a logged metric against its own moving average; pruning waits while it is off.

    Every pruning callback of the same Trainer asks the guard and holds its schedule's clock, up
    to the run's end. While the metric is off the average stands still, so that waiting alone does
    not make it the new normal. Subclasses say what is off by `off`.

    Args:
        monitor: name of the metric. One that begins with "val" is read after each validation,
            any other after each training batch.
        factor: in (0, 1): how far the metric may be from its average.
        decay: of the moving average, in [0, 1).
        smoothing: decay of a faster average, which stands for the metric: one odd batch is none.
        warmup: readings before the guard speaks.
        name: prefix of what is logged, and the key of the state; two guards need two names.

    Raises:
        ValueError: for values outside their range, and in training when nothing logs the metric.

    >>> Guard(monitor="val/kl", warmup=5)
    Guard(monitor='val/kl', warmup=5)
    """

    def __init__(
        self,
        *,
        monitor: str,
        factor: float = 0.5,
        decay: float = 0.99,
        smoothing: float = 0.8,
        warmup: int = 20,
        name: str = "guard",
    ) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor!r} must lie between 0 and 1")
        for what, value in (("decay", decay), ("smoothing", smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{what}={value!r} must lie in [0, 1)")
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup={warmup!r} must be an integer, 1 or more readings")
        self.monitor, self.factor, self.name = monitor, factor, name
        self.decay, self.smoothing, self.warmup = decay, smoothing, warmup
        self.readings, self.paused = 0, False
        self.recent, self.reference = 0.0, 0.0

    @property
    def state_key(self) -> str:
        """Key of this guard's state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    def off(self, recent: float, reference: float) -> bool:
        """Whether the metric is too far from its average."""
        raise NotImplementedError

    def allows(self, trainer: Trainer) -> bool:  # noqa: ARG002
        """Whether pruning may go on."""
        return not self.paused

    def read(self, value: float) -> None:
        """Process a reading of the metric."""
        if self.readings == 0:
            self.recent = self.reference = value
        self.readings += 1
        self.recent += (1 - self.smoothing) * (value - self.recent)
        self.paused = self.readings >= self.warmup and self.off(self.recent, self.reference)
        if not self.paused:
            # The average of all readings at first, as a decay from a single one would be noise.
            share = max(1 - self.decay, 1 / self.readings)
            self.reference += share * (value - self.reference)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Read a training metric and log what follows from it."""
        if not self.monitor.startswith("val"):
            self._watch(trainer)
        pl_module.log(f"{self.name}/paused", float(self.paused))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Read a validation metric."""
        if self.monitor.startswith("val") and not trainer.sanity_checking:
            self._watch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check that there was something to watch.

        Raises:
            ValueError: when nothing logged the metric.
        """
        if self.readings == 0:
            self._missing(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check early that a training metric exists.

        Raises:
            ValueError: when nothing logged the metric.
        """
        if self.readings == 0 and not self.monitor.startswith("val"):
            self._missing(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the verdict."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        for name in _STATE:
            setattr(self, name, state_dict[name])

    def _missing(self, trainer: Trainer) -> None:
        known = sorted(trainer.callback_metrics)
        raise ValueError(f"{self.state_key}: nothing logs monitor={self.monitor!r}; found {known}")

    def _watch(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        if trainer.world_size > 1:  # the same verdict everywhere
            value = trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
        before = self.paused
        self.read(float(value.item() if isinstance(value, Tensor) else value))
        if self.paused != before:
            verdict = "pruning waits" if self.paused else "pruning may go on"
            rank_zero_info(
                f"{self.state_key}: {self.monitor} is at {self.recent:.4g}, its average at "
                f"{self.reference:.4g}: {verdict}"
            )


class BalanceGuard(Guard):
    """For GANs: pruning waits while the discriminator wins too clearly.

    Args:
        monitor: the discriminator's logged loss, accuracy or distance.
        measure: what it is. "loss": off below `factor` of its average. "accuracy" (or the mean
            sigmoid on real images): its distance to 1 is off in this way. "distance" (a
            critic's estimate): off above its average over `factor`.
        kwargs: `factor`, `decay`, `smoothing`, `warmup` and `name`, as for `Guard`.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> guard = BalanceGuard(factor=0.5, warmup=2, smoothing=0.0)
    >>> for loss in (1.0, 1.0, 0.1):
    ...     guard.read(loss)
    >>> guard.paused
    True
    """

    def __init__(
        self, *, monitor: str = "train/d_loss", measure: str = "loss", **kwargs: Any
    ) -> None:
        check_choice("measure", measure, _MEASURES)
        super().__init__(monitor=monitor, **kwargs)
        self.measure = measure

    def off(self, recent: float, reference: float) -> bool:
        """Whether the discriminator wins too clearly."""
        if self.measure == "distance":
            return recent > max(reference, 0.0) / self.factor and recent > 0
        if self.measure == "accuracy":
            recent, reference = 1 - recent, 1 - reference
        return recent < self.factor * reference


class PosteriorGuard(Guard):
    """For VAEs: pruning waits while the KL, or the number of active units, has fallen too far.

    Args:
        monitor: a metric that is small when the posterior has collapsed.
        kwargs: `factor`, `decay`, `smoothing`, `warmup` and `name`, as for `Guard`.

    >>> PosteriorGuard(factor=0.8).off(recent=7.0, reference=10.0)
    True
    """

    def __init__(self, *, monitor: str = "train/kl", **kwargs: Any) -> None:
        super().__init__(monitor=monitor, **kwargs)

    def off(self, recent: float, reference: float) -> bool:
        """Whether the metric has fallen below its share of the average."""
        return recent < self.factor * reference
