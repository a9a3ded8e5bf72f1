"""ChannelPruning: when channels go. Which go is decided in `pruning/`, by scores and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.channel_carry import (
    Samples,
    claim_run,
    report_table,
    tapped_features,
    tell_others,
)
from lightning_compress.callbacks.masking import MaskCallback
from lightning_compress.projection import Slot
from lightning_compress.pruning.channel_budget import (
    Costs,
    Rounding,
    Scores,
    check_budget,
    cut_to,
    floor_of,
)
from lightning_compress.pruning.channel_files import CHANNELS
from lightning_compress.pruning.channel_plan import ChannelPlan, roots_of
from lightning_compress.pruning.channel_scores import (
    ABSOLUTE,
    even_out,
    norm_scales,
    sum_over_units,
)
from lightning_compress.pruning.channel_surgery import (
    match_channels,
    select_optimizer_state,
    shrink,
)
from lightning_compress.pruning.channels import Flags, Kept
from lightning_compress.pruning.criteria import CRITERIA, Criterion, make_criterion
from lightning_compress.pruning.events import Events
from lightning_compress.pruning.gathering import Gathering, Gatherings
from lightning_compress.pruning.parts import make_schedules
from lightning_compress.schedules import Schedule
from lightning_compress.state import RemovedChannels, note_removed, removed_channels
from lightning_compress.targets import Pattern

__all__ = ["ChannelPruning"]

_EVENTS = 20
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


class ChannelPruning(MaskCallback):
    """Remove channels while the model trains: it ends with physically smaller layers.

    At events the channels that are worth least are chosen, over all layers together; what reads
    them fades to 0 within a few steps; then they are removed from all layers, from the
    optimizer's state and from averages. Each time the smaller model is compared with the one
    whose channels are 0: they are the same function, or the run stops. Inputs and outputs of the
    part that ships keep their sizes: latent size, image channels, mu and logvar, logits.

    Args:
        final_sparsity: fraction of the channels that is gone at `end`, in [0, 1).
        budget: in its place, what is left of a cost: `{"macs": 0.25}`, `{"params": 0.25}` or
            `{"latency": 0.5}`, the last measured on this machine when training begins.
        round_to: channels that a layer keeps are a multiple of it: others are slow.
        min_keep: fraction of its channels that each layer keeps in any case.
        protect: path globs or layer classes that keep their channels, beside `exclude`.
        criterion: a name in `CRITERIA`; "batchnorm" for the scales of norms; or as in
            `GradualPruning`. "magnitude" is the L2 norm of all weights that make or read it.
        schedule: as in `GradualPruning`, of the fraction that is gone; None: `Polynomial`.
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        end: in the same unit.
        frequency: steps between events; None: about 20 from begin to end.
        fade: steps in which chosen channels fade before they are removed.
        push: what the scales of norms shrink by at each step until `end`; None: 1e-4 for
            "batchnorm", else 0.
        include: path globs or layer classes; None: the weights of the part that ships.
        exclude: the same, taken away again.
        channelwise: functions and layer classes that are not known here and treat each channel
            by itself.
        on_miss: "warn" or "raise" when training ends before enough is removed.
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
        criterion: str | Callable[[Tensor], Tensor] | Criterion = "magnitude",
        schedule: Callable[[float], float] | None = None,
        begin: float = 0.0,
        end: float = 0.7,
        frequency: int | None = None,
        fade: int = 10,
        push: float | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        channelwise: Sequence[Any] = (),
        on_miss: str = "warn",
        name: str = "channels",
    ) -> None:
        self.kind, self.left = check_budget(budget) if budget else ("channels", None)
        gone = final_sparsity if self.left is None else 1 - self.left
        self.part = make_schedules(gone, schedule, begin, end)[0]
        _check(round_to=round_to, fade=fade)
        if not 0 <= min_keep <= 1:
            raise ValueError(f"min_keep={min_keep!r} must lie in [0, 1]")
        if on_miss not in ("warn", "raise"):
            raise ValueError(f"on_miss={on_miss!r}: valid are ['warn', 'raise']")
        if isinstance(self.part.curve, Schedule):
            begin, end = self.part.curve.begin, self.part.curve.end
        spared = [[one] if isinstance(one, (str, type)) else [*one] for one in (exclude, protect)]
        super().__init__(
            begin=begin,
            end=end,
            frequency=frequency,
            include=include,
            exclude=[*spared[0], *spared[1]],
            dense_gradient=False,
            name=name,
        )
        self.events = Events(begin, end, frequency, count=_EVENTS)
        self.rounding = Rounding(round_to, min_keep)
        self.criterion, self.fade, self.on_miss = criterion, fade, on_miss
        self.push = (1e-4 if criterion == "batchnorm" else 0.0) if push is None else push
        self.channelwise = tuple(channelwise)
        by_norms = criterion == "batchnorm"
        if isinstance(criterion, str) and not by_norms and criterion not in CRITERIA:
            valid = sorted([*CRITERIA, "batchnorm"])
            raise ValueError(f"criterion={criterion!r}: valid are {valid}")
        self._gatherings = Gatherings(
            [Gathering(make_criterion("magnitude" if by_norms else criterion))]
        )
        self.plan: ChannelPlan | None = None
        self.kept: dict[str, list[int]] = {}  # of the units of each group at first: what stays
        self.dense: dict[str, int] = {}  # units of each group at first
        self.total = 0.0  # cost at first
        self.refused: dict[str, str] = {}
        self._leaving: Flags | None = None
        self._fading = 0  # steps since they were chosen
        self._samples: Samples | None = None
        self._resumed: tuple[list[int] | None, int] | None = None
        self._handle: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find mistakes, and let a checkpoint's smaller layers be loaded."""
        super().setup(trainer, pl_module, stage)
        if self._handle is None:
            self._handle = pl_module.register_load_state_dict_pre_hook(_match)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Stop listening to what is loaded."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, and sample inputs of the networks that hold them."""
        super().on_fit_start(trainer, pl_module)
        claim_run(self, trainer)
        roots = roots_of(pl_module, [slot.target for slot in self.slots])
        self._samples = Samples(pl_module, roots)
        self.plan, self._leaving, self._fading = None, None, 0

    def _claim(self) -> None:
        """Channels are no masks: another callback may mask what stays."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint, and find the channels.

        Raises:
            TargetError: when none may go.
            ValueError: for a budget that cannot be met.
        """
        super().on_train_start(trainer, pl_module)
        if self._samples is not None and self._samples.complete:
            self._make_plan(trainer, pl_module)

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._samples is not None
        self.plan = ChannelPlan(
            pl_module,
            self._samples.take(),
            targets=[*self.paths(), *self._embeddings()],
            channelwise=self.channelwise,
            tapped=tapped_features(trainer),
            refused=self.refused,
        )
        if not self.dense:
            self.dense = {one.name: len(one.units) for one in self.plan.graph.groups}
            if self.kind == "latency":
                self._measure_latency()
            self.total = Costs(self.plan.graph, self.kind).total()
        self._check_reachable()
        if self._resumed is not None and self._resumed[0] is not None:
            units, self._fading = self._resumed
            self._leaving = self.plan.graph.flags(np.array(units, dtype=np.int64))
        self._resumed = None
        for group in self.plan.graph.groups:
            if len(group.free) < len(group.units):
                why = ", ".join(group.reasons)
                rank_zero_info(f"{self.state_key}: channels of {group.name} stay: {why}")
        self.sparsity = self._count()

    def _embeddings(self) -> list[str]:
        """They are no matrix products, so that masks leave them alone; channels they have."""
        return [row.path for row in self.coverage if row.reason.startswith("Embedding is no")]

    def _measure_latency(self) -> None:
        """Turn a latency into MACs: the largest part of them that is fast enough."""
        assert self.plan is not None
        assert self.left is not None
        scores, low, high = self._scores(), 0.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            gone = self._cut(scores, "macs", middle * Costs(self.plan.graph, "macs").total())
            fast = self.plan.latency_ratio(gone) <= self.left
            low, high = (middle, high) if fast else (low, middle)
        if low == 0.0:
            raise ValueError(
                f"budget={{'latency': {self.left}}} cannot be met: with as few channels as "
                f"round_to={self.rounding.to} and min_keep={self.rounding.least} allow, the time "
                f"is {self.plan.latency_ratio(gone):.3f} of now"
            )
        rank_zero_info(f"{self.state_key}: {self.left} of the latency is {low:.3f} of the MACs")
        self.kind = "macs"
        self.part = make_schedules(1 - low, None, self.events.begin, self.events.end)[0]

    def _check_reachable(self) -> None:
        assert self.plan is not None
        least = floor_of(self.plan.graph, self.kind, rounding=self.rounding, dense=self.dense)
        wanted = 1 - self.part.target(self.events.end)
        if least > self.total * wanted * (1 + 1e-9):
            asked = f"final_sparsity={1 - wanted:.4g}"
            closest = f"{1 - least / self.total:.4f}"
            if self.left is not None:
                asked, closest = (
                    f"budget={{{self.kind!r}: {wanted:.4g}}}",
                    f"{least / self.total:.4f}",
                )
            raise ValueError(
                f"{asked} cannot be met with round_to={self.rounding.to} and "
                f"min_keep={self.rounding.least}: the closest is {closest}"
            )

    def needed(self, position: float) -> bool:
        """Whether more is to go at a position."""
        return self.plan is not None and self.part.target(position) > self.part.asked

    def ready(self, step: int) -> bool:
        """Whether the criterion knows enough, and no channels are fading."""
        late = self.events.over
        return self._leaving is None and self._gatherings[0].ready(step, late=late)

    def look_ahead(self, step: int) -> None:
        """Let statistics be gathered when the next event is near."""
        self._gatherings.look_ahead(
            self.slots, self.events, step, pending=self._pending, needed=self.needed
        )

    @torch.no_grad()
    def before_event(self, trainer: Trainer, step: int) -> None:  # noqa: ARG002
        """Let chosen channels fade, and scales of norms shrink."""
        if self._leaving is not None and self._fading < self.fade:
            self._fading += 1
            self._scale_readers((self.fade - self._fading) / (self.fade - self._fading + 1))
        if self.push and not self.events.over:
            for scale in self._norm_scales().values():
                scale.copy_(scale.sign() * (scale.abs() - self.push).clamp(min=0))

    def _norm_scales(self) -> dict[str, Tensor]:
        if self.plan is None:
            return {}
        found = {}
        for root in self.plan.inputs:
            for path, layer in self.plan.module.get_submodule(root).named_modules():
                if isinstance(layer, _NORMS) and layer.weight is not None:
                    name = ".".join(filter(None, (root, path, "weight")))
                    found[name] = layer.weight
        return found

    def _scale_readers(self, factor: float) -> None:
        assert self.plan is not None
        assert self._leaving is not None
        graph, tensors = self.plan.graph, dict(self.plan.module.named_parameters())
        for (path, dim), units in graph.axes.items():
            leaving = self._leaving[units]
            if graph.roles[path, dim] != "in" or ".original" in path or not leaving.any():
                continue
            shape = [1] * tensors[path].dim()
            shape[dim] = -1
            scale = torch.from_numpy(np.where(leaving, factor, 1.0)).reshape(shape)
            self._write(tensors[path], partial(torch.mul, scale.to(tensors[path])))

    def _write(self, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        """Change the values that are trained, and what shows of them."""
        slot = self._slot_of(parameter)
        if slot is None:
            parameter.copy_(change(parameter.detach()))
        else:
            slot.set_values(change(slot.values()))
            slot.project()

    def _slot_of(self, parameter: Tensor) -> Slot | None:
        slots = {id(slot.parameter): slot for slot in self.projector.slots.values()}
        return slots.get(id(parameter))

    @torch.no_grad()
    def event(self, trainer: Trainer) -> None:  # noqa: ARG002
        """Choose the channels that go next."""
        assert self.plan is not None
        wanted = 1 - self.part.ask(self.events.position)
        gone = self._cut(self._scores(), self.kind, wanted * self.total, overshoot=self.events.over)
        if gone.any():
            self._leaving, self._fading = gone, 0
        self._gatherings.after_event(self.events.ahead())

    def _cut(self, scores: Scores, kind: str, target: float, *, overshoot: bool = True) -> Flags:
        assert self.plan is not None
        graph = self.plan.graph
        costs = Costs(graph, kind)
        return cut_to(
            graph, scores, costs, target, rounding=self.rounding, dense=self.dense,
            overshoot=overshoot,
        )  # fmt: skip

    def _scores(self) -> Scores:
        assert self.plan is not None
        graph = self.plan.graph
        if self.criterion in ("magnitude", "batchnorm"):
            values = dict(self.plan.module.named_parameters())
            values |= {slot.target.path: slot.values() for slot in self.projector.slots.values()}
            squares = {path: one.detach().square() for path, one in values.items()}
            scores = sum_over_units(graph, squares)
            if self.criterion == "batchnorm":
                return norm_scales(graph, self._norm_scales(), scores)
            return even_out(graph, np.sqrt(scores))
        wanted = self._gatherings[0].scores(self.slots, self.slots)
        given = {slot.target.path: one for slot, one in zip(self.slots, wanted, strict=True)}
        scores = sum_over_units(graph, given, ("out",))
        return scores if self.criterion in ABSOLUTE else even_out(graph, scores)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove what has faded: no graph of this batch is alive any more."""
        if self.plan is None and self._samples is not None and self._samples.complete:
            self._make_plan(trainer, pl_module)
        if self._leaving is not None and self._fading >= self.fade:
            self.remove(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.plan is not None:
            left = Costs(self.plan.graph, self.kind).total() / self.total
            pl_module.log(f"{self.name}/{self.kind}_left", left)

    @torch.no_grad()
    def remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the chosen channels from everything that has them.

        Raises:
            RuntimeError: when the smaller model is not the masked one.
        """
        assert self.plan is not None
        assert self._leaving is not None
        gone, parameters = self._leaving, dict(pl_module.named_parameters())
        hidden = {slot.target.path: slot for slot in self.projector.slots.values()}
        values = {
            path: hidden[path].values() if path in hidden else one.detach()
            for path, one in parameters.items()
        }
        for path, zeroed in self.plan.masked_values(values, gone).items():
            self._write(parameters[path], lambda _, zeroed=zeroed: zeroed)
        expected = self.plan.outputs()
        kept, sized = self.plan.kept(gone)
        by_parameter = {parameters[path]: dims for path, dims in kept.items() if path in parameters}
        for note in select_optimizer_state(trainer.optimizers, by_parameter):
            rank_zero_warn(f"{self.state_key}: {note}")
        for parameter, dims in by_parameter.items():
            if (slot := self._slot_of(parameter)) is not None:
                slot.select(dims)
        lost = self._lost(gone, kept, sized)
        shrink(pl_module, kept, sized=sized)
        note_removed(pl_module, lost)
        tell_others(self, trainer, pl_module, kept, sized)
        self.plan.check(expected, gone)
        self.plan.after(gone)
        self._leaving, self._fading = None, 0
        self._gatherings.stop()
        self.sparsity = self._count()

    def _lost(self, gone: Flags, kept: Kept, sized: Mapping[str, int]) -> RemovedChannels:
        assert self.plan is not None
        module = self.plan.module
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        for group in self.plan.graph.groups:
            before = self.kept.get(group.name, list(range(len(group.units))))
            pairs = zip(before, gone[group.units].tolist(), strict=True)
            self.kept[group.name] = [one for one, goes in pairs if not goes]
        cut = {
            one.name: tuple(self.kept[one.name])
            for one in self.plan.graph.groups
            if len(self.kept[one.name]) < self.dense[one.name]
        }
        shapes = {path: tuple(tensors[path].shape) for path in kept}
        return RemovedChannels(shapes, dict(sized), cut)

    def project(self) -> None:
        """Nothing of this callback shows between events."""

    def _settle(self) -> None:
        """Masks are other callbacks' own."""

    def _count(self) -> float:
        """Fraction of the channels that is gone."""
        if self.plan is None:
            return 0.0
        groups = [one for one in self.plan.graph.groups if len(one.free)]
        dense = sum(self.dense.get(one.name, len(one.units)) for one in groups)
        return 1 - sum(len(one.units) for one in groups) / max(dense, 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what still fades, print what each layer got, and check that enough is gone."""
        if self._leaving is not None:
            self.remove(trainer, pl_module)
        waits = self.events.over and self.needed(self.events.position)
        if waits and self.ready(self.projector.clock(self.paths())):
            self.event(trainer)
            if self._leaving is not None:
                self.remove(trainer, pl_module)
        if self.plan is None:
            rank_zero_warn(f"{self.state_key}: no batch went through {self._samples}")
            return
        report_table(self)
        wanted = 1 - self.part.target(self.events.end)
        left = Costs(self.plan.graph, self.kind).total() / self.total
        if left > wanted * (1 + 1e-9):
            message = (
                f"{self.state_key} ended at {left:.4f} of the {self.kind} in place of "
                f"{wanted:.4f}: the run ended before end={self.events.end!r} and {self.fade} steps "
                "of fading were over"
            )
            if self.on_miss == "raise":
                raise RuntimeError(message)
            rank_zero_warn(message)

    def stop(self) -> None:
        """Free statistics and hooks."""
        self._gatherings.stop()
        if self._samples is not None:
            self._samples.stop()

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Say which entries stay, so that the full model can be cut before it is loaded."""
        if lost := removed_channels(pl_module):
            checkpoint[CHANNELS] = asdict(lost)

    def state_dict(self) -> dict[str, Any]:
        """Clock, what stays, what fades, what the first model cost, statistics."""
        leaving = None if self._leaving is None else np.flatnonzero(self._leaving).tolist()
        return {
            **super().state_dict(),
            "masks": {},
            "latents": {},
            "asked": self.part.asked,
            "cost": (self.kind, self.total, 1 - self.part.target(self.events.end)),
            "dense": dict(self.dense),
            "kept": dict(self.kept),
            "leaving": (leaving, self._fading),
            "refused": dict(self.refused),
            "gathering": self._gatherings.state_dict(),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put everything back, and find the channels of the smaller model."""
        super().restore_state(state)
        self.part.asked = state["asked"]
        kind, self.total, wanted = state["cost"]
        if kind != self.kind:  # a latency that was measured
            self.kind = kind
            self.part.curve = make_schedules(1 - wanted, None, self.events.begin, self.events.end)[
                0
            ].curve
        self.dense, self.refused = dict(state["dense"]), dict(state["refused"])
        self.kept = dict(state["kept"])
        self._resumed = state["leaving"]
        step = self.projector.clock(self.paths())
        self._gatherings.restore(self.slots, step, state["gathering"])


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a checkpoint is loaded: the sizes of its layers."""
    own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    match_channels(module, own)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        least = 1 if name == "round_to" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
