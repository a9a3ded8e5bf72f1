"""WeightCallback: base of callbacks that project weights; targets, optimizer hooks, resuming."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_compress.callbacks.deferral import (
    DEFERRED_HOOKS,
    deferred,
    load_deployed,
    save_deployed,
)
from lightning_compress.callbacks.namespaces import (
    averages_weights,
    is_multiprocessing_launcher,
    overrides,
)
from lightning_compress.callbacks.spawned import bring_results_back, results_come_back
from lightning_compress.channels.following import FollowedCopies
from lightning_compress.channels.resize import rebuild_channels
from lightning_compress.copies import Copy, frozen_copies
from lightning_compress.deployment import deployed_part
from lightning_compress.errors import TargetError
from lightning_compress.lcz.restoring import STATE, attach_state, has_state, pack_state
from lightning_compress.projection import ProjectedWeight, Projector
from lightning_compress.pruning.masks import were_pruned
from lightning_compress.sharding import to_shards
from lightning_compress.state import (
    ActivationGrids,
    CompressionState,
    compression_state,
    known_grid,
    known_mask,
    removed_channels,
    set_grid,
)
from lightning_compress.structure import StructureReader
from lightning_compress.targets import (
    Coverage,
    CoverageTable,
    Pattern,
    Selection,
    clean_path,
    low_coverage,
    select,
    split_path,
    unselected,
)
from lightning_compress.terminal import ShownArguments

__all__ = [
    "WeightCallback",
    "builds_layers_later",
    "check_run_ends",
    "is_trial_run",
    "run_progress",
    "warn_of_unselected",
]

_ENDLESS = (
    "begin and end are fractions of the run, but the run has no end: set max_epochs or max_steps "
    "of the Trainer, or give begin and end in optimizer steps (int)"
)
_NO_LENGTH = (
    "begin and end are fractions of the run, but the training data have no length: set max_steps "
    "or limit_train_batches of the Trainer, or give begin and end in optimizer steps (int)"
)
_UNCALLED = "no forward pass calls the layer: the weights have had no gradient"
_SOME_ZEROS = 0.05  # of a weight, which no training makes by itself


def check_run_ends(trainer: Trainer) -> None:
    """Check that the run has an end, which fractions of it need.

    Raises:
        ValueError: for an endless run.
    """
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise ValueError(_ENDLESS)


def is_trial_run(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which is to find errors and reaches nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))


def builds_layers_later(module: LightningModule) -> bool:
    """Whether a module may get its layers, or the sizes of lazy ones, after callbacks' `setup`."""
    return any(overrides(hook, module) for hook in ("setup", "configure_model"))


def warn_of_unselected(module: LightningModule, optimizers: Sequence[Optimizer] = ()) -> None:
    """Warn of weights that are skipped since their network's name is unknown.

    Networks of an optimizer that trains nothing of the deployed part are not named: they judge it.
    """
    if names := [one for one in unselected(module) if not _elsewhere(module, one, optimizers)]:
        parts = deployed_part(module)
        rank_zero_warn(
            f"weights of {', '.join(names)} are skipped: only {' and '.join(parts)} are known to "
            f"be deployed. Name all deployed networks in an attribute of the model, "
            f"deployed = {(*parts, *names)}, or give include=[...]"
        )


def warn_of_low_coverage(module: LightningModule, coverage: Sequence[Coverage]) -> None:
    """Warn where less than half of the deployed part's weights are targets."""
    if message := low_coverage(module, coverage):
        rank_zero_warn(message)


def _elsewhere(module: LightningModule, path: str, optimizers: Sequence[Optimizer]) -> bool:
    parts = [module.get_submodule(one) for one in deployed_part(module)]
    deployed = {id(each) for part in parts for each in part.parameters()}
    own = {id(each) for each in module.get_submodule(path).parameters()}
    groups = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    owners = [ids for ids in groups if ids & own]
    return bool(owners) and not any(ids & deployed for ids in owners)


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


