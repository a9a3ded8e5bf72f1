"""ProjectedEMA: exponential moving average of the weights, projected onto masks and grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.callbacks.namespaces import overrides
from lightning_compress.channels.graph import Kept
from lightning_compress.channels.resize import match_channels, shrink
from lightning_compress.copies import copyable
from lightning_compress.errors import TargetError
from lightning_compress.lcz.restoring import STATE, pack_state
from lightning_compress.projection import Projector
from lightning_compress.state import CompressionState, set_grid
from lightning_compress.terminal import ShownArguments

__all__ = ["ProjectedEMA"]

_RAW = "raw_average"  # key of the unprojected average in a checkpoint


class ProjectedEMA(ShownArguments, EMAWeightAveraging):
    """Lightning's EMAWeightAveraging for compressed models: its average is projected.

    The average of pruned or quantized weights is neither pruned nor on the grid. Here validation,
    checkpoints and the trained module get the projection of the average; the average itself goes
    on unprojected, in a checkpoint under a key of its own.

    Args:
        decay: share of the old average kept at each update.
        kwargs: as for `lightning.pytorch.callbacks.EMAWeightAveraging`.

    >>> ProjectedEMA(decay=0.99).should_update(step_idx=0)
    True
    """

    def __init__(self, *, decay: float = 0.999, **kwargs: Any) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must lie in [0, 1)")
        super().__init__(decay=decay, **kwargs)
        self._raw: dict[str, Tensor] = {}
        self._projector: Projector | None = None
        self._finished: dict[str, Tensor] | None = None  # the model of a checkpoint, until training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the module, of either name of Lightning, and whatever its layers hold."""
        with copyable(pl_module):
            if stage != "fit" or isinstance(pl_module, LightningModule):
                super().setup(trainer, pl_module, stage)
                return
            if overrides("configure_model", pl_module):
                pl_module.configure_model()
            self._average_model = AveragedModel(
                pl_module,
                device=self._device or pl_module.device,
                use_buffers=self._use_buffers,
                **self._kwargs,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keep the projector: the module has none when training has ended.

        Raises:
            TargetError: for sharded weights.
        """
        self._finished = None
        self._projector = Projector.find(pl_module)
        if self._average_model is not None:  # a count that is read at each step
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
        projected_weights = self._projector.projected_weights.values() if self._projector else ()
        if sharded := [
            projected.path for projected in projected_weights if projected.shards is not None
        ]:
            raise TargetError(
                f"ProjectedEMA cannot average {sharded}, which are sharded (FSDP2): leave it out, "
                "or train with DDP"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the latent values that the optimizer updates, not the projected ones."""
        self._projector = self._projector or Projector.find(pl_module)  # one that waited
        with self._unprojected():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where updates follow epochs."""
        with self._unprojected():
            super().on_train_epoch_end(trainer, pl_module)

    @contextmanager
    def _unprojected(self) -> Iterator[None]:
        projected_weights = self._projector.projected_weights.values() if self._projector else ()
        with ExitStack() as stack:
            for projected in projected_weights:
                stack.enter_context(projected.unprojected())
            yield

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the projected average into the module."""
        super().on_validation_epoch_start(trainer, pl_module)
        if self._average_model is not None:
            self._raw = self._project(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the unprojected average and the module's own weights back where they were."""
        parameters = dict(pl_module.named_parameters())
        with torch.no_grad():
            for path, raw in self._raw.items():
                parameters[path].copy_(raw)
        self._raw = {}
        super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the projected average in the module, and its grids."""
        super().on_train_end(trainer, pl_module)
        self._project(pl_module, keep_grids=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Hand out the checkpoint's average where a run was over before it began."""
        if self._finished is not None:
            pl_module.load_state_dict(self._finished)
            self._finished = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the projected average as the model, the raw one under its own key."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is None or self._projector is None:
            return
        raw, grids = {}, {}
        for projected in self._projector.projected_weights.values():
            path = projected.target.path
            raw[path] = self._raw.get(path, checkpoint["state_dict"][path])
            checkpoint["state_dict"][path], grid = projected.visible(raw[path])
            if grid is not None:
                grids[path] = grid
        checkpoint["averaging_state"][_RAW] = raw
        # The grids of the average, not those of the weights that train.
        ours = pack_state(CompressionState(grids=grids))["grids"]
        checkpoint.setdefault(STATE, {}).setdefault("grids", {}).update(ours)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the module's own weights and the raw average."""
        raw = checkpoint.get("averaging_state", {}).pop(_RAW, {})
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._finished = dict(checkpoint["state_dict"]) if fitting and raw else None
        if self._average_model is not None:
            match_channels(self._average_model.module, checkpoint["state_dict"])
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            average = dict(self._average_model.module.named_parameters())
            with torch.no_grad():
                for path, value in raw.items():
                    average[path].copy_(value)

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Mapping[str, int]) -> None:  # noqa: ARG002
        """Remove the same channels from the average."""
        if self._average_model is not None:
            shrink(self._average_model.module, kept, sized=sized)

    @torch.no_grad()
    def _project(self, module: nn.Module, *, keep_grids: bool = False) -> dict[str, Tensor]:
        raw, parameters = {}, dict(module.named_parameters())
        for projected in self._projector.projected_weights.values() if self._projector else ():
            path = projected.target.path
            raw[path] = parameters[path].detach().clone()
            values, grid = projected.visible(raw[path])
            parameters[path].copy_(values)
            if keep_grids and grid is not None:
                set_grid(projected.target.layer, projected.target.name, grid)
        return raw
