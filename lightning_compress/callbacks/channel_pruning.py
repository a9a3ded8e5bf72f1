"""ChannelPruning: removes channels at events while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.callbacks.base import WeightCallback, is_trial_run
from lightning_compress.callbacks.guarded_clock import GuardedClock
from lightning_compress.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.protocols import FollowsRemoval, Steers
from lightning_compress.channels.calls import SampleInputs, place_inputs
from lightning_compress.channels.graph import Flags, Kept
from lightning_compress.channels.plan import ChannelPlan, roots_of
from lightning_compress.channels.remover import ChannelBudget, ChannelRemover
from lightning_compress.channels.resize import CHANNELS, match_channels
from lightning_compress.channels.selection import ABSOLUTE, Compare, Rounding, Scores
from lightning_compress.errors import TargetError, check_choice
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.criteria import CRITERIA, make_criterion
from lightning_compress.pruning.statistics import Criterion, StatisticsWindow, StatisticsWindows
from lightning_compress.state import removed_channels
from lightning_compress.targets import Pattern

_ON_MISS, _CLOSEST = ("warn", "raise"), "closest"
_SCOPES = ("global", "layer")
_EVENTS = 20


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer, {least} or more")


@dataclass(frozen=True, kw_only=True)
class Fading:
    """How weights shrink before `ChannelPruning` removes channels: `ChannelPruning(fade=...)`.

    Args:
        steps: in which chosen channels fade before they are removed.
        push: what the scales of norms shrink by at each step until `end`; None: 1e-4 for
            criterion="batchnorm" (Network Slimming, Liu et al. 2017, arXiv:1708.06519), else 0.

    Raises:
        ValueError: for negative steps.

    >>> Fading(steps=5).push is None
    True
    """

    steps: int = 10
    push: float | None = None

    def __post_init__(self) -> None:
        _check_count("fade", self.steps, 0)


def claim_run(owner: Any, trainer: Trainer) -> None:
    """Check that everything in the Trainer can follow a removal of channels.

    Raises:
        TargetError: naming what cannot.
    """
    key = owner.state_key
    if trainer.world_size > 1:
        raise TargetError(
            f"{key} works in one process: DDP and FSDP keep the sizes of the first step. "
            "Prune with one process, and continue to train the smaller model with several"
        )
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, type(owner)) and one is not owner:
            raise TargetError(
                f"{key} and {one.state_key}: each would remove channels that the other counts; "
                "name all layers in include of one"
            )
        if getattr(one, "rewind", None) is not None:
            raise TargetError(
                f"{key} and {one.state_key}: weights cannot be rewound to a step before "
                "channels were removed; leave rewind out"
            )


def tapped_features(trainer: Trainer) -> dict[str, str]:
    """Modules whose outputs a distillation compares through adapters: they keep their sizes."""
    found = {}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, KnowledgeDistillation) and one.session is not None:
            for paired in one.session.paired_modules:
                for ours, _ in paired.pair.features:
                    path = ".".join(filter(None, (paired.pair.student, ours)))
                    found[path] = f"a feature that {one.state_key} compares"
    return found


def notify_channels_removed(
    owner: Any,
    trainer: Trainer,
    module: LightningModule,
    kept: Kept,
    sized: Mapping[str, int],
) -> None:
    """Notify all callbacks that depend on the sizes of the module."""
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, FollowsRemoval) and one is not owner:
            one.on_channels_removed(module, kept, sized)


@rank_zero_only
def report_table(owner: Any) -> None:
    """Print the requested reduction and the channels of each layer."""
    graph = owner.plan.graph
    wanted = f"{owner.channel_budget.final:.4g} of the {owner.kind} requested"
    said = f"{owner.left:.4g} of the {owner.kind} stay" if owner.is_steered else wanted
    table = Table(title=f"Channels: {said}")
    for heading in ("layers", "before", "now", "why not fewer"):
        justify = "right" if heading in ("before", "now") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for group in graph.groups:
        why = ", ".join(group.reasons) if len(group.free) < len(group.units) else ""
        counts = [graph.channels_of(one) for one in group.layers]
        before = [owner.channel_budget.channels.get(one, count)
                  for one, count in zip(group.layers, counts, strict=True)]  # fmt: skip
        names = short_names(group.layers)
        blank = "\n" * (names.count("\n") + 1 - len(counts))  # beside what they have in common
        sides = (blank + "\n".join(map(str, one)) for one in (before, counts))
        table.add_row(names, *sides, why)
    Console(soft_wrap=False).print(table)


def short_names(paths: Sequence[str]) -> str:
    """Paths one under the other, what they begin with in common once, none cut.

    >>> print(short_names(["net.up.0.conv1", "net.up.0.conv2"]))
    net.up.0.
      conv1
      conv2
    >>> short_names(["net.0"])
    'net.0'
    """
    words = [path.split(".") for path in paths]
    common = 0
    while all(len(one) > common + 1 and one[common] == words[0][common] for one in words):
        common += 1
    if len(paths) < 2 or not common:
        return "\n".join(paths)
    rest = [".".join(one[common:]) for one in words]
    return "\n  ".join([".".join(words[0][:common]) + ".", *rest])


class ChannelPruning(WeightCallback):
    """Remove channels while the model trains: it ends with physically smaller layers.

    At events the channels with the lowest scores are chosen; the weights that read them fade to 0
    within a few steps; then they are removed from all layers, from the optimizer's state and from
    averages. Each time the smaller model is compared with the masked one: both compute the same
    function, or the run stops. Inputs and outputs of the deployed part keep their sizes: latent
    size, image channels, mu and logvar, logits. A `QualityBudget` beside it sets how many are
    removed, and when; a roll back restores them.

    Args:
        final_sparsity: fraction of the channels that is removed at `end`, in [0, 1).
        budget: in its place, the remaining fraction of a cost: `{"macs": 0.25}`,
            `{"params": 0.25}` or `{"latency": 0.5}`, the last measured on this machine when
            training begins.
        round_to: channels that a layer keeps are a multiple of it: others are slow.
        min_keep: fraction of its channels that each layer keeps in any case.
        protect: path globs or layer classes that keep their channels, beside `exclude`.
        scope: "global" compares the channels of all layers, "layer" takes the same fraction of
            each, the worst of its own.
        criterion: a name in `CRITERIA`; "batchnorm" for the scales of norms; or as in
            `GradualPruning`. "magnitude" is the L2 norm of all weights that make or read it.
        schedule: as in `GradualPruning`, of the fraction that is removed; None: `Polynomial`.
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit.
        frequency: steps between events; None: about 20 from begin to end.
        fade: steps in which chosen channels fade before they are removed; or a `Fading`, which
            sets how scales of norms shrink too.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        channelwise: functions and layer classes that are not known here and treat each channel
            by itself.
        on_miss: "warn" or "raise" when training ends before enough is removed. With "closest"
            sizes that do not allow so much are no error: what they allow is removed, and logged.
        name: prefix of what is logged, and the key of the state.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> ChannelPruning(budget={"macs": 0.25}, round_to=4).kind
    'macs'
    """

    order = -1  # channels go before masks and grids

    def __init__(
        self,
        *,
        final_sparsity: float = 0.5,
        budget: Mapping[str, float] | None = None,
        round_to: int = 8,
        min_keep: float = 0.0,
        protect: Sequence[Pattern] | Pattern = (),
        scope: str = "global",
        criterion: str | Callable[[Tensor], Tensor] | Criterion = "magnitude",
        schedule: Callable[[float], float] | None = None,
        begin: float = 0.0,
        end: float = 0.7,
        frequency: int | None = None,
        fade: int | Fading = 10,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        channelwise: Sequence[Any] = (),
        on_miss: str = "warn",
        name: str = "channels",
    ) -> None:
        _check_count("round_to", round_to, 1)
        fading = fade if isinstance(fade, Fading) else Fading(steps=fade)
        if not 0 <= min_keep <= 1:
            raise ValueError(f"min_keep={min_keep!r} must lie in [0, 1]")
        check_choice("on_miss", on_miss, (*_ON_MISS, _CLOSEST))
        channel_budget = ChannelBudget(
            final_sparsity,
            budget=budget,
            schedule=schedule,
            window=(begin, end),
            rounding=Rounding(round_to, min_keep),
        )
        begin, end = channel_budget.window
        by_norms = criterion == "batchnorm"
        if isinstance(criterion, str) and not by_norms and criterion not in CRITERIA:
            valid = sorted([*CRITERIA, "batchnorm"])
            raise ValueError(f"criterion={criterion!r}: valid are {valid}")
        check_choice("scope", scope, _SCOPES)
        spared = [[one] if isinstance(one, (str, type)) else [*one] for one in (exclude, protect)]
        super().__init__(include=include, exclude=[*spared[0], *spared[1]], name=name)
        self.channel_budget, self.criterion, self.scope = channel_budget, criterion, scope
        self.channelwise = tuple(channelwise)
        self.events = GuardedClock(begin, end, frequency, count=_EVENTS)
        self.fade, self.on_miss = fading.steps, on_miss
        self.push = (1e-4 if by_norms else 0.0) if fading.push is None else fading.push
        self.sparsity = 0.0  # fraction of the channels that is removed
        self.plan: ChannelPlan | None = None
        self.remover: ChannelRemover | None = None
        self.kept: dict[str, list[int]] = {}  # of the units of each group at first: what stays
        self.refused: dict[str, str] = {}
        self._statistics = StatisticsWindows(
            [StatisticsWindow(make_criterion("magnitude" if by_norms else criterion))]
        )
        self._tapped: dict[str, str] = {}
        self._inputs: dict[str, Any] | None = None  # of the model that came back
        self._steered = False  # whether a budget will decide how far to go
        self.unable = ""  # why no channel may go, where on_miss lets that be
        self._leaving: Flags | None = None
        self._fading = 0  # steps since they were chosen
        self._resumed: tuple[list[int] | None, int] | None = None
        self._samples: SampleInputs | None = None
        self._given: dict[str, Any] | None = None  # sample inputs of a checkpoint
        self._began = 0  # steps of the optimizer when the fit began
        self._handle: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the setup, and let a checkpoint's smaller layers be loaded."""
        super().setup(trainer, pl_module, stage)
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        leaders = [one.state_key for one in others if isinstance(one, Steers) and one.steers]
        if leaders and self.kind == "latency":
            raise TargetError(
                f"{leaders[0]} cannot steer a latency, which is measured once: give "
                f"{self.state_key} budget={{'macs': {self.channel_budget.fraction}}} in its place"
            )
        self._steered = bool(leaders)
        if self._handle is None:
            self._handle = pl_module.register_load_state_dict_pre_hook(_match)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Remove the hook that resizes layers before a checkpoint is loaded."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, and sample inputs of the networks that hold them.

        Raises:
            TargetError: with sharded parameters, several processes or callbacks that cannot follow.
        """
        super().on_fit_start(trainer, pl_module)
        if any(projected.shards is not None for projected in self.projected_weights):
            raise TargetError(
                f"{type(self).__name__} cannot prune sharded parameters (FSDP2): use GradualPruning"
            )
        claim_run(self, trainer)
        self.events.start(trainer)
        weights = sum(projected.target.numel for projected in self.projected_weights)
        rank_zero_info(
            f"{self.state_key}: {len(self.projected_weights)} targets with {weights:,} weights, "
            f"{len(self.coverage) - len(self.projected_weights)} parameters skipped"
        )
        targets = [projected.target for projected in self.projected_weights]
        self._samples = SampleInputs(pl_module, roots_of(pl_module, targets), targets)
        self.plan, self.remover, self._leaving, self._fading = None, None, None, 0
        self.unable = ""
        self.channel_budget.steered = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint, and find the channels.

        Raises:
            TargetError: when none may go.
            ValueError: for a budget that cannot be met.
        """
        super().on_train_start(trainer, pl_module)
        self.events.last_step = self.projector.clock(self.paths())
        self.look_ahead(self.events.last_step)
        if self._samples is not None and self._given:
            self._samples.give(pl_module, self._given)
            self._given = None
        self._tapped, self._began = tapped_features(trainer), self.events.last_step
        if self._samples is not None and self._samples.complete:
            self._make_plan(pl_module, self._samples.take())

    def on_weight_step(self, trainer: Trainer) -> None:
        """Choose channels when an event is due."""
        self.events.advance(trainer, self.projector.clock(self.paths()), self)

    def due(self) -> bool:
        """Whether an event is due or pending."""
        needed = self.needed(self.events.position)
        return self.events.is_due(needed=needed, steered=self.is_steered)

    @property
    def _compare(self) -> Compare:
        if self.scope == "layer":
            return "fraction"
        return "loss" if self.criterion in ABSOLUTE else "group"

    def _make_plan(
        self, module: nn.Module, inputs: Mapping[str, Sequence[Any]], *, tell: bool = True
    ) -> None:
        try:
            self.plan = ChannelPlan(
                module,
                inputs,
                targets=[*self.paths(), *self._embeddings()],
                channelwise=self.channelwise,
                tapped=self._tapped,
                refused=self.refused,
            )
        except TargetError as error:
            if self.on_miss != _CLOSEST:
                raise
            self.unable = str(error)
            rank_zero_info(f"{self.state_key}: all channels stay: {error}")
            return
        channel_budget, first = self.channel_budget, self.channel_budget.begin(self.plan.graph)
        self.remover = ChannelRemover(
            self.plan,
            self.projector,
            rounding=channel_budget.rounding,
            dense=channel_budget.dense,
            kept=self.kept,
            compare=self._compare,
        )
        if first and (said := channel_budget.measure(self.remover, self._scores)):
            rank_zero_info(f"{self.state_key}: {said}")
        closest = self.on_miss == _CLOSEST
        if said := channel_budget.check(self.plan.graph, steered=self._steered, closest=closest):
            rank_zero_info(f"{self.state_key}: {said}")
        if self._resumed is not None and self._resumed[0] is not None:
            units, self._fading = self._resumed
            self._leaving = self.plan.graph.flags(np.array(units, dtype=np.int64))
        self._resumed = None
        for group in self.plan.graph.groups if tell else ():
            if len(group.free) < len(group.units):
                why = ", ".join(group.reasons)
                rank_zero_info(f"{self.state_key}: channels of {group.name} stay: {why}")
        self.sparsity = self._count()

    def _embeddings(self) -> list[str]:
        """Paths of embeddings: no mask prunes them, but they have channels."""
        return [row.path for row in self.coverage if row.reason.startswith("Embedding is no")]

    @property
    def kind(self) -> str:
        """What is counted: "channels", "params" or "macs"; "latency" until it is measured."""
        return self.channel_budget.kind

    @property
    def left(self) -> float:
        """Remaining fraction of that cost."""
        return self.channel_budget.left(self.remover)

    @property
    def least(self) -> float:
        """Smallest fraction of that cost that the rounding allows."""
        return self.channel_budget.least

    def steer(self, left: float) -> None:
        """Set the remaining fraction of the cost from now on, instead of the schedule.

        Whole blocks of channels are removed until no more than that is left.

        Args:
            left: in (0, 1]; of the channels, or of what `budget` counts.

        Raises:
            ValueError: for a part outside of that.
        """
        self.channel_budget.steer(left)

    @property
    def steered_by(self) -> str:
        """Kind of lever by which a `QualityBudget` steers it."""
        return "channels"

    def snapshot(self) -> dict[str, Any]:
        """State that belongs to the current channels, for a save point."""
        return {
            "asked": self.channel_budget.part.requested,
            "kept": {name: list(one) for name, one in self.kept.items()},
            "inputs": None if self.plan is None else dict(self.plan.inputs),
        }

    def roll_back_to(self, snapshot: dict[str, Any]) -> None:
        """Restore the state of a snapshot; no channels are fading then."""
        self.channel_budget.part.requested = snapshot["asked"]
        self.kept.clear()
        self.kept.update({name: list(one) for name, one in snapshot["kept"].items()})
        self._inputs = snapshot["inputs"]
        self._leaving, self._fading, self.events.pending = None, 0, False

    def on_channels_restored(self, module: nn.Module) -> None:
        """Rebuild the plan of a module whose channels were restored."""
        self._statistics.reset()
        assert self.plan is not None
        inputs = place_inputs(module, self._inputs or self.plan.inputs)
        self._make_plan(module, inputs, tell=False)

    @property
    def is_steered(self) -> bool:
        """Whether a budget sets the target, instead of the schedule."""
        return self.channel_budget.steered is not None

    @property
    def arrived(self) -> bool:
        """Whether all channels due at this position are removed."""
        return self._leaving is None and not self.needed(self.events.position)

    def needed(self, position: float) -> bool:
        """Whether more channels have to be removed at a position."""
        return self.plan is not None and self.channel_budget.needs(position)

    @property
    def schedule_over(self) -> bool:
        """Whether the schedule has ended and its channels are removed."""
        over = self.events.over and not self.needed(self.events.position)
        return self._leaving is None and (self.is_steered or over)

    def fit_results(self) -> dict[str, Any]:
        """The remaining channels too."""
        return {
            **super().fit_results(),
            "sparsity": self.sparsity,
            "kept": dict(self.kept),
            "refused": dict(self.refused),
        }

    def _scores(self) -> Scores:
        assert self.remover is not None
        if self.criterion in ("magnitude", "batchnorm"):
            return self.remover.own_scores(str(self.criterion))
        wanted = self._statistics[0].scores(self.projected_weights, self.projected_weights)
        given = {
            projected.target.path: one
            for projected, one in zip(self.projected_weights, wanted, strict=True)
        }
        return self.remover.given_scores(self.criterion, given)

    def _count(self) -> float:
        """Fraction of the channels that is removed."""
        return 0.0 if self.plan is None else self.channel_budget.gone_units(self.plan.graph)

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Save which channels remain, so that a full model can be resized before loading."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if lost := removed_channels(pl_module):
            checkpoint[CHANNELS] = asdict(lost)

    def on_targets_changed(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: LightningModule,  # noqa: ARG002
        added: Sequence[ProjectedWeight],
    ) -> None:
        """Warn of layers that were added after the channels were found: they keep their width."""
        self.sparsity = self._count()
        if added:
            rank_zero_warn(
                f"{self.state_key}: channels of {[each.path for each in added]} stay: the layers "
                "came after the channels were found, when training began"
            )

    def ready(self, step: int) -> bool:
        """Whether the criterion knows enough, and no channels are fading."""
        late = self.events.over and not self.is_steered
        return self._leaving is None and self._statistics[0].ready(step, late=late)

    def look_ahead(self, step: int) -> None:
        """Start the statistics window when the next event is near."""
        self._statistics.look_ahead(
            self.projected_weights,
            self.events,
            step,
            pending=self.events.pending,
            needed=self.needed,
        )

    def before_event(self, trainer: Trainer, step: int) -> None:  # noqa: ARG002
        """Let chosen channels fade, and scales of norms shrink."""
        if self.remover is None:
            return
        if self._leaving is not None and self._fading < self.fade:
            self._fading += 1
            left = self.fade - self._fading
            self.remover.fade(self._leaving, left / (left + 1))
        if self.push and not self.events.over:
            self.remover.push(self.push)

    @torch.no_grad()
    def on_event(self, trainer: Trainer) -> None:  # noqa: ARG002
        """Choose the channels to remove next."""
        assert self.remover is not None
        target = self.channel_budget.request(self.events.position)
        over = self.events.over or self.is_steered
        gone = self.remover.choose(self._scores(), self.kind, target, overshoot=over)
        if gone.any():
            self._leaving, self._fading = gone, 0
        self._statistics.after_event(self.events.ahead())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Remove faded channels: no autograd graph of this batch is alive any more."""
        if self.plan is None and not self.unable:
            self._plan_from_calls(pl_module)
        if self._leaving is not None and self._fading >= self.fade:
            self.remove(trainer, pl_module)
        pl_module.log(f"{self.name}/sparsity", self.sparsity)
        if self.remover is not None:
            pl_module.log(f"{self.name}/{self.kind}_left", self.left)

    def _plan_from_calls(self, module: LightningModule) -> None:
        assert self._samples is not None
        if self.events.last_step > self._began and (missed := self._samples.settle()):
            rank_zero_warn(
                f"{self.state_key}: no batch called the network of {missed}: its channels stay"
            )
        if not self._samples.complete:
            return
        try:
            self._make_plan(module, self._samples.take())
        except TargetError as error:
            raise (self._samples.explain(error) if self._samples.watched else error) from None

    def remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the chosen channels from the module, the optimizers and averages.

        Raises:
            RuntimeError: when the smaller model is not the masked one.
        """
        assert self.remover is not None
        assert self._leaving is not None
        others = partial(notify_channels_removed, self, trainer, pl_module)

        def tell(kept: Kept, sized: Mapping[str, int]) -> None:
            others(kept, sized)
            if self.projector.copies is not None:
                self.projector.copies.cut(kept, sized)

        for note in self.remover.remove(self._leaving, trainer.optimizers, tell):
            rank_zero_warn(f"{self.state_key}: {note}")
        self._leaving, self._fading = None, 0
        self._statistics.reset()  # what is known of larger weights is of no use
        self.sparsity = self._count()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove channels that still fade, and check the final cost."""
        if self._leaving is not None:
            self.remove(trainer, pl_module)
        waits = self.events.over and not self.is_steered and self.needed(self.events.position)
        if waits and self.ready(self.projector.clock(self.paths())):
            self.on_event(trainer)
            if self._leaving is not None:
                self.remove(trainer, pl_module)
        if self.unable:
            return
        if self.remover is None:
            self._miss(trainer, f"{self.state_key}: no batch went through {self._samples}")
            return
        wanted = self.channel_budget.final
        if not self.is_steered and self.left > wanted * (1 + 1e-9):
            why = (
                f"the run ended before end={self.events.end!r} and {self.fade} steps of fading "
                "were over"
            )
            self._miss(
                trainer,
                f"{self.state_key} ended at {self.left:.4f} of the {self.kind} in place of "
                f"{wanted:.4f}: {self.why_no_steps() or why}",
            )

    def _miss(self, trainer: Trainer, message: str) -> None:
        if is_trial_run(trainer):  # it reaches nothing
            return
        if self.on_miss == "raise":
            raise RuntimeError(message)
        rank_zero_warn(message)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the channels of each layer, which are final now."""
        if self.plan is not None:
            report_table(self)
        super().on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Clock, kept and fading channels, cost of the dense model, statistics, sample inputs."""
        leaving = None if self._leaving is None else np.flatnonzero(self._leaving).tolist()
        return {
            "steps": [] if self._projector is None else list(self._projector.steps),
            "events": self.events.state_dict(),
            "waits": self.events.wait_state,
            **self.channel_budget.state_dict(),
            "kept": dict(self.kept),
            "leaving": (leaving, self._fading),
            "refused": dict(self.refused),
            "gathering": self._statistics.state_dict(),
            "inputs": None if self.plan is None else dict(self.plan.inputs),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore everything; the channels are found when training starts."""
        self.projector.steps[:] = state["steps"]
        self.events.load_state_dict(state["events"])
        self.events.wait_state = state["waits"]
        self.channel_budget.load_state_dict(state)
        self.refused = dict(state["refused"])
        self.kept = dict(state["kept"])
        self._resumed = state["leaving"]
        self._given = state.get("inputs")  # without them a resumed run looks at batches again
        step = self.projector.clock(self.paths())
        self._statistics.restore(self.projected_weights, step, state["gathering"])
        self.sparsity = self._count()

    def stop(self) -> None:
        """Free statistics and hooks."""
        self._statistics.stop()
        if self._samples is not None:
            self._samples.stop()


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resize layers to those of a checkpoint, before it is loaded."""
    own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    if grown := _grown(module, own):
        rank_zero_warn(
            f"the checkpoint that is loaded is of a larger model: {grown}. It is from before "
            "channels were removed, and the model grows back to it: a 'best' checkpoint, say, was "
            "scored while it was hardly pruned. CompressedCheckpoint in the place of "
            "ModelCheckpoint keeps the best of the finished sizes"
        )
    match_channels(module, own)


def _grown(module: nn.Module, state: Mapping[str, Any]) -> str:
    """The first tensor that is larger in a state than in a module that has lost channels."""
    if not removed_channels(module):
        return ""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in own.items():
        shape = tuple(getattr(state.get(name), "shape", ()))
        if len(shape) == tensor.dim() and any(
            a > b for a, b in zip(shape, tensor.shape, strict=True)
        ):
            return f"{name} has {shape} in place of {tuple(tensor.shape)}"
    return ""
