"""GradualPruning: ramps up the sparsity of masks by a schedule while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import is_trial_run, run_progress
from lightning_compress.callbacks.mask_callback import MaskCallback
from lightning_compress.channels.graph import Kept
from lightning_compress.errors import check_choice
from lightning_compress.projection import (
    ProjectedWeight,
    Projector,
    naming_divergence,
    parameter_ids,
)
from lightning_compress.pruning.criteria import make_criterion
from lightning_compress.pruning.granularity import layout_of, make_granularity
from lightning_compress.pruning.mask_plan import MaskPlan, check_sharded
from lightning_compress.pruning.masks import SCOPES
from lightning_compress.pruning.regrowth import (
    DenseGradients,
    Regrowth,
    exchanged_fraction,
    make_regrowth,
    reset_momenta,
)
from lightning_compress.pruning.sparsity_groups import (
    SparsityGroup,
    assign_targets,
    check_floors,
    check_min_keep,
    floors_by_path,
    make_schedules,
    split_groups,
)
from lightning_compress.pruning.statistics import Criterion, StatisticsWindow, StatisticsWindows
from lightning_compress.schedules import Schedule
from lightning_compress.targets import Pattern, split_path

__all__ = [
    "GradualPruning",
    "Rewinder",
    "Rewinding",
]


@dataclass(frozen=True, kw_only=True)
class Rewinding:
    """Step to which weights are rewound when `GradualPruning` has raised the sparsity.

    The lottery ticket of Frankle & Carbin 2019, arXiv:1803.03635 (`to=0`), and the late rewinding
    of Frankle et al. 2020, arXiv:1912.05671. All parameters of the optimizers that own the targets
    are rewound, and the buffers of their layers, under the current masks. Learning-rate schedules
    are not: keep the rate constant, or let it repeat in each round.

    Args:
        to: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        reset_optimizer: forget momenta too.

    Raises:
        ValueError: for a position out of range.

    >>> Rewinding(to=100).reset_optimizer
    True
    """

    to: float = 0
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.to, (int, float)) and not isinstance(self.to, bool)
        if not number or self.to < 0 or (isinstance(self.to, float) and self.to > 1):
            raise ValueError(f"to={self.to!r}: steps (int) are >= 0, fractions lie in [0, 1]")

    @property
    def in_fractions(self) -> bool:
        """The unit of `to`."""
        return isinstance(self.to, float)


class Rewinder:
    """Rewinds weights to those of one step.

    Args:
        plan: where to, and what else is reset.
        module: the module in training.
        projected_weights: the targets: their optimizers' parameters are kept.
        optimizers: all optimizers.
        projector: knows the latent values of what is compressed.
    """

    def __init__(
        self,
        plan: Rewinding,
        module: nn.Module,
        projected_weights: Sequence[ProjectedWeight],
        optimizers: Sequence[Optimizer],
        projector: Projector,
    ) -> None:
        self.plan, self._projector = plan, projector
        wanted = {id(projected.parameter) for projected in projected_weights}
        self._optimizers = [one for one in optimizers if wanted & parameter_ids(one)]
        owned = set().union(*(parameter_ids(one) for one in self._optimizers))
        self._parameters = {
            name: one for name, one in module.named_parameters() if id(one) in owned
        }
        self._projected_weights = {
            id(projected.parameter): projected for projected in projector.projected_weights.values()
        }
        self._buffers = {
            f"{path}.{name}" if path else name: buffer
            for path, layer in module.named_modules()
            if any(id(one) in owned for one in layer.parameters(recurse=False))
            for name, buffer in layer.named_buffers(recurse=False)
        }
        self.saved: dict[str, Tensor] | None = None

    def watch(self, trainer: Trainer, step: int) -> None:
        """Save the weights when the run reaches the position to rewind to."""
        self.keep_once(run_progress(trainer) if self.plan.in_fractions else step)

    def keep_once(self, position: float) -> None:
        """Save the current weights once, if the position to rewind to is reached."""
        if self.saved is None and position >= self.plan.to:
            self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Save the current values."""
        self.saved = {name: self._values(one).clone() for name, one in self._parameters.items()}
        self.saved |= {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def rewind(self) -> None:
        """Restore the saved values, under the current masks.

        Raises:
            RuntimeError: when nothing was saved yet.
        """
        if self.saved is None:
            raise RuntimeError(
                f"pruning began before the weights of step to={self.plan.to!r} were kept: begin "
                "to prune later, or rewind to an earlier step"
            )
        for name, parameter in self._parameters.items():
            projected = self._projected_weights.get(id(parameter))
            values = self.saved[name].to(parameter.device)
            if projected is None:
                parameter.copy_(values)
            else:
                projected.set_values(values)
        for name, buffer in self._buffers.items():
            buffer.copy_(self.saved[name])
        if self.plan.reset_optimizer:
            for optimizer in self._optimizers:
                optimizer.state.clear()
        self._projector.project()
        rank_zero_info(f"weights are rewound to those of to={self.plan.to!r}")

    def _values(self, parameter: nn.Parameter) -> Tensor:
        projected = self._projected_weights.get(id(parameter))
        return parameter.detach() if projected is None else projected.values()

    def state_dict(self) -> dict[str, Any]:
        """The saved values."""
        return {"saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the saved values of a checkpoint."""
        self.saved = state["saved"]


class GradualPruning(MaskCallback):
    """Prune weights while the model trains, after Zhu & Gupta 2017, arXiv:1710.01878.

    Sparsity is the absolute fraction of zeros in the targets. Masks change right after a step of
    the optimizer that owns the targets; pruned weights are exactly zero from then on.

    Args:
        final_sparsity: fraction of zeros at `end`, in [0, 1); or one for each of several path
            globs or layer classes: they are the targets then, and the first that matches counts.
        schedule: a `Schedule` (with its own begin, end and final value), or any callable from the
            position in the unit of `begin` to a sparsity; None: `Polynomial`.
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit; masks do not change after it.
        frequency: steps between events; None: about 100 from begin to end, in
            short windows fewer: one every four steps, but ten at least.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        criterion: a name in `CRITERIA`, a callable from a weight to its scores, or a `Criterion`.
            Low scores go first. An event waits until its statistics window is complete.
        granularity: "unstructured", "n:m", ("block", (r, c)), "row", "column", "channel" or
            "filter": see `make_granularity`. Zeros are exact to a unit; n:m ends at 1 - n/m.
        scope: "global" compares all targets together, "layer" prunes each by the same fraction,
            "erk" by Erdos-Renyi-Kernel densities.
        regrow: None: what is pruned stays so. "straight_through": pruned weights keep training
            by dense gradients and may return at an event. "gradient": RigL, at each event some
            of the smallest weights make room for the largest gradients (arXiv:1911.11134); a
            `Regrowth` sets how many.
        min_keep: fraction of each target that stays, so that no layer dies by accident; or one
            for each of several patterns (0.01 elsewhere).
        keep_zeros: begin with the zeros that the weights have, those of a loaded file say, and go
            on from there; a tensor of nothing but zeros is taken as not pruned.
        rewind: a `Rewinding`, or its `to`: rewinds weights when the sparsity has risen.
        on_miss: "warn" or "raise" when training ends below the final sparsity.
        name: prefix of what is logged, and the key of the state; two callbacks need two names.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> GradualPruning(final_sparsity=0.8, end=1000).schedule(500)
    0.7000000000000001
    """

    def __init__(
        self,
        *,
        final_sparsity: float | Mapping[Pattern, float] = 0.9,
        schedule: Callable[[float], float] | None = None,
        begin: float = 0.0,
        end: float = 0.7,
        frequency: int | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        criterion: str | Callable[[Tensor], Tensor] | Criterion = "magnitude",
        granularity: str | Sequence[object] = "unstructured",
        scope: str = "global",
        regrow: str | Regrowth | None = None,
        min_keep: float | Mapping[Pattern, float] = 0.01,
        keep_zeros: bool = False,
        rewind: Rewinding | float | None = None,
        on_miss: str = "warn",
        name: str = "prune",
    ) -> None:
        check_choice("scope", scope, SCOPES)
        check_choice("on_miss", on_miss, ("warn", "raise"))
        units = make_granularity(granularity)
        self.regrowth = make_regrowth(regrow, scope, fixed=units.limit < 1)
        self.regrow = None if self.regrowth is None else self.regrowth.kind
        self.parts = make_schedules(final_sparsity, schedule, begin, end, units.limit)
        self.schedule = self.parts[0].curve
        if isinstance(self.schedule, Schedule):
            begin, end = self.schedule.begin, self.schedule.end
        if isinstance(final_sparsity, Mapping):
            if include is not None:
                raise ValueError("include: the patterns of final_sparsity say what is included")
            include = list(final_sparsity)
        super().__init__(
            begin=begin,
            end=end,
            frequency=frequency,
            include=include,
            exclude=exclude,
            dense_gradient=self.regrow == "straight_through",
            name=name,
        )
        check_min_keep(min_keep, self.parts)
        self.min_keep, self.on_miss, self.keep_zeros = min_keep, on_miss, keep_zeros
        self.scope = scope
        self.plan = MaskPlan(units, SCOPES[scope], reopen=self.dense_gradient)
        self.rewind = Rewinding(to=rewind) if isinstance(rewind, (int, float)) else rewind
        self._statistics = StatisticsWindows([StatisticsWindow(make_criterion(criterion))])
        if self.regrow == "gradient":
            self._statistics.append(StatisticsWindow(DenseGradients()))
        self._rewinder: Rewinder | None = None
        self._events = 0
        self._used: set[str] = set()  # targets that have had a gradient
        self.steered: float | dict[str, float] | None = None

    def steer(self, sparsity: float | Mapping[str, float]) -> None:
        """Set the sparsity to reach from the next step on, instead of the schedule.

        Sparsity still never falls, criteria still gather their statistics first, and guards may
        hold an event as long as they like.

        Args:
            sparsity: of all targets; of several patterns, of the one with the highest final
                sparsity, and densities of the others keep their powers. Or of each target, by
                path: then each is pruned by itself from now on.

        Raises:
            ValueError: for a sparsity outside [0, 1), an unknown path, or a granularity of n:m.
        """
        if self.plan.granularity.limit < 1:
            raise ValueError(f"{self.state_key}: a granularity of n:m ends at a fixed sparsity")
        if isinstance(sparsity, Mapping):
            if unknown := sorted(set(sparsity) - set(self.paths())):
                raise ValueError(f"{unknown} are no targets; there are {self.paths()}")
            self._split()
        for value in sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,):
            if not 0 <= value < 1:
                raise ValueError(f"sparsity={value!r} must lie in [0, 1)")
        self.steered = dict(sparsity) if isinstance(sparsity, Mapping) else float(sparsity)

    @property
    def steered_by(self) -> str:
        """Kind of lever by which a `QualityBudget` steers it."""
        return "sparsity"

    def snapshot(self) -> dict[str, Any]:
        """State that belongs to the current masks, for a save point."""
        return {"asked": {part.projected_weights[0].path: part.requested for part in self.parts}}

    def roll_back_to(self, snapshot: dict[str, Any]) -> None:
        """Restore the state of a snapshot."""
        for part in self.parts:
            part.requested = snapshot["asked"].get(part.projected_weights[0].path, 0.0)
        self.events.pending = False

    @property
    def arrived(self) -> bool:
        """Whether masks have the sparsity of this position."""
        return not any(self._wanted(part) > part.requested for part in self.parts)

    def _wanted(self, part: SparsityGroup, position: float | None = None) -> float:
        at = self.events.position if position is None else position
        return part.wanted(at, self.steered, self.parts)

    def _split(self) -> None:
        if not isinstance(self.steered, dict):
            self.parts = split_groups(self.parts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets of each group, and check bounds against the final sparsity."""
        super().on_fit_start(trainer, pl_module)
        self.plan.layouts = {
            one.path: layout_of(pl_module, one.target.path) for one in self.projected_weights
        }
        self.plan.check(self.projected_weights)
        assign_targets(pl_module, self.parts, self.exclude, self.projected_weights)
        self.plan.floors = floors_by_path(pl_module, self.min_keep, self.projected_weights)
        for part in self.parts:
            final = part.target(self.events.end)
            check_floors(
                part.projected_weights, self.plan.floors, final, each=self.scope == "layer"
            )
        for note in self.plan.notes(self.projected_weights):
            rank_zero_info(f"{self.state_key}: {note}")
        self._events, self.steered = 0, None
        self._used, self.uncalled = set(), {}
        if self.rewind is not None:
            self._rewinder = Rewinder(
                self.rewind, pl_module, self.projected_weights, trainer.optimizers, self.projector
            )

    def on_targets_changed(
        self, trainer: Trainer, module: LightningModule, added: Sequence[ProjectedWeight]
    ) -> None:
        """Assign new targets to groups; the next event prunes them to the sparsity so far."""
        before = {
            projected.path: part for part in self.parts for projected in part.projected_weights
        }
        self.plan.layouts = {
            one.path: layout_of(module, one.target.path) for one in self.projected_weights
        }
        self.plan.check(self.projected_weights)
        assign_targets(module, self.parts, self.exclude, self.projected_weights)
        shared = {path for part in self.parts for path in part.paths()}
        for (
            projected
        ) in self.projected_weights:  # what is frozen by now is no target, but keeps its mask
            if projected.path not in shared:
                before[projected.path].projected_weights.append(projected)
        self.plan.floors = floors_by_path(module, self.min_keep, self.projected_weights)
        self._statistics.reset()
        for part in self.parts:
            part.requested = min(part.requested, part.sparsity)
        super().on_targets_changed(trainer, module, added)

    def check_sharded(self) -> None:
        """Single weights by their values alone can be compared over processes.

        Raises:
            TargetError: for what needs whole rows or whole activations.
        """
        check_sharded(
            criterion=self._statistics[0].criterion,
            pooled=self.plan.granularity.pools or self.plan.granularity.limit < 1,
            regrow=self.regrow,
            rewind=self.rewind is not None,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint and keep the weights to rewind to, if they are these."""
        if self.keep_zeros and self._loaded is None:
            self._mask_zeros()
        super().on_train_start(trainer, pl_module)
        if self._rewinder is not None and self.events.last_step == 0:
            self._rewinder.keep_once(0)

    def _mask_zeros(self) -> None:
        """Make masks of the zeros that the weights have; the sparsity continues from theirs."""
        for projected in self.projected_weights:
            kept = projected.data != 0
            if (
                projected.pruned is None
                and 0 < int(projected.partition.all_reduce_sum(kept.sum())) < projected.target.numel
            ):
                projected.set_mask(kept)
        for part in self.parts:
            part.requested = max(part.requested, part.sparsity)
        self.project()

    def before_event(self, trainer: Trainer, step: int) -> None:
        """Save the weights to rewind to, when the run reaches them; see what is called at all."""
        self._look_for_uncalled()
        if self._rewinder is not None:
            self._rewinder.watch(trainer, step)

    def _look_for_uncalled(self) -> None:
        """Weights that never have a gradient would be pruned in place of others: leave them."""
        for layer in [one for one, own in self.uncalled.items() if own.grad is not None]:
            del self.uncalled[layer]  # the next look takes it as a new target
        if len(self._used) >= len(self.projected_weights):
            return
        self._used |= {
            projected.path
            for projected in self.projected_weights
            if projected.parameter.grad is not None or not projected.parameter.requires_grad
        }

    def _leave_uncalled(self) -> None:
        if self._events or len(self._used) >= len(self.projected_weights):
            return
        left: dict[str, nn.Parameter] = {}
        for part in self.parts:
            idle = [one for one in part.projected_weights if self._is_idle(one)]
            if len(idle) < len(part.projected_weights):
                left |= {split_path(one.target.path)[0]: one.parameter for one in idle}
        if left:
            self.leave_uncalled(left)

    def _is_idle(self, projected: ProjectedWeight) -> bool:
        return projected.path not in self._used and self.projector.clock([projected.path]) > 0

    def needed(self, position: float) -> bool:
        """Whether the sparsity rises or weights are exchanged at a position."""
        if self.regrow is not None and position < self.events.end:
            return True
        return any(self._wanted(part, position) > part.requested for part in self.parts)

    @property
    def is_steered(self) -> bool:
        """Whether a budget sets the target, instead of the schedule."""
        return self.steered is not None

    def due(self) -> bool:
        """Whether an event is due; steered by a budget, exchanges keep to the schedule."""
        if not self.is_steered:
            return super().due()
        events, exchange = self.events, self.regrow is not None and not self.events.over
        due = events.due(unfinished=False) and exchange
        events.pending = not self.arrived or due or (events.pending and exchange)
        return events.pending

    def ready(self, step: int) -> bool:
        """Whether the statistics of the criterion, and of regrowth, are complete."""
        self._leave_uncalled()
        late = self.events.over and self._events > 0
        grown = not self._exchanges() or all(one.ready(step) for one in self._statistics[1:])
        return grown and self._statistics[0].ready(step, late=late)

    def look_ahead(self, step: int) -> None:
        """Start the statistics window when the next event is near."""
        self._statistics.look_ahead(
            self.projected_weights,
            self.events,
            step,
            pending=self.events.pending,
            needed=self.needed,
        )

    def _exchanges(self) -> bool:
        masked = any(projected.pruned is not None for projected in self.projected_weights)
        return self.regrow == "gradient" and masked and not self.events.over

    @torch.no_grad()
    def event(self, trainer: Trainer) -> None:
        """Make new masks, exchange weights, rewind."""
        before, masks = self.sparsity, {}
        for part in self.parts:
            scores = self._statistics[0].scores(self.projected_weights, part.projected_weights)
            with naming_divergence(part.projected_weights):
                found = self.plan.masks(
                    part.projected_weights, scores, part.request(self._wanted(part))
                )
            masks.update(zip(part.paths(), found, strict=True))
        if self.regrowth is not None and self._exchanges():
            share = exchanged_fraction(self.regrowth.fraction, self.events.done)
            for projected in self.projected_weights:
                growth = self._statistics[1].criterion.scores(projected)
                mask = self.plan.exchanged(projected, masks[projected.path], growth, share)
                reset_momenta(trainer.optimizers, projected, mask)
                masks[projected.path] = mask
        self.set_masks(
            self.projected_weights,
            [masks[projected.path] for projected in self.projected_weights],
            trainer,
        )
        self._correct(trainer)
        self.project()
        if self._rewinder is not None and self.sparsity > before:
            self._rewinder.rewind()
        self._events += 1
        self._statistics.after_event(self.events.ahead())

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Any) -> None:  # noqa: ARG002
        """Update layouts for the smaller weights, and drop the statistics of the larger ones."""
        self.on_channels_restored(module)
        for part in self.parts if self.is_steered else ():
            # Zeros went with the channels: what is left is less sparse than was reached.
            part.requested = min(part.requested, part.sparsity)

    def on_channels_restored(self, module: nn.Module) -> None:
        """Update layouts and drop statistics after weights changed their sizes."""
        self.plan.layouts = {
            one.path: layout_of(module, one.target.path) for one in self.projected_weights
        }
        self.plan.floors = floors_by_path(module, self.min_keep, self.projected_weights)
        self._statistics.reset()
        self.sparsity = self._count()

    def _correct(self, trainer: Trainer) -> None:
        for projected in self.projected_weights:
            values = self._statistics[0].updated_values(projected)
            if values is not None:
                shared = trainer.world_size > 1
                projected.set_values(trainer.strategy.broadcast(values) if shared else values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check that the final sparsity was reached, unless a budget sets it.

        A `fast_dev_run` reaches nothing.
        """
        self.settle_copies()
        if self.steered is not None or is_trial_run(trainer):
            return
        wait = "; an event still waits for its statistics" if self.events.pending else ""
        why = self.why_no_steps()
        for miss in filter(None, (part.miss(self.events.end, late=why) for part in self.parts)):
            message = f"{self.state_key} {miss}{wait}"
            if self.on_miss == "raise":
                raise RuntimeError(message)
            rank_zero_warn(message)

    def stop(self) -> None:
        """Free all statistics."""
        self._statistics.stop()

    def state_dict(self) -> dict[str, Any]:
        """Masks, clock, position of the schedule, statistics and the weights to rewind to."""
        return {
            **super().state_dict(),
            "asked": [part.requested for part in self.parts],
            "steered": self.steered,
            "uncalled": sorted(self.uncalled),
            "count": self._events,
            "gathering": self._statistics.state_dict(),
            "rewinder": None if self._rewinder is None else self._rewinder.state_dict(),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore everything; a checkpoint of other targets or patterns is a ValueError."""
        layers = {split_path(one.target.path)[0]: one.parameter for one in self.projected_weights}
        uncalled = {one: layers[one] for one in state.get("uncalled", ()) if one in layers}
        self.leave_uncalled(uncalled)
        super().restore_state(state)
        steered = state.get("steered")
        if isinstance(steered, dict):
            self._split()
        self.steered = steered
        for part, asked in zip(self.parts, state["asked"], strict=True):
            part.requested = asked
        self._events = state["count"]
        step = self.projector.clock(self.paths())
        self._statistics.restore(self.projected_weights, step, state["gathering"])
        if self._rewinder is not None and state["rewinder"] is not None:
            self._rewinder.load_state_dict(state["rewinder"])
