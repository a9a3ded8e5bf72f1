"""MaskCallback: base of the callbacks that make masks at pruning events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_compress.callbacks.base import WeightCallback
from lightning_compress.callbacks.guarded_clock import GuardedClock
from lightning_compress.errors import TargetError
from lightning_compress.fast_tensors import count_non_finite
from lightning_compress.projection import ProjectedWeight, divergence_message
from lightning_compress.pruning.masks import pack_mask, unpack_mask
from lightning_compress.targets import Pattern

__all__ = ["MaskCallback"]
_SPACING = 4  # steps between events that nobody has set: an event costs as much as some steps


class MaskCallback(WeightCallback):
    """Base of the callbacks that make masks at events in a window of the run.

    Args:
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit.
        frequency: steps between events; None: about 100 events from begin to end, in windows of
            less than 400 steps one every four steps, but ten at least.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        dense_gradient: pruned weights keep training as latent values and may return.
        name: prefix of what is logged, and the key of the state.
    """

    order = 0

    def __init__(
        self,
        *,
        begin: float,
        end: float,
        frequency: int | None,
        include: Sequence[Pattern] | Pattern | None,
        exclude: Sequence[Pattern] | Pattern,
        dense_gradient: bool,
        name: str,
    ) -> None:
        super().__init__(include=include, exclude=exclude, name=name)
        self.events = GuardedClock(begin, end, frequency, spacing=_SPACING)
        self.dense_gradient = dense_gradient
        self.sparsity = 0.0  # of the targets, by their masks

    @property
    def is_steered(self) -> bool:
        """Whether a budget sets the target, instead of the schedule."""
        return False

    @property
    def schedule_over(self) -> bool:
        """Whether masks are final; a `QualityBudget` has an end of its own."""
        return self.is_steered or (self.events.over and not self.needed(self.events.position))

    def fit_results(self) -> dict[str, Any]:
        """The sparsity too."""
        return {**super().fit_results(), "sparsity": self.sparsity}

    def event(self, trainer: Trainer) -> None:
        """Make new masks for the position of the clock and hand them to `set_masks`."""
        raise NotImplementedError

    def needed(self, position: float) -> bool:
        """Whether an event at a position would change anything."""
        raise NotImplementedError

    def ready(self, step: int) -> bool:  # noqa: ARG002
        """Whether the statistics of an event are complete; if not, it waits."""
        return True

    def before_event(self, trainer: Trainer, step: int) -> None:
        """React to a step of the owning optimizer, before masks may change."""

    def look_ahead(self, step: int) -> None:
        """Prepare for the next event, after each step."""

    def check_sharded(self) -> None:
        """Check that this way of pruning works on parameters that are sharded over processes.

        Raises:
            TargetError: when it does not.
        """
        raise TargetError(
            f"{type(self).__name__} cannot prune sharded parameters (FSDP2): use GradualPruning"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, hook their optimizers and say how many there are."""
        earlier = {projected.path: projected for projected in self.projected_weights}
        super().on_fit_start(trainer, pl_module)
        self.claim("mask", "pruned")
        if any(projected.shards is not None for projected in self.projected_weights):
            self.check_sharded()
        self.events.start(trainer)
        for projected in self.projected_weights if self.dense_gradient else ():
            projected.dense_gradient = True
            _adopt_latent(projected, earlier.get(projected.path))
        skipped = len(self.coverage) - len(self.projected_weights)
        weights = sum(projected.target.numel for projected in self.projected_weights)
        rank_zero_info(
            f"{self.state_key}: {len(self.projected_weights)} targets with {weights:,} weights, "
            f"{skipped} parameters skipped"
        )

    def on_targets_changed(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: LightningModule,  # noqa: ARG002
        added: Sequence[ProjectedWeight],
    ) -> None:
        """Include new targets in the sparsity: they are dense until the next event."""
        self.claim("mask", "pruned")
        for projected in added if self.dense_gradient else ():
            projected.dense_gradient = True
        self.sparsity = self._count()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint and read the clock."""
        super().on_train_start(trainer, pl_module)
        self.events.last_step = self.projector.clock(self.paths())
        self.look_ahead(self.events.last_step)

    def on_weight_step(self, trainer: Trainer) -> None:
        """Make masks when an event is due."""
        self.events.advance(trainer, self.projector.clock(self.paths()), self)

    def _check_finite(self) -> None:
        """Raise for weights that are NaN or infinite: most criteria would not notice."""
        counts = [
            projected.partition.all_reduce_sum(count_non_finite(projected.values()))
            for projected in self.projected_weights
        ]
        if counts and int(torch.stack([one.to(counts[0].device) for one in counts]).sum()):
            broken = [
                one for one, count in zip(self.projected_weights, counts, strict=True) if int(count)
            ]
            raise FloatingPointError(
                f"{self.state_key}, step {self.events.last_step}: {divergence_message(*broken[:5])}"
            )

    def on_event(self, trainer: Trainer) -> None:
        """Make new masks of weights whose pruned ones are 0."""
        for (
            projected
        ) in self.projected_weights:  # the optimizer's momentum has just moved them away from it
            if projected.pruned is not None and not projected.dense_gradient:
                projected.zero_pruned(projected.values(), in_place=True)
        self._check_finite()
        self.event(trainer)

    def due(self) -> bool:
        """Whether an event is due or pending."""
        needed = self.needed(self.events.position)
        return self.events.is_due(needed=needed, steered=self.is_steered)

    @torch.no_grad()
    def set_masks(
        self,
        projected_weights: Sequence[ProjectedWeight],
        masks: Sequence[Tensor],
        trainer: Trainer,
    ) -> None:
        """Give each target its mask, the first process's everywhere."""
        for projected, mask in zip(projected_weights, masks, strict=True):
            if trainer.world_size > 1 and projected.shards is None:
                shared = trainer.strategy.broadcast(pack_mask(mask))
                mask = unpack_mask(shared, mask.shape)
            projected.set_mask(mask)

    def project(self) -> None:
        """Project the weights onto the current masks, and update the sparsity."""
        for projected in self.projected_weights:
            projected.project()
        if self.projector.copies is not None:
            self.projector.copies.mask(self.projector)
        self.sparsity = self._count()

    def _count(self) -> float:
        total = sum(projected.target.numel for projected in self.projected_weights)
        if not total:
            return 0.0
        return (
            sum(projected.sparsity * projected.target.numel for projected in self.projected_weights)
            / total
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Log the sparsity of the targets."""
        self.log_new(pl_module, batch_idx, {"sparsity": self.sparsity})

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), latent values, clock and position of the schedule."""
        packed = {}
        for (
            projected
        ) in self.projected_weights:  # one after another: a sharded mask is gathered for it
            if projected.pruned is not None:
                pruned = projected.whole(projected.pruned)
                packed[projected.path] = (pack_mask(~pruned), tuple(pruned.shape))
        hidden = [one for one in self.projected_weights if one.dense_gradient]
        return {
            "masks": packed,
            "latents": {
                one.path: one.whole(one.latent) for one in hidden if one.latent is not None
            },
            "steps": [] if self._projector is None else list(self._projector.steps),
            "events": self.events.state_dict(),
            "waits": self.events.wait_state,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore masks and clock.

        Raises:
            ValueError: when the checkpoint holds masks for weights that are no targets now.
        """
        by_path = {projected.path: projected for projected in self.projected_weights}
        if unknown := sorted(set(state["masks"]) - set(by_path)):
            raise ValueError(f"the checkpoint prunes {unknown}, which are no targets of this run")
        for path, (packed, shape) in state["masks"].items():
            by_path[path].set_mask(by_path[path].partition.part(unpack_mask(packed, shape)))
        for path, latent in state["latents"].items():
            if self.dense_gradient:
                by_path[path].set_values(by_path[path].partition.part(latent))
        self.projector.steps[:] = state["steps"]
        self.events.load_state_dict(state["events"])
        self.events.wait_state = state["waits"]
        self.sparsity = self._count()


def _adopt_latent(projected: ProjectedWeight, earlier: ProjectedWeight | None) -> None:
    """Take over the latent values of an earlier fit, where the weight is unchanged since."""
    if earlier is not None and earlier.latent is not None and projected.latent is None:
        projected.latent, projected.grid = earlier.latent, earlier.grid
