"""Safeguards of a run: scores, stop on NaN or infinite values, random state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.modes import evaluating
from lightning_compress.sharding import local_part
from lightning_compress.terminal import ShownArguments

__all__ = [
    "RandomState",
    "ScoreMonitor",
    "StopOnNonFinite",
]
EVERY = 50  # batches between two questions to another device
SHOWN = 3  # names of broken weights in an error
_ADVICE = (
    "training has diverged. Lower the learning rate or the sparsity, start pruning later, or look "
    "at the data"
)


class ScoreMonitor(ShownArguments, Callback):
    """Log the scores that a function computes of the model, after every few validation epochs.

    The function sees the model in eval mode, without gradients, and with a random stream of its
    own, so that watching a run does not change it.

    Args:
        score: from the LightningModule to named numbers.
        every: epochs between two scores, 1 or more.

    Raises:
        ValueError: for `every` below 1.

    >>> ScoreMonitor(lambda model: {"val/answer": 42.0}, every=5).every
    5
    """

    def __init__(
        self, score: Callable[[LightningModule], Mapping[str, float]], *, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} must be 1 or more epochs")
        self.score, self.every = score, every

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and log."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or ((trainer.current_epoch + 1) % self.every and not last):
            return
        with torch.random.fork_rng(), evaluating(pl_module):
            for name, value in self.score(pl_module).items():
                pl_module.log(name, value, on_epoch=True, batch_size=1)


class StopOnNonFinite(ShownArguments, Callback):
    """Raise when a logged value or a weight is NaN or infinite, before a checkpoint holds it.

    Values are checked after each batch, weights after each epoch. Values in another device's memory
    are checked there, and read every 50 batches, after each epoch and before a checkpoint:
    no step waits for them.

    >>> StopOnNonFinite().check({"train/loss": torch.tensor(1.0)}, step=3)
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[Tensor, Tensor]] = {}  # first bad step or -1, its value

    def check(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Check named values.

        Raises:
            FloatingPointError: for a value that is not finite; names it, its value and the step.
        """
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                continue
            if value.device.type != "cpu":
                self._look(name, value.detach(), step)
            elif not torch.isfinite(value).all():
                raise FloatingPointError(f"{name} is {value.tolist()} at step {step}: {_ADVICE}")

    def _look(self, name: str, value: Tensor, step: int) -> None:
        broken = ~torch.isfinite(value).all()
        if name not in self._first or self._first[name][1].shape != value.shape:
            self._first[name] = torch.full_like(broken, -1, dtype=torch.int64), value.clone()
        at, before = self._first[name]
        new = broken & (at < 0)
        self._first[name] = at.masked_fill(new, step), torch.where(new, value, before)

    def check_steps(self) -> None:
        """Read the flags of the last steps from their devices.

        Raises:
            FloatingPointError: as `check`, with the first step at which a value was not finite.
        """
        found, self._first = self._first, {}
        if not found:
            return
        steps = torch.stack(
            [at.to(next(iter(found.values()))[0].device) for at, _ in found.values()]
        )
        for (name, (_, value)), step in zip(found.items(), steps.tolist(), strict=True):
            if step >= 0:
                raise FloatingPointError(f"{name} is {value.tolist()} at step {step}: {_ADVICE}")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Check what the step returned and what was logged."""
        found = {**trainer.callback_metrics}
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            found["loss"] = outputs["loss"]
        self.check(found, step=trainer.global_step)
        if (batch_idx + 1) % EVERY == 0:
            self.check_steps()

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],  # noqa: ARG002
    ) -> None:
        """Let no checkpoint hold a run that has diverged."""
        self.check_steps()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights: the last loss does not know its own step, and some models log none.

        Raises:
            FloatingPointError: naming the weights that are not finite.
        """
        self.check_steps()
        broken = _broken_weights(pl_module)
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            shown = ", ".join(broken[:SHOWN]) or "those of another process"
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise FloatingPointError(
                f"weights that are NaN or infinite after epoch {trainer.current_epoch}, step "
                f"{trainer.global_step}: {shown}{more}; {_ADVICE}"
            )


def _broken_weights(module: nn.Module) -> list[str]:
    return [
        name
        for name, weight in module.named_parameters()
        if not torch.isfinite(local_part(weight.detach())).all()
    ]


class RandomState(ShownArguments, Callback):
    """Carry torch's CPU random stream in checkpoints, so that a resumed run draws the same noise.

    >>> list(RandomState().state_dict())
    ['torch']
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The stream as it is now."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the stream until training starts."""
        self._loaded = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Forget what validate or test may have left here."""
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the stream: after the sanity check, which draws too."""
        if self._loaded is not None:
            torch.set_rng_state(self._loaded["torch"])
            self._loaded = None
