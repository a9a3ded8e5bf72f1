"""ChannelPruning: when channels go. Which go is decided in `pruning/`, by scores and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.channel_base import ChannelCallback
from lightning_compress.callbacks.channel_carry import (
    Samples,
    claim_run,
    report_table,
    tapped_features,
    tell_others,
)
from lightning_compress.errors import TargetError
from lightning_compress.pruning.channel_budget import Rounding
from lightning_compress.pruning.channel_goal import Goal
from lightning_compress.pruning.channel_plan import roots_of
from lightning_compress.pruning.channel_surgery import match_channels
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.events import Events
from lightning_compress.targets import Pattern

__all__ = ["ChannelPruning"]

_EVENTS = 20


class ChannelPruning(ChannelCallback):
    """Remove channels while the model trains: it ends with physically smaller layers.

    At events the channels that are worth least are chosen; what reads them fades to 0 within a few
    steps; then they are removed from all layers, from the optimizer's state and from averages.
    Each time the smaller model is compared with the one whose channels are 0: they are the same
    function, or the run stops. Inputs and outputs of the part that ships keep their sizes: latent
    size, image channels, mu and logvar, logits. Beside a `QualityBudget`, that one says how many
    go, and when; where it goes back, they come back.

    Args:
        final_sparsity: fraction of the channels that is gone at `end`, in [0, 1).
        budget: in its place, what is left of a cost: `{"macs": 0.25}`, `{"params": 0.25}` or
            `{"latency": 0.5}`, the last measured on this machine when training begins.
        round_to: channels that a layer keeps are a multiple of it: others are slow.
        min_keep: fraction of its channels that each layer keeps in any case.
        protect: path globs or layer classes that keep their channels, beside `exclude`.
        scope: "global" compares the channels of all layers, "layer" takes the same fraction of
            each, the worst of its own.
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
        fade: int = 10,
        push: float | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        channelwise: Sequence[Any] = (),
        on_miss: str = "warn",
        name: str = "channels",
    ) -> None:
        _check(round_to=round_to, fade=fade)
        if not 0 <= min_keep <= 1:
            raise ValueError(f"min_keep={min_keep!r} must lie in [0, 1]")
        if on_miss not in ("warn", "raise"):
            raise ValueError(f"on_miss={on_miss!r}: valid are ['warn', 'raise']")
        goal = Goal(
            final_sparsity,
            budget=budget,
            schedule=schedule,
            window=(begin, end),
            rounding=Rounding(round_to, min_keep),
        )
        begin, end = goal.window
        spared = [[one] if isinstance(one, (str, type)) else [*one] for one in (exclude, protect)]
        super().__init__(
            begin=begin,
            end=end,
            frequency=frequency,
            include=include,
            exclude=[*spared[0], *spared[1]],
            goal=goal,
            criterion=criterion,
            scope=scope,
            channelwise=channelwise,
            name=name,
        )
        self.events = Events(begin, end, frequency, count=_EVENTS)
        self.fade, self.on_miss = fade, on_miss
        self.push = (1e-4 if criterion == "batchnorm" else 0.0) if push is None else push
        self._samples: Samples | None = None
        self._given: dict[str, Any] | None = None  # sample inputs of a checkpoint
        self._began = 0  # steps of the optimizer when the fit began
        self._handle: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find mistakes, and let a checkpoint's smaller layers be loaded."""
        super().setup(trainer, pl_module, stage)
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        leaders = [one.state_key for one in others if getattr(one, "steers", False)]
        if leaders and self.kind == "latency":
            raise TargetError(
                f"{leaders[0]} cannot steer a latency, which is measured once: give "
                f"{self.state_key} budget={{'macs': {self.goal.fraction}}} in its place"
            )
        self._led = bool(leaders)
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
        targets = [slot.target for slot in self.slots]
        self._samples = Samples(pl_module, roots_of(pl_module, targets), targets)
        self.plan, self.cutter, self._leaving, self._fading = None, None, None, 0
        self.goal.steered = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint, and find the channels.

        Raises:
            TargetError: when none may go.
            ValueError: for a budget that cannot be met.
        """
        super().on_train_start(trainer, pl_module)
        if self._samples is not None and self._given:
            self._samples.give(pl_module, self._given)
            self._given = None
        self._tapped, self._began = tapped_features(trainer), self._last_step
        if self._samples is not None and self._samples.complete:
            self._make_plan(pl_module, self._samples.take())

    def ready(self, step: int) -> bool:
        """Whether the criterion knows enough, and no channels are fading."""
        late = self.events.over and not self.led
        return self._leaving is None and self._gatherings[0].ready(step, late=late)

    def look_ahead(self, step: int) -> None:
        """Let statistics be gathered when the next event is near."""
        self._gatherings.look_ahead(
            self.slots, self.events, step, pending=self._pending, needed=self.needed
        )

    def before_event(self, trainer: Trainer, step: int) -> None:  # noqa: ARG002
        """Let chosen channels fade, and scales of norms shrink."""
        if self.cutter is None:
            return
        if self._leaving is not None and self._fading < self.fade:
            self._fading += 1
            left = self.fade - self._fading
            self.cutter.fade(self._leaving, left / (left + 1))
        if self.push and not self.events.over:
            self.cutter.push(self.push)

    @torch.no_grad()
    def event(self, trainer: Trainer) -> None:  # noqa: ARG002
        """Choose the channels that go next."""
        assert self.cutter is not None
        target = self.goal.ask(self.events.position)
        over = self.events.over or self.led
        gone = self.cutter.choose(self._scores(), self.kind, target, overshoot=over)
        if gone.any():
            self._leaving, self._fading = gone, 0
        self._gatherings.after_event(self.events.ahead())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove what has faded: no graph of this batch is alive any more."""
        if self.plan is None:
            self._plan_from_calls(pl_module)
        if self._leaving is not None and self._fading >= self.fade:
            self.remove(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.cutter is not None:
            pl_module.log(f"{self.name}/{self.kind}_left", self.left)

    def _plan_from_calls(self, module: LightningModule) -> None:
        assert self._samples is not None
        if self._last_step > self._began and (missed := self._samples.settle()):
            rank_zero_warn(
                f"{self.state_key}: no batch called what holds {missed}: all of it stays"
            )
        if not self._samples.complete:
            return
        try:
            self._make_plan(module, self._samples.take())
        except TargetError as error:
            raise (self._samples.explain(error) if self._samples.watched else error) from None

    def remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the chosen channels from everything that has them.

        Raises:
            RuntimeError: when the smaller model is not the masked one.
        """
        assert self.cutter is not None
        assert self._leaving is not None
        tell = partial(tell_others, self, trainer, pl_module)
        for note in self.cutter.remove(self._leaving, trainer.optimizers, tell):
            rank_zero_warn(f"{self.state_key}: {note}")
        self._leaving, self._fading = None, 0
        self._gatherings.reset()  # what is known of larger weights is of no use
        self.sparsity = self._count()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what still fades, and check that enough is gone."""
        if self._leaving is not None:
            self.remove(trainer, pl_module)
        waits = self.events.over and not self.led and self.needed(self.events.position)
        if waits and self.ready(self.projector.clock(self.paths())):
            self.event(trainer)
            if self._leaving is not None:
                self.remove(trainer, pl_module)
        if self.cutter is None:
            self._miss(f"{self.state_key}: no batch went through {self._samples}")
            return
        wanted = self.goal.final
        if not self.led and self.left > wanted * (1 + 1e-9):
            self._miss(
                f"{self.state_key} ended at {self.left:.4f} of the {self.kind} in place of "
                f"{wanted:.4f}: the run ended before end={self.events.end!r} and {self.fade} steps "
                "of fading were over"
            )

    def _miss(self, message: str) -> None:
        if self.on_miss == "raise":
            raise RuntimeError(message)
        rank_zero_warn(message)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what each layer got, when nobody changes it any more."""
        if self.plan is not None:
            report_table(self)
        super().on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What `ChannelCallback` saves, and the inputs: without them a resumed run looks again."""
        inputs = None if self.plan is None else dict(self.plan.inputs)
        return {**super().state_dict(), "inputs": inputs}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put all back; the networks are looked at when the module is in its place."""
        super().restore_state(state)
        self._given = state.get("inputs")

    def stop(self) -> None:
        """Free statistics and hooks."""
        self._gatherings.stop()
        if self._samples is not None:
            self._samples.stop()


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a checkpoint is loaded: the sizes of its layers."""
    own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    match_channels(module, own)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        least = 1 if name == "round_to" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
