"""CompressedCheckpoint and CompressedEarlyStopping: ignore scores until every schedule has ended.

The score of an early epoch is that of a nearly dense model: by it, 'best' would be a model that
was never compressed, and a run would stop before it is.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_compress.callbacks.namespaces import BothNamespaces
from lightning_compress.terminal import ShownArguments

__all__ = ["CompressedCheckpoint", "CompressedEarlyStopping", "Scheduled", "unfinished_schedules"]


@runtime_checkable
class Scheduled(Protocol):
    """A callback that compresses by a schedule."""

    state_key: str

    @property
    def schedule_over(self) -> bool:
        """Whether the schedule has ended."""
        ...


def unfinished_schedules(trainer: Trainer) -> list[str]:
    """Keys of the callbacks whose schedule has not ended."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        one.state_key for one in callbacks if isinstance(one, Scheduled) and not one.schedule_over
    ]


class CompressedCheckpoint(ShownArguments, BothNamespaces, ModelCheckpoint):
    """Lightning's ModelCheckpoint that compares scores of compressed models alone.

    Until every compression schedule has ended (pruning at its `end`, quantization at its `freeze`,
    a budget at its `end`), nothing is saved by its score; `save_last` and a checkpoint without
    `monitor` are written all along, so that a run can be resumed. Where the run ends before any
    score counts, a warning says so, and the last state is saved as the best one. Works with
    `ckpt_path="best"`.

    >>> CompressedCheckpoint(monitor="val/loss", mode="min").monitor
    'val/loss'
    """

    _warned = False

    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Save by score, once scores count."""
        if self.monitor is None or self.save_top_k == 0:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
            return
        if waiting := unfinished_schedules(trainer):
            if self.save_last:  # the caller saves it beside whatever was saved at this step
                self._last_global_step_saved = trainer.global_step
            if not self._warned:
                rank_zero_info(f"{type(self).__name__} waits for {', '.join(waiting)} to end")
            self._warned = True
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state where no score has counted."""
        if self.monitor is not None and self.save_top_k != 0 and not self.best_model_path:
            self._save_unscored(trainer)
        super().on_train_end(trainer, pl_module)

    def _save_unscored(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        waiting = unfinished_schedules(trainer)
        why = f"{', '.join(waiting)} had not ended" if waiting else "nothing logged it since"
        rank_zero_warn(
            f"{type(self).__name__}: no score of {self.monitor!r} counts, as {why} when the run "
            "was over: the last state is saved as the best. Let schedules end earlier, or train on"
        )
        candidates = self._monitor_candidates(trainer)
        self.best_model_path = self._get_metric_interpolated_filepath_name(candidates, trainer)
        self._save_checkpoint(trainer, self.best_model_path)


class CompressedEarlyStopping(ShownArguments, BothNamespaces, EarlyStopping):
    """Lightning's EarlyStopping that counts its patience from when every schedule has ended.

    A score that is NaN or infinite still stops a run at once (`check_finite`).

    >>> CompressedEarlyStopping(monitor="val/loss", patience=3).patience
    3
    """

    def _should_skip_check(self, trainer: Trainer) -> bool:
        if super()._should_skip_check(trainer):
            return True
        score = trainer.callback_metrics.get(self.monitor)
        broken = self.check_finite and score is not None and not bool(torch.isfinite(score).all())
        return bool(unfinished_schedules(trainer)) and not broken
