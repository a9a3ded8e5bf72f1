"""GiveUp: end a run whose quality is beyond hope, measured against its dense twin's curve."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["GiveUp", "HopelessRunError"]


class HopelessRunError(RuntimeError):
    """A run that was ended because its quality fell too far below the dense model's."""


class GiveUp(Callback):
    """Raise when a metric stays much worse than the dense run's at the same epoch.

    Args:
        rows: the dense run's curve, as `History` keeps it.
        monitor: the metric's name.
        mode: "min" or "max", the better direction.
        max_loss: how much worse is beyond hope, as a fraction of the dense value.
        after: fraction of the run before which nothing is judged.
        patience: checks in a row that must agree.

    Raises:
        ValueError: for an argument out of its range.

    >>> GiveUp([(10, "val/elbo", -20.0)], monitor="val/elbo", mode="max", max_loss=0.25).patience
    2
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, str, float]],
        *,
        monitor: str,
        mode: str,
        max_loss: float,
        after: float = 0.5,
        patience: int = 2,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: valid are ['max', 'min']")
        if not max_loss > 0:
            raise ValueError(f"hopeless.max_loss={max_loss!r} must be above 0, or null")
        if not 0 <= after <= 1:
            raise ValueError(f"hopeless.after={after!r} must lie in [0, 1]")
        if patience < 1:
            raise ValueError(f"hopeless.patience={patience!r} must be 1 or more")
        self.reference = {step: value for step, name, value in rows if name == monitor}
        self.monitor, self.sign = monitor, 1.0 if mode == "min" else -1.0
        self.max_loss, self.after, self.patience = max_loss, after, patience
        self.misses, self._last = 0, float("nan")

    def loss(self, step: int, value: float) -> float | None:
        """How much worse a value is than the dense one at the step, as a fraction; None: unknown.

        >>> curve = [(10, "val/elbo", -20.0), (20, "val/elbo", -10.0)]
        >>> GiveUp(curve, monitor="val/elbo", mode="max", max_loss=0.25).loss(15, -25.0)
        0.25
        """
        before = [at for at in self.reference if at <= step]
        if not before or self.reference[max(before)] == 0:
            return None
        dense = self.reference[max(before)]
        return self.sign * (value - dense) / abs(dense)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Judge the epoch, if its value is a new one and enough of the run is over.

        Raises:
            HopelessRunError: with both values.
        """
        value = float(trainer.callback_metrics.get(self.monitor, self._last))
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if value == self._last or epoch < self.after * epochs:
            return
        self._last = value
        loss = self.loss(trainer.fit_loop.total_batch_idx + 1, value)
        self.misses = self.misses + 1 if loss is not None and loss > self.max_loss else 0
        if self.misses >= self.patience:
            raise HopelessRunError(
                f"{self.monitor} is {value:.4g} after epoch {epoch} of {epochs}, {loss:.0%} worse "
                f"than the dense model there; more than {self.max_loss:.0%} is beyond hope"
            )

    def state_dict(self) -> dict[str, float]:
        """The count of misses."""
        return {"misses": self.misses}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting."""
        self.misses = int(state_dict["misses"])
