"""What the callbacks that project weights share: targets, hooks on and off, state on resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.errors import TargetError
from lightning_compress.projection import ProjectedWeight, Projector
from lightning_compress.sharding import to_shards
from lightning_compress.state import has_grid
from lightning_compress.targets import Coverage, Pattern, deployed_part, select, unselected

__all__ = ["WeightCallback", "check_run_ends", "run_progress", "tell_of_overlooked"]

_ENDLESS = (
    "begin and end are fractions of the run, but the run has no end: set max_epochs or max_steps "
    "of the Trainer, or give begin and end in optimizer steps (int)"
)
_NO_LENGTH = (
    "begin and end are fractions of the run, but the training data have no length: set max_steps "
    "or limit_train_batches of the Trainer, or give begin and end in optimizer steps (int)"
)
_SOME_ZEROS = 0.05  # of a weight, which no training makes by itself


def check_run_ends(trainer: Trainer) -> None:
    """Check that fractions of the run mean something.

    Raises:
        ValueError: for an endless run.
    """
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise ValueError(_ENDLESS)


def tell_of_overlooked(module: LightningModule) -> None:
    """Warn of weights that are left alone since their network's name says nothing."""
    if names := unselected(module):
        parts = deployed_part(module)
        rank_zero_warn(
            f"weights of {', '.join(names)} are left as they are: only {' and '.join(parts)} are "
            f"known to ship. Name all that ships in an attribute of the model, "
            f"deployed = {(*parts, *names)}, or give include=[...]"
        )


def run_progress(trainer: Trainer) -> float:
    """Fraction of the run done when the current batch ends, in (0, 1], from batches and epochs.

    `trainer.estimated_stepping_batches` is wrong under manual optimization, batches are not.

    Raises:
        ValueError: for an endless run, which has no fractions.
    """
    done = []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and math.isfinite(batches):
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        done.append((trainer.current_epoch * batches + ready) / (epochs * batches))
    if trainer.max_steps > 0:
        done.append((trainer.global_step + 1) / trainer.max_steps)
    if not done:
        endless = epochs is None or epochs < 0
        raise ValueError(_ENDLESS if endless else _NO_LENGTH)
    return min(max(done), 1.0)


class WeightCallback(Callback):
    """Base of the callbacks that project weights while they train.

    Args:
        include: path globs or layer classes; None: the part of the model that ships.
        exclude: the same, taken away again.
        name: prefix of what is logged, and the key of the state in a checkpoint.
    """

    order = 0  # of several callbacks on one weight: masks go before grids

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        one = super().__new__(cls)
        one._made_with = args, kwargs
        return one

    def __init__(
        self,
        *,
        include: Sequence[Pattern] | Pattern | None,
        exclude: Sequence[Pattern] | Pattern,
        name: str,
    ) -> None:
        self.include, self.exclude, self.name = include, exclude, name
        self.coverage: list[Coverage] = []
        self.slots: list[ProjectedWeight] = []
        self._made_with: tuple[tuple[Any, ...], dict[str, Any]]
        self._projector: Projector | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    @property
    def projector(self) -> Projector:
        """The projector of the module in training."""
        if self._projector is None:
            raise RuntimeError(f"{type(self).__name__} is not in a fit: there is no projector yet")
        return self._projector

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find mistakes before anything is built or trained; begin anew with another module."""
        self._loaded = None  # what validate or test may have left here
        if stage != "fit":
            return
        layers = {id(layer) for layer in pl_module.modules()}
        if self.slots and not any(id(slot.target.layer) in layers for slot in self.slots):
            rank_zero_info(f"{self.state_key} begins anew: its last fit was of another module")
            args, kwargs = self._made_with
            type(self).__init__(self, *args, **kwargs)
        _refuse_plain_averaging(trainer)
        if not is_overridden("configure_model", pl_module):
            select(pl_module, self.include, self.exclude)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters by name and hook their optimizers."""
        to_shards(pl_module)
        self._projector = Projector.of(pl_module)
        self.projector.asleep = True
        selection = select(pl_module, self.include, self.exclude)
        self.coverage = selection.coverage
        if self.include is None:
            tell_of_overlooked(pl_module)
        masks = {slot.path: slot.pruned for slot in self.slots}
        self.slots = [self.projector.add(target) for target in selection.targets]
        self.projector.attach(trainer.optimizers)
        self.projector.on_step(lambda: self.on_weight_step(trainer), order=self.order)
        for slot in self.slots:  # a second fit goes on with the masks of the first
            pruned = masks.get(slot.path)
            if pruned is not None and slot.pruned is None and slot.values().shape == pruned.shape:
                slot.set_mask(~pruned)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Apply the state of a checkpoint: sharded strategies load after `on_fit_start`."""
        to_shards(pl_module)  # the sanity check has gathered them
        if self._loaded is not None:
            self.restore_state(self._loaded)
            self._loaded = None
        else:
            self._tell_of_lost_masks()
        self.projector.asleep = False
        self.projector.project()

    def _tell_of_lost_masks(self) -> None:
        """Warn where zeros of an earlier run have no mask any more; a grid makes zeros too."""
        lost = []
        for slot in self.slots:
            mine = slot.owners.get("mask") in (None, self.state_key)
            rounded = slot.owners.get("grid") not in (None, self.state_key)
            rounded = rounded or has_grid(slot.target.layer, slot.target.name)
            if mine and slot.pruned is None and not rounded:
                zeros = (slot.data == 0).float().mean().item()
                if _SOME_ZEROS <= zeros < 1:
                    lost.append(f"{slot.path} ({zeros:.0%})")
        if lost:
            rank_zero_warn(
                f"{self.state_key}: zeros that no mask keeps, so that training fills them: "
                f"{', '.join(lost)}. If they were pruned before, list that fit's pruning callback "
                "(the same object), or resume with ckpt_path"
            )

    def claim(self, what: str, done: str) -> None:
        """Have the targets' masks, say, for itself.

        Args:
            what: no other callback may make: `mask`, `grid` or `activations`.
            done: to a target, for the error's text.

        Raises:
            TargetError: where another callback has it.
        """
        for slot in self.slots:
            owner = slot.owners.setdefault(what, self.state_key)
            if owner != self.state_key:
                raise TargetError(
                    f"{slot.path} is {done} by {owner} and by {self.state_key}: include or "
                    "exclude it so that one of them has it"
                )

    def on_weight_step(self, trainer: Trainer) -> None:
        """React to a step of an optimizer, before its weights are projected."""

    def restore_state(self, state: dict[str, Any]) -> None:
        """Apply what `state_dict` saved, to slots that exist."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the weights are in place.

        One without steps is of no run: others save and load before training begins, such as
        `LearningRateFinder`.
        """
        self._loaded = state_dict if state_dict.get("steps") else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Remove the hooks."""
        self.projector.detach()

    def on_exception(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Leave visible weights and no hooks, whatever happened inside a step."""
        if self._projector is not None:
            self._projector.detach()

    def paths(self) -> list[str]:
        """Paths of the targets."""
        return [slot.path for slot in self.slots]


def _refuse_plain_averaging(trainer: Trainer) -> None:
    from lightning_compress.callbacks.projected_ema import ProjectedEMA

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        plain = isinstance(callback, (WeightAveraging, StochasticWeightAveraging))
        if plain and not isinstance(callback, ProjectedEMA):
            raise TargetError(
                f"{type(callback).__name__} averages weights away from their masks and grids: "
                "use lightning_compress.ProjectedEMA in its place"
            )
