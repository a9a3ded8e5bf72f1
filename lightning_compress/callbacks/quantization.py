"""QuantizationAwareTraining: when weights and activations go onto grids, and when those settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.base import WeightCallback, check_run_ends, run_progress
from lightning_compress.errors import TargetError
from lightning_compress.projection import Slot
from lightning_compress.pruning.events import Events
from lightning_compress.quantization.activations import ActivationQuantizer, activation_layers
from lightning_compress.quantization.entropy_grids import EntropyGrids, steer
from lightning_compress.quantization.makers import SCHEMES, GridMaker, make_maker
from lightning_compress.quantization.observers import OBSERVERS
from lightning_compress.quantization.quantizers import channel_axis, check_bits
from lightning_compress.quantization.rate import entropy_bits
from lightning_compress.targets import Coverage, Pattern, deployed_part

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(WeightCallback):
    """Train with weights and activations on the grids that they will be shipped on.

    Weights are projected once an optimizer step, gradients pass straight through (Jacob et al.
    2018, arXiv:1712.05877). Activations are rounded in the forward pass, at the input of each
    linear layer and convolution and at the output of the last ones; when training has ended the
    layers remember these grids (`fake_quantized` computes with them, an export writes them).
    Listed with a pruning callback in any order: masks go before grids, zeros stay 0.

    Args:
        weight_bits: 2 to 8; None leaves weights alone. Of "codebook" there are `2^bits` centres,
            of "entropy" it is the most that a symbol may need.
        activation_bits: 2 to 8; None leaves activations alone.
        scheme: "symmetric" or "affine": over the observed range. "learned_step": LSQ,
            arXiv:1902.08153. "codebook": k-means centres, which learn from `freeze` on,
            arXiv:1510.00149. "entropy": a step in units of the rms of the non-zero weights,
            nothing clipped, for the entropy coder. The last two: one grid a tensor.
        per_channel: one scale an output channel, else one a tensor.
        observer: "minmax", "moving_average", "percentile" or "mse"; of activations, and of
            weights where the scheme is "symmetric" or "affine".
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        freeze: in the same unit: ranges, steps, clip values and clusters stay as they are.
        frequency: steps between events (clustering, searched ranges, steering); None: about 100.
        include: path globs or layer classes; None: the weights of the part that ships.
        exclude: the same, taken away again.
        step: of "entropy", in units of the rms of the non-zero weights.
        dead_zone: of "entropy": half-width of what becomes 0, in steps, from 0.5 (rounding) to 1.
        rate: of "entropy": weight of the mean bits of a weight in the loss.
        target_bits: of "entropy": bits a weight, over all targets, that the step is steered to.
        target_bytes: the same in bytes of all targets together.
        pact: learn where activations that are never below 0 are clipped, arXiv:1805.06085.
        lr: relative change an update of what learns: steps, centres, clip values.
        freeze_batchnorm: let BatchNorm use its running statistics from `freeze` on.
        name: prefix of what is logged, and the key of the state; two callbacks need two names.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> QuantizationAwareTraining(weight_bits=4, scheme="learned_step").state_key
    'QuantizationAwareTraining[quantize]'
    """

    order = 1

    def __init__(
        self,
        *,
        weight_bits: int | None = 8,
        activation_bits: int | None = 8,
        scheme: str = "symmetric",
        per_channel: bool = True,
        observer: str = "minmax",
        begin: float = 0.0,
        freeze: float = 0.9,
        frequency: int | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        step: float = 0.5,
        dead_zone: float = 0.5,
        rate: float = 0.0,
        target_bits: float | None = None,
        target_bytes: float | None = None,
        pact: bool = False,
        lr: float = 1e-3,
        freeze_batchnorm: bool = False,
        name: str = "quantize",
    ) -> None:
        super().__init__(include=include, exclude=exclude, name=name)
        _check_choices(weight_bits, activation_bits, scheme, observer)
        _check_entropy(scheme, step, dead_zone, rate, target_bits, target_bytes)
        if not 0 < lr < 1:
            raise ValueError(f"lr={lr!r} must lie in (0, 1)")
        if pact and activation_bits is None:
            raise ValueError("pact=True learns how to clip activations: activation_bits is None")
        self.weight_bits, self.activation_bits, self.scheme = weight_bits, activation_bits, scheme
        self.per_channel, self.observer, self.pact, self.lr = per_channel, observer, pact, lr
        self.step, self.dead_zone, self.rate = step, dead_zone, rate
        self.target_bits, self.target_bytes = target_bits, target_bytes
        self.freeze_batchnorm = freeze_batchnorm
        self.events = Events(begin, freeze, frequency)
        self.makers: dict[str, GridMaker] = {}
        self.activations: ActivationQuantizer | None = None
        self.activation_coverage: list[Coverage] = []
        self.started = self.frozen = False
        self.predicted_bytes = 0.0  # of the targets' symbols, at the last event
        self._clocks: dict[str, int] = {}
        self._last_step = 0
        self._told: set[str] = set()
        self._norms: list[nn.Module] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets and hook their optimizers; what an earlier fit found goes on."""
        earlier = {slot.path: slot for slot in self.slots}
        super().on_fit_start(trainer, pl_module)
        if self.events.in_fractions:
            check_run_ends(trainer)
        self.events.reset()
        self._claim()
        self._told = set()
        self.frozen = False
        if self.weight_bits is None:
            why = "weights stay as they are: weight_bits is None"
            self.coverage = [
                replace(r, selected=False, reason=r.reason or why) for r in self.coverage
            ]
        else:
            self._make_makers(earlier)
        if self.activation_bits is not None:
            self._make_activations(pl_module)
        parts = [pl_module.get_submodule(part) for part in deployed_part(pl_module)]
        norms = [one for part in parts for one in part.modules()]
        kind = nn.modules.batchnorm._BatchNorm
        self._norms = [one for one in norms if isinstance(one, kind)]

    def _claim(self) -> None:
        sides = {"grid": self.weight_bits, "activations": self.activation_bits}
        for side in (side for side, bits in sides.items() if bits is not None):
            for slot in self.slots:
                owner = slot.owners.setdefault(side, self.state_key)
                if owner != self.state_key:
                    raise TargetError(
                        f"{slot.path} is quantized by {owner} and by {self.state_key}: include or "
                        "exclude it so that one of them has it"
                    )

    def _make_makers(self, earlier: dict[str, Slot]) -> None:
        total = sum(slot.target.numel for slot in self.slots)
        entropy = {
            "relative_step": self.step,
            "dead_zone": self.dead_zone,
            "rate": self.rate / total,
        }
        makers = {}
        for slot in self.slots:
            before = earlier.get(slot.path)
            if before is not None and before.parameter.shape == slot.parameter.shape:
                makers[slot.path] = self.makers[slot.path]
                makers[slot.path].thaw()
                if slot.latent is None:  # the weight itself counts where it was changed since
                    slot.latent, slot.grid = before.latent, before.grid
                continue
            axis = channel_axis(slot.target.layer) if self.per_channel else None
            makers[slot.path] = make_maker(
                self.scheme,
                bits=self.weight_bits or 8,
                axis=axis,
                observer=self.observer,
                lr=self.lr,
                entropy=entropy,
            )
        self.makers = makers

    def _make_activations(self, module: LightningModule) -> None:
        targets = [slot.target for slot in self.slots]
        layers, self.activation_coverage = activation_layers(module, targets)
        before = self.activations
        self.activations = ActivationQuantizer(
            layers,
            parts=deployed_part(module),
            bits=self.activation_bits or 8,
            observer=self.observer,
            clip_lr=self.lr if self.pact else None,
        )
        if before is not None and list(before.layers) == list(layers):
            self.activations.load_state_dict(before.state_dict())
            self.activations.thaw()
        for row in self.activation_coverage:
            if not row.selected:
                rank_zero_info(
                    f"{self.state_key}: activations of {row.path} stay float, {row.reason}"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint, and begin if the window does."""
        super().on_train_start(trainer, pl_module)
        if self.started:
            self._install()
        elif self.events.begin <= 0:
            self._start()
        self.projector.project()
        self._clocks = {slot.path: self.projector.clock([slot.path]) for slot in self.slots}
        self._last_step = self.projector.clock(self.paths())
        if self.started and not self.predicted_bytes:
            self._predict()

    def _start(self) -> None:
        for slot, maker in self._pairs():
            try:
                maker.start(_masked(slot))
            except ValueError as error:
                raise ValueError(f"{slot.path}: {error}") from error
        self.started = True
        self._install()
        self._steer()

    def _install(self) -> None:
        for slot, maker in self._pairs():
            if slot.gradient_rule is None:
                slot.set_quantizer(maker.grid)
                slot.gradient_rule = partial(_rule, slot, maker)
        if self.activations is not None:
            self.activations.detach()
            self.activations.attach()

    def _pairs(self) -> list[tuple[Slot, GridMaker]]:
        return [(slot, self.makers[slot.path]) for slot in self.slots if slot.path in self.makers]

    @torch.no_grad()
    def on_weight_step(self, trainer: Trainer) -> None:
        """Let grids follow a step of the weights; at an event do the costly part, and freeze."""
        clocks = {slot.path: self.projector.clock([slot.path]) for slot in self.slots}
        stepped = {path for path, clock in clocks.items() if clock != self._clocks[path]}
        self._clocks = clocks
        step = self.projector.clock(self.paths())
        if step == self._last_step:  # another optimizer's step, or the faster of two owners
            self._follow(stepped, event=False)
            if self.activations is not None and not stepped:
                self.activations.forget_gradients()
            return
        self._last_step = step
        raw = run_progress(trainer) if self.events.in_fractions else step
        self.events.tick(raw, step)
        if not self.started:
            if self.events.position >= self.events.begin:
                self._start()
                self._show()
            return
        ends = self.events.over and not self.frozen
        event = self.events.due(unfinished=False) or ends
        self._follow(stepped, event=event)
        if self.activations is not None and not self.frozen:
            self.activations.step(partial(_reduce, trainer) if trainer.world_size > 1 else None)
        if event and not self.frozen:
            self._steer()
        if ends:
            self._freeze()
        if event:
            self._show()

    def _follow(self, stepped: set[str], *, event: bool) -> None:
        for slot, maker in self._pairs() if self.started else ():
            if event or slot.path in stepped:
                moved = maker.step(_masked(slot), event=event)
                if moved is not None:
                    slot.set_values(moved)

    def _steer(self) -> None:
        makers = [(s, one) for s, one in self._pairs() if isinstance(one, EntropyGrids)]
        target = self._target()
        if makers and target is not None:
            values = [_masked(slot) for slot, _ in makers]
            found = steer([one for _, one in makers], values, target)
            self.step = makers[0][1].relative_step
            if abs(found / target - 1) > 0.05:
                self._tell("target", f"{found / 8:.0f} bytes is as near as a step comes to the "
                           f"target of {target / 8:.0f}")  # fmt: skip
        for slot, one in makers:
            if one.raised:
                self._tell(slot.path, f"the step of {slot.path} is raised above {one.relative_step:.3g} "
                           f"rms, so that its range fits {one.bits} bits")  # fmt: skip

    def _target(self) -> float | None:
        """Bits of all targets together."""
        if self.target_bytes is not None:
            return 8.0 * self.target_bytes
        total = sum(slot.target.numel for slot in self.slots)
        return None if self.target_bits is None else self.target_bits * total

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            rank_zero_warn(f"{self.state_key}: {message}")
            self._told.add(what)

    def _freeze(self) -> None:
        for slot, maker in self._pairs():
            maker.freeze(_masked(slot))
        if self.activations is not None:
            self.activations.freeze()
        self.frozen = True

    def _show(self) -> None:
        """Project all targets, of other optimizers too, and count what they cost."""
        for slot in self.slots:
            slot.project()
        self._predict()

    def _predict(self) -> None:
        bits = [
            entropy_bits(s.grid.quantize(s.parameter)) for s in self.slots if s.grid is not None
        ]
        self.predicted_bytes = sum(bits) / 8

    def on_train_batch_start(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Keep BatchNorm's statistics, once frozen: Lightning puts all layers in training mode."""
        if self.freeze_batchnorm and self.frozen:
            for norm in self._norms:
                norm.eval()

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the bytes of the entropy-coded symbols as of the last event, and the step."""
        if self.makers:
            pl_module.log(f"{self.name}/predicted_bytes", self.predicted_bytes)
        if self.scheme == "entropy" and self.weight_bits is not None:
            pl_module.log(f"{self.name}/step", self.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the grids of activations in the layers.

        Raises:
            ValueError: when no batch went through a layer.
        """
        for norm in self._norms if self.freeze_batchnorm else ():
            norm.train(pl_module.training)
        if not self.started:
            rank_zero_warn(
                f"{self.state_key}: the run ended before begin={self.events.begin!r}: nothing is "
                "quantized"
            )
        elif self.activations is not None:
            self.activations.freeze()
            self.activations.leave_grids()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks."""
        self._stop()
        super().on_fit_end(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave visible weights and no hooks, whatever happened inside a step."""
        self._stop()
        super().on_exception(trainer, pl_module, exception)

    def _stop(self) -> None:
        if self.activations is not None:
            self.activations.detach()

    def state_dict(self) -> dict[str, Any]:
        """Latent weights, and all that makes the grids."""
        latents = {slot.path: slot.latent for slot, _ in self._pairs() if slot.latent is not None}
        side = self.activations
        return {
            "latents": latents,
            "makers": {path: maker.state_dict() for path, maker in self.makers.items()},
            "activations": None if side is None else side.state_dict(),
            "steps": [] if self._projector is None else list(self._projector.steps),
            "events": self.events.state_dict(),
            "flags": (self.started, self.frozen),
            "entropy": (self.step, self.predicted_bytes),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put everything back.

        Raises:
            ValueError: when the checkpoint quantizes other weights or layers.
        """
        if set(state["makers"]) != set(self.makers):
            raise ValueError(
                f"the checkpoint quantizes {sorted(state['makers'])}, this run {sorted(self.makers)}"
            )
        for path, one in state["makers"].items():
            self.makers[path].load_state_dict(one)
        if self.activations is not None and state["activations"] is not None:
            self.activations.load_state_dict(state["activations"])
        self.projector.steps[:] = state["steps"]
        self.events.load_state_dict(state["events"])
        self.started, self.frozen = state["flags"]
        self.step, self.predicted_bytes = state["entropy"]
        if self.started:
            self._install()
        for slot, _ in self._pairs():
            if (latent := state["latents"].get(slot.path)) is not None:
                slot.set_values(latent)


def _masked(slot: Slot) -> Tensor:
    values = slot.values()
    return values if slot.pruned is None else values.masked_fill(slot.pruned, 0.0)


def _rule(slot: Slot, maker: GridMaker, gradient: Tensor) -> None:
    maker.gradient(gradient, _masked(slot))


def _reduce(trainer: Trainer, values: Tensor, how: str) -> Tensor:
    on_device = values.to(trainer.strategy.root_device)
    return trainer.strategy.reduce(on_device, reduce_op=how).cpu()


def _check_choices(
    weight_bits: int | None, activation_bits: int | None, scheme: str, observer: str
) -> None:
    if weight_bits is None and activation_bits is None:
        raise ValueError("weight_bits and activation_bits are both None: nothing is quantized")
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits is not None:
            check_bits(name, bits)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: valid are {list(SCHEMES)}")
    if observer not in OBSERVERS:
        raise ValueError(f"observer={observer!r}: valid are {list(OBSERVERS)}")


def _check_entropy(
    scheme: str,
    step: float,
    dead_zone: float,
    rate: float,
    target_bits: float | None,
    target_bytes: float | None,
) -> None:
    if not step > 0:
        raise ValueError(f"step={step!r} must be above 0, in units of the weights' rms")
    if not 0.5 <= dead_zone < 1:
        raise ValueError(f"dead_zone={dead_zone!r} must lie in [0.5, 1)")
    if not rate >= 0:
        raise ValueError(f"rate={rate!r} must be 0 or more")
    targets = {"target_bits": target_bits, "target_bytes": target_bytes}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) == 2:
        raise ValueError("target_bits and target_bytes: give one of them")
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")
    own = [name for name, value in targets.items() if value is not None]
    own += ["rate"] * (rate > 0) + ["dead_zone"] * (dead_zone > 0.5)
    if own and scheme != "entropy":
        raise ValueError(f"{', '.join(own)} belongs to scheme='entropy', not to {scheme!r}")