def check_even_batches(trainer: Trainer) -> None:
    """Check that all processes make as many steps: one that ends first leaves the others waiting.

    Raises:
        ValueError: on all of them, with the least and the most batches.
    """
    if trainer.world_size < 2:
        return
    own = trainer.num_training_batches
    count = int(own) if math.isfinite(own) else -1
    sent = torch.tensor([count, -count], device=trainer.strategy.root_device)
    most, least = trainer.strategy.reduce(sent, reduce_op="max").tolist()
    if most != -least:
        raise ValueError(
            f"processes have {-least} to {most} training batches an epoch: the one that ends first "
            "leaves the others waiting. Use a DistributedSampler (Lightning's own does), or "
            "limit_train_batches"
        )


class WeightCallback(ShownArguments, Callback):
    """Base of the callbacks that project weights while they train.

    Args:
        include: path globs or layer classes; None: the deployed part of the model.
        exclude: the same, taken away again.
        name: prefix of what is logged, and the key of the state in a checkpoint.
    """

    order = 0  # of several callbacks on one weight: masks go before grids

    waiting: StructureReader | None = None  # until the deployed part is known

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Defer the hooks of every callback until the deployed part is known."""
        super().__init_subclass__(**kwargs)
        for name in DEFERRED_HOOKS:
            if name in cls.__dict__:
                setattr(cls, name, deferred(cls.__dict__[name]))

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        bring_results_back()  # in the processes of a spawned fit too, which unpickle it
        one = super().__new__(cls, *args, **kwargs)
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
        self.coverage = CoverageTable()
        self.projected_weights: list[ProjectedWeight] = []
        self._made_with: tuple[tuple[Any, ...], dict[str, Any]]
        self._projector: Projector | None = None
        self._loaded: dict[str, Any] | None = None
        self._groups: list[int] = []  # of parameters in each optimizer, when targets were looked up
        self._warned_idle = False
        self._logged: Mapping[str, float] | None = None
        self._warned_unowned: set[str] = set()
        self.uncalled: dict[str, torch.nn.Parameter] = {}  # of layers that no forward calls

    @property
    def slots(self) -> list[ProjectedWeight]:
        """Former name of `projected_weights`, which warns."""
        warnings.warn("`slots` is `projected_weights` now", FutureWarning, stacklevel=2)
        return self.projected_weights

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    @property
    def schedule_over(self) -> bool:
        """Whether the schedule has ended; `CompressedCheckpoint` waits for it."""
        return True

    def fit_results(self) -> dict[str, Any]:
        """Attributes that are read after a fit, for fits that run in another process."""
        return {"coverage": self.coverage}

    @property
    def projector(self) -> Projector:
        """The projector of the module in training."""
        if self._projector is None:
            raise RuntimeError(f"{type(self).__name__} is not in a fit: there is no projector yet")
        return self._projector

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments before anything is built or trained; reset for another module."""
        self._loaded = self.waiting = None  # what validate, test or a broken fit may have left
        if stage != "fit":
            return
        layers = {id(layer) for layer in pl_module.modules()}
        if self.projected_weights and not any(
            id(projected.target.layer) in layers for projected in self.projected_weights
        ):
            rank_zero_info(f"{self.state_key} is reset: its last fit was of another module")
            args, kwargs = self._made_with
            type(self).__init__(self, *args, **kwargs)
        _refuse_plain_averaging(trainer)
        if not builds_layers_later(pl_module):
            select(pl_module, self.include, self.exclude)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters by name and hook their optimizers."""
        _warn_of_spawned(trainer)
        to_shards(pl_module)
        self._projector = Projector.of(pl_module)
        self.projector.asleep = True
        self._find_copies(trainer, pl_module)
        selection = self._select(pl_module)
        self.coverage = selection.coverage
        if self.include is None:
            warn_of_unselected(pl_module, trainer.optimizers)
            warn_of_low_coverage(pl_module, self.coverage)
        masks = {projected.path: projected.pruned for projected in self.projected_weights}
        self.projected_weights = [self.projector.add(target) for target in selection.targets]
        self.projector.attach(trainer.optimizers)
        self._groups, self._warned_idle, self._warned_unowned = [], False, set()
        self.projector.on_step(lambda: self.on_weight_step(trainer), order=self.order)
        for projected in self.projected_weights:  # a second fit goes on with the masks of the first
            pruned = masks.get(projected.path)
            if (
                pruned is not None
                and projected.pruned is None
                and projected.values().shape == pruned.shape
            ):
                projected.set_mask(~pruned)
            _adopt_known_mask(projected)

    def _select(self, module: LightningModule) -> Selection:
        """Select the current targets; copies of trained weights follow these and are no targets."""
        apart = {one.path: f"a copy of {one.source}, which it follows" for one in self.copies}
        apart |= dict.fromkeys(self.uncalled, _UNCALLED)
        return select(module, self.include, self.exclude, apart=apart)

    def leave_uncalled(self, layers: Mapping[str, torch.nn.Parameter]) -> None:
        """Let go of targets in layers that no forward pass calls; they come back when one does."""
        before = set(self.uncalled)
        self.uncalled.update(layers)
        paths = {
            projected.path
            for projected in self.projected_weights
            if _layer_of(projected) in self.uncalled
        }
        if not paths:
            return
        module: Any = Projector.module_of(self.projected_weights[0])
        for projected in self.projected_weights:
            if projected.path in paths:
                self._give_up(projected)
        self.projected_weights = [
            projected for projected in self.projected_weights if projected.path not in paths
        ]
        self.coverage = CoverageTable(
            replace(row, selected=False, reason=_UNCALLED) if clean_path(row.path) in paths else row
            for row in self.coverage
        )
        if set(self.uncalled) - before:
            rank_zero_warn(f"{self.state_key} leaves {sorted(paths)} as they are: {_UNCALLED}")
        self.on_targets_changed(module.trainer, module, [])

    def _give_up(self, projected: ProjectedWeight) -> None:
        """Let go of a weight, unless another callback has it: that one keeps its own state."""
        for what in [what for what, by in projected.owners.items() if by == self.state_key]:
            del projected.owners[what]
        if projected.owners:
            projected.set_mask(None)
        else:
            self.projector.drop(projected.path)

    def _find_copies(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find copies of trained weights, such as an average that the user keeps."""
        if self.projector.copies is None:
            owned = {
                id(one)
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
                for one in group["params"]
                if one.requires_grad  # many optimizers are made from self.parameters()
            }
            for one in pl_module.modules():
                if isinstance(one, AveragedModel):  # whose parameters require gradients
                    owned -= {id(each) for each in one.parameters()}
            found = frozen_copies(pl_module, owned)
            self.projector.copies = FollowedCopies(pl_module, found)

    @property
    def copies(self) -> list[Copy]:
        """Copies of trained networks inside the module, which follow them."""
        followed = self.projector.copies
        return [] if followed is None else followed.copies

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Project averages, and what user code wrote since the last step, for validation."""
        if self._projector is None or self.waiting is not None:
            return
        if trainer.state.fn == TrainerFn.FITTING and not self._projector.asleep:
            self._projector.settle()
        if self._projector.copies is not None:
            self._projector.copies.show(self._projector)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Restore the unprojected averages."""
        if self._projector is not None and self._projector.copies is not None:
            self._projector.copies.hide()

    def settle_copies(self) -> None:
        """Project averages onto their masks and grids, when training has ended."""
        if self._projector is not None and self._projector.copies is not None:
            self._projector.copies.settle(self._projector)

    @deferred
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing, but while the structure is read."""

    def log_new(self, module: LightningModule, batch_idx: int, values: Mapping[str, float]) -> None:
        """Log what has changed: Lightning keeps a value for the epoch, and a call is slow."""
        if batch_idx != 0 and values == self._logged:
            return
        self._logged = dict(values)
        for name, value in values.items():
            module.log(f"{self.name}/{name}", value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint: sharded strategies load after `on_fit_start`.

        Raises:
            ValueError: where processes have different numbers of batches.
        """
        check_even_batches(trainer)
        to_shards(pl_module)  # the sanity check has gathered them
        if self._loaded is not None:
            self.restore_state(self._loaded)
            self._loaded = None
        else:
            self._warn_of_lost_masks()
        self.projector.asleep = False
        self.projector.project()

    @deferred
    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Update targets and optimizers: each epoch, and when optimizers have changed."""
        groups = [len(one.param_groups) for one in trainer.optimizers]
        same = groups == self._groups and self.projector.is_attached_to(trainer.optimizers)
        if batch_idx == 0 or not same:
            self._groups = groups
            self._look_again(trainer, pl_module)

    def look_again_soon(self) -> None:
        """Look for targets before the next batch: layers have become others."""
        self._groups = []

    def _look_again(self, trainer: Trainer, module: LightningModule) -> None:
        """Add new targets, and drop those that are no longer the module's."""
        to_shards(module)
        own = {clean_path(path): one for path, one in module.named_parameters()}
        kept = [
            projected
            for projected in self.projected_weights
            if own.get(projected.path) is projected.parameter
        ]
        known = {projected.path for projected in kept}
        gone = [projected for projected in self.projected_weights if projected not in kept]
        try:
            selection = self._select(module)
        except TargetError:  # all of it is frozen or gone: what is left of the targets goes on
            fresh, coverage = [], self.coverage
        else:
            fresh = [one for one in selection.targets if clean_path(one.path) not in known]
            coverage = selection.coverage
        for projected in gone:
            if self.projector.projected_weights.get(projected.path) is projected:
                self.projector.drop(projected.path)
        added = [self.projector.add(target) for target in fresh]
        self.projected_weights = [*kept, *added]
        self._warn_of_unowned(self.projector.attach(trainer.optimizers, strict=False))
        if not added and not gone:
            return
        self.coverage = coverage
        for projected in added:
            _adopt_known_mask(projected)
        _report_target_changes(self.state_key, added, gone)
        if self.projected_weights:
            self.on_targets_changed(trainer, module, added)

    @deferred
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:  # noqa: ARG002
        """Hook optimizers that user code has made since the batch began.

        Targets wait for the next batch: a graph with the weights of now is alive.
        """
        if not self.projector.is_attached_to(trainer.optimizers):
            self.projector.attach(trainer.optimizers, strict=False)
            self._groups = []

    def on_targets_changed(
        self, trainer: Trainer, module: LightningModule, added: Sequence[ProjectedWeight]
    ) -> None:
        """React to targets added or removed in mid-run; `self.projected_weights` are current."""

    def _warn_of_unowned(self, paths: Sequence[str]) -> None:
        own = set(self.paths())
        if fresh := [one for one in paths if one in own and one not in self._warned_unowned]:
            self._warned_unowned.update(fresh)
            rank_zero_warn(
                f"{self.state_key}: no optimizer owns {fresh}, so that they do not train. "
                "Give them to one, by add_param_group or by trainer.strategy.setup_optimizers"
            )

    @deferred
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Warn of an optimizer without a step in the first epoch; project what user code wrote."""
        self.projector.settle()
        if not self._warned_idle and (why := self.why_no_steps()):
            rank_zero_warn(f"{self.state_key}: {why}")
        self._warned_idle = True

    def why_no_steps(self) -> str:
        """Why the clock does not advance; empty when every optimizer of the targets makes steps."""
        idle = self.projector.idle(self.paths())
        return "; ".join(_why_idle(optimizer, moved=moved) for optimizer, moved in idle)

    def _warn_of_lost_masks(self) -> None:
        """Warn where zeros of an earlier run have no mask any more; a grid makes zeros too."""
        lost = []
        for projected in self.projected_weights:
            mine = projected.owners.get("mask") in (None, self.state_key)
            rounded = projected.owners.get("grid") not in (None, self.state_key)
            grid = known_grid(projected.target.layer, projected.target.name)
            rounded = rounded or grid is not None
            pruned = False
            if grid is not None and projected.shards is None:
                pruned = were_pruned(grid.quantize(projected.data))
            if mine and projected.pruned is None and (pruned or not rounded):
                zeros = (projected.data == 0).float().mean().item()
                if _SOME_ZEROS <= zeros < 1:
                    lost.append(f"{projected.path} ({zeros:.0%})")
        if lost:
            rank_zero_warn(
                f"{self.state_key}: zeros that no mask keeps, so that training fills them: "
                f"{', '.join(lost)}. If they were pruned before, list that fit's pruning callback "
                "(the same object), resume with ckpt_path, or list GradualPruning(keep_zeros=True)"
            )

    def claim(self, what: str, done: str) -> None:
        """Claim one kind of state of the targets, such as their masks, for this callback.

        Args:
            what: no other callback may make: `mask`, `grid` or `activations`.
            done: to a target, for the error's text.

        Raises:
            TargetError: where another callback has it.
        """
        for projected in self.projected_weights:
            owner = projected.owners.setdefault(what, self.state_key)
            if owner != self.state_key:
                raise TargetError(
                    f"{projected.path} is {done} by {owner} and by {self.state_key}: include or "
                    "exclude it so that one of them has it"
                )

    def on_weight_step(self, trainer: Trainer) -> None:
        """React to a step of an optimizer, before its weights are projected."""

    def restore_state(self, state: dict[str, Any]) -> None:
        """Apply what `state_dict` saved, to projected weights that exist."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the weights are in place.

        One without steps is of no run: others save and load before training begins, such as
        `LearningRateFinder`.
        """
        self._loaded = state_dict if state_dict.get("steps") else None

    def activation_grids_now(self) -> dict[str, ActivationGrids]:
        """Current grids of activations in this fit, by path of the layer."""
        return {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the deployed part and the compression state; one callback does it for all.

        What another callback has saved, such as the grids of an average, counts.
        """
        save_deployed(pl_module, checkpoint)
        if STATE in checkpoint and "version" in checkpoint[STATE]:
            return
        state = pack_state(_state_now(trainer, pl_module))
        for what, known in checkpoint.get(STATE, {}).items():
            state[what].update(known)
        checkpoint[STATE] = state

    def on_load_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Attach the grids and masks of the loaded checkpoint to the module."""
        load_deployed(pl_module, checkpoint)
        if not has_state(checkpoint):
            return
        if not removed_channels(pl_module):
            rebuild_channels(pl_module, checkpoint)
        attach_state(pl_module, checkpoint)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Remove the hooks; a run that was over before it began keeps what its checkpoint says."""
        self.stop()
        self.settle_copies()
        if self._loaded is not None:
            with _as_loaded(self.projected_weights):
                self.restore_state(self._loaded)
                self.projector.project()
            self._loaded = None
            self.on_finished_run(pl_module)
        self.projector.detach()

    def stop(self) -> None:
        """Free what was prepared and remove own hooks, when the fit ends or breaks."""

    def on_finished_run(self, module: LightningModule) -> None:
        """React to a `fit` that had nothing left to train, once the state is back."""

    def on_exception(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Project the weights and remove the hooks, whatever happened inside a step."""
        self.stop()
        if self.waiting is not None:
            self.waiting.stop()
        if self._projector is not None:
            self._projector.detach()

    def paths(self) -> list[str]:
        """Paths of the targets."""
        return [projected.path for projected in self.projected_weights]


@contextmanager
def _as_loaded(projected_weights: Sequence[ProjectedWeight]) -> Iterator[None]:
    """Keep the weights and grids of a checkpoint while a state is restored."""
    layers = [(projected.target.layer, projected.target.name) for projected in projected_weights]
    grids = [known_grid(layer, name) for layer, name in layers]
    values = [projected.data.clone() for projected in projected_weights]
    yield
    with torch.no_grad():
        for projected, grid, value in zip(projected_weights, grids, values, strict=True):
            projected.data.copy_(value)
            if grid is not None:
                set_grid(projected.target.layer, projected.target.name, grid)


def _warn_of_spawned(trainer: Trainer) -> None:
    spawned = is_multiprocessing_launcher(trainer.strategy.launcher)
    if spawned and not results_come_back():
        rank_zero_warn(
            "the fit runs in processes of its own, from which this version of Lightning brings "
            "back weights alone: call restore_compression(module, checkpoint) when it is over"
        )


def _report_target_changes(
    key: str, added: Sequence[ProjectedWeight], gone: Sequence[ProjectedWeight]
) -> None:
    fresh, left = {projected.path for projected in added}, {projected.path for projected in gone}
    for word, paths in (
        ("new targets, taken from here on", fresh - left),
        ("targets whose parameter was replaced, taken anew", fresh & left),
        ("targets that are no longer there", left - fresh),
    ):
        if paths:
            rank_zero_info(f"{key}: {word}: {', '.join(sorted(paths))}")


def _layer_of(projected: ProjectedWeight) -> str:
    return split_path(projected.target.path)[0]


def _why_idle(optimizer: Optimizer, *, moved: bool) -> str:
    """The reason why no hook of an optimizer was called."""
    name = type(optimizer).__name__
    others = [
        one
        for one in dir(type(optimizer))
        if "step" in one
        and not one.startswith("_")
        and not hasattr(Optimizer, one)
        and callable(getattr(type(optimizer), one))
    ]
    if not moved:
        return (
            f"{name} has made no step, and its weights have not changed: the training step never "
            "lets it update them. Nothing is compressed until it does"
        )
    by = f"by {', '.join(others)}" if others else "by something else than its step()"
    return (
        f"{name} updates weights {by}, never by step(): only step() has the hooks that masks and "
        "grids need, so that nothing is compressed. Make the update in step(), such as "
        "step(closure), or give the optimizer inside it to configure_optimizers"
    )


def _adopt_known_mask(projected: ProjectedWeight) -> None:
    """Go on with a mask that was restored, while the weight still has its zeros."""
    mask = known_mask(projected.target.layer, projected.target.name)
    if mask is None or projected.pruned is not None or mask.shape != projected.parameter.shape:
        return
    part = projected.partition.part(mask).to(projected.data.device)
    if not projected.data[~part].any():
        projected.set_mask(part)


def _state_now(trainer: Trainer, module: LightningModule) -> CompressionState:
    """Grids, activation grids, and the masks that no callback of this run has in its own state."""
    known = compression_state(module, masks=False)
    projector = Projector.find(module)
    masks = {
        projected.target.path: ~projected.whole(projected.pruned)
        for projected in (projector.projected_weights.values() if projector is not None else ())
        if projected.pruned is not None and "mask" not in projected.owners
    }
    activations = dict(known.activations)
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, WeightCallback):
            activations.update(one.activation_grids_now())
    return CompressionState(
        masks, known.grids, activations, dynamic=known.dynamic - set(activations)
    )


def _refuse_plain_averaging(trainer: Trainer) -> None:
    from lightning_compress.callbacks.projected_ema import ProjectedEMA

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        plain = averages_weights(callback)
        if plain and not isinstance(callback, ProjectedEMA):
            raise TargetError(
                f"{type(callback).__name__} averages weights away from their masks and grids: "
                "use lightning_compress.ProjectedEMA in its place"
            )
