"""QuantizationAwareTraining: when weights and activations go onto grids, and when those settle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.base import (
    WeightCallback,
    builds_layers_later,
    check_run_ends,
    is_trial_run,
    run_progress,
    warn_of_low_coverage,
    warn_of_unselected,
)
from lightning_compress.callbacks.deferral import deferred
from lightning_compress.channels.graph import Kept
from lightning_compress.deployment import deployed_part
from lightning_compress.errors import check_choice
from lightning_compress.grids import channel_axis, check_bits
from lightning_compress.lcz.lost_grids import lost_grids
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.sparsity_groups import by_pattern
from lightning_compress.quantization.activation_ranges import ActivationQuantizer
from lightning_compress.quantization.entropy import EntropyGrid
from lightning_compress.quantization.fake_quantize import (
    activation_layers,
    batch_norms,
    fake_quantized,
)
from lightning_compress.quantization.post_training import POST_TRAINING_SCHEMES, quantize_weights
from lightning_compress.quantization.rate_distortion import Settling
from lightning_compress.quantization.upsampled_conv import EnlargedReaders
from lightning_compress.quantization.weight_quantizers import (
    TensorQuantizer,
    begin_from,
    make_quantizer,
)
from lightning_compress.quantization.weights import (
    WeightQuantizer,
    check_scheme_settings,
    check_sides,
)
from lightning_compress.schedules import EventClock
from lightning_compress.sharding import is_sharded
from lightning_compress.state import (
    ActivationGrids,
    activation_grids,
    compression_state,
    known_grid,
)
from lightning_compress.structure import StructureReader
from lightning_compress.targets import CoverageTable, Pattern, clean_path, select
from lightning_compress.terminal import ShownArguments

__all__ = [
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
]


class PostTrainingQuantization(ShownArguments, Callback):
    """Quantize the weights at the end of `fit`, over the min/max range of each channel.

    Args:
        weight_bits: 2 to 8.
        scheme: "symmetric", "affine", "codebook" or "entropy"; see `quantize_weights`.
        per_channel: one scale an output channel, else one a tensor.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.

    Raises:
        ValueError: for bits or a scheme out of range; the message names the valid ones.

    >>> PostTrainingQuantization(weight_bits=4).weight_bits
    4
    """

    waiting: StructureReader | None = None  # while nobody knows what of the module ships

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        scheme: str = "symmetric",
        per_channel: bool = True,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
    ) -> None:
        check_bits("weight_bits", weight_bits)
        check_choice("scheme", scheme, POST_TRAINING_SCHEMES)
        self.weight_bits, self.scheme, self.per_channel = weight_bits, scheme, per_channel
        self.include, self.exclude = include, exclude
        self.coverage = CoverageTable()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Find mistakes in the patterns before anything is trained."""
        if stage == "fit" and not builds_layers_later(pl_module):
            self.coverage = select(pl_module, self.include, self.exclude, frozen=True).coverage

    @deferred
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, which `configure_model` may have made since."""
        self.coverage = select(pl_module, self.include, self.exclude, frozen=True).coverage
        if self.include is None:
            warn_of_unselected(pl_module, trainer.optimizers)
            warn_of_low_coverage(pl_module, self.coverage)

    @deferred
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Nothing, but while the structure is read."""

    @deferred
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing, but while the structure is read."""

    @deferred
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""

    @property
    def state_key(self) -> str:
        """Its name: it has no state."""
        return type(self).__name__

    def on_exception(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Leave no hooks."""
        if self.waiting is not None:
            self.waiting.stop()

    @deferred
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Quantize: after averaging and the last pruning, which end with training."""
        self.coverage = quantize_weights(
            pl_module,
            self.weight_bits,
            scheme=self.scheme,
            per_channel=self.per_channel,
            include=self.include,
            exclude=self.exclude,
        ).coverage


_WARM_UP = 0.3  # of the window, over which lambda grows
_EVALUATED: set[int] = set()  # modules that compute on their grids at the moment


class QuantizationAwareTraining(WeightCallback):
    """Train with weights and activations on the grids that they will be shipped on.

    Weights are projected once an optimizer step, gradients pass straight through (Jacob et al.
    2018, arXiv:1712.05877). Activations are rounded in the forward pass, at the input of each
    linear layer and convolution, and at the output of the last ones and of those that an addition,
    a norm (but BatchNorm, which is folded) or another activation than ReLU follows, so that an
    int8 file multiplies there in integers; when training has ended the layers remember these
    grids (`fake_quantized` computes with them, an export writes them).
    Symmetric grids of convolutions behind nearest-neighbour upsampling have steps on which sums of
    weights fit int8, for an export that multiplies before the image is enlarged.
    Listed with a pruning callback in any order: masks go before grids, zeros stay 0.

    Args:
        weight_bits: 2 to 8; None leaves weights alone. Of "codebook" there are `2^bits` centres,
            of "entropy" it is the most that a symbol may need. Or bits for each of several path
            globs or layer classes: they are the targets then, and the first that matches counts.
        activation_bits: 2 to 8; None leaves activations alone.
        scheme: "symmetric" or "affine": over the observed range. "learned_step": LSQ,
            arXiv:1902.08153. "codebook": k-means centres, which learn from `freeze` on,
            arXiv:1510.00149. "entropy": a step in units of the rms of the non-zero weights,
            nothing clipped, for the entropy coder. These two: one grid a tensor.
            "rate_distortion": a step that trains under `loss + lmbda * (mean bits of a weight)`,
            arXiv:1906.06624 and arXiv:1907.11900; rounding makes the zeros.
        per_channel: one scale an output channel, else one a tensor; None: one a tensor for
            "rate_distortion", where a channel's scale costs more bytes than it saves, else True.
        observer: "minmax", "moving_average", "percentile" or "mse"; of activations, and of
            weights where the scheme is "symmetric" or "affine".
        begin: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        freeze: in the same unit: ranges, steps, clip values and clusters stay as they are.
        frequency: steps between events (clustering, searched ranges, steering); None: about 100.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        lmbda: of "rate_distortion": weight of the mean bits of a targeted weight, as if it were a
            term of the loss. It grows from 0 over the first 3/10 of the way from begin to freeze.
        entropy: settings of "entropy"; None: `EntropyGrid()`.
        pact: learn where activations that are never below 0 are clipped, arXiv:1805.06085.
        lr: relative change an update of what learns: steps, centres, clip values; None: 1e-3, of
            "rate_distortion" 5e-3.
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
        weight_bits: int | Mapping[Pattern, int] | None = 8,
        activation_bits: int | None = 8,
        scheme: str = "symmetric",
        per_channel: bool | None = None,
        observer: str = "minmax",
        begin: float = 0.0,
        freeze: float = 0.9,
        frequency: int | None = None,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        lmbda: float | None = None,
        entropy: EntropyGrid | None = None,
        pact: bool = False,
        lr: float | None = None,
        freeze_batchnorm: bool = False,
        name: str = "quantize",
    ) -> None:
        if isinstance(weight_bits, Mapping):
            if include is not None:
                raise ValueError("include: the patterns of weight_bits say what is included")
            include = list(weight_bits)
        super().__init__(include=include, exclude=exclude, name=name)
        check_sides(weight_bits, activation_bits, scheme, observer)
        check_scheme_settings(scheme, entropy, lmbda)
        trained = scheme == "rate_distortion"
        if lr is None:
            lr = 5e-3 if trained else 1e-3
        if not 0 < lr < 1:
            raise ValueError(f"lr={lr!r} must lie in (0, 1)")
        if pact and activation_bits is None:
            raise ValueError("pact=True learns how to clip activations: activation_bits is None")
        self.weight_bits, self.activation_bits, self.scheme = weight_bits, activation_bits, scheme
        self.per_channel = not trained if per_channel is None else per_channel
        self.observer, self.pact, self.lr = observer, pact, lr
        self.entropy, self.lmbda = entropy or EntropyGrid(), lmbda
        self.requested_lmbda = lmbda
        self._settling = Settling(lr)
        self.freeze_batchnorm = freeze_batchnorm
        self.events = EventClock(begin, freeze, frequency)
        self.weights: WeightQuantizer | None = None
        self.activations: ActivationQuantizer | None = None
        self.activation_coverage = CoverageTable()
        self.started = self.frozen = self._left = False
        self.bits: dict[str, int] = {}  # of each target, by path
        self.requested_bits: dict[str, int] = {}
        self._clocks: dict[str, int] = {}
        self._last_step = 0
        self._warned: set[str] = set()
        self._norms: list[nn.Module] = []
        self._enlarged: EnlargedReaders | None = None
        self._evaluation: ExitStack | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets and hook their optimizers; what an earlier fit found goes on."""
        super().on_fit_start(trainer, pl_module)
        if self.events.in_fractions:
            check_run_ends(trainer)
        self.events.reset()
        self._settling.restart()
        self._warned, self.frozen, self._left = set(), False, False
        if self.weight_bits is not None:
            self.claim("grid", "quantized")
            self.requested_bits = self._find_bits(pl_module)
            # What a budget came to in an earlier fit goes on.
            self.bits = {path: self.bits.get(path, n) for path, n in self.requested_bits.items()}
            earlier = self.weights
            self.weights = WeightQuantizer(self.projected_weights, self._make_quantizer, earlier)
            if earlier is None:
                self._begin_from_known(self.weights)
        else:
            why = "weights stay as they are: weight_bits is None"
            self.coverage = CoverageTable(
                replace(row, selected=False, reason=row.reason or why) for row in self.coverage
            )
        if self.activation_bits is not None:
            self.claim("activations", "quantized")
            self._find_activations(pl_module)
            self._look_for_enlarged()
        self._find_norms(pl_module)

    @torch.no_grad()
    def _begin_from_known(self, weights: WeightQuantizer) -> None:
        """Go on with grids that the module carries, while its weights still lie on them."""
        for projected, quantizer in weights.pairs:
            grid = known_grid(projected.target.layer, projected.target.name)
            if grid is None or projected.shards is not None:
                continue
            if torch.equal(grid.project(projected.data), projected.data):
                begin_from(quantizer, grid)

    def _find_norms(self, module: LightningModule) -> None:
        parts = [module.get_submodule(part) for part in deployed_part(module)]
        kind = nn.modules.batchnorm._BatchNorm
        self._norms = [one for part in parts for one in part.modules() if isinstance(one, kind)]

    def on_targets_changed(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: LightningModule,
        added: Sequence[ProjectedWeight],
    ) -> None:
        """Let new weights and activations onto grids, which follow them until the run ends."""
        if self.weights is not None:
            self.claim("grid", "quantized")
            self.requested_bits = {**self.requested_bits, **self._find_bits(module)}
            fresh = {projected.path for projected in added}
            self.bits = {
                projected.path: self.requested_bits[projected.path]
                if projected.path in fresh
                else self.bits[projected.path]
                for projected in self.projected_weights
            }
            self.weights.change(self.projected_weights, self._make_quantizer, started=self.started)
            self._look_for_enlarged()
        if self.activations is not None:
            self.claim("activations", "quantized")
            targets = [projected.target for projected in self.projected_weights]
            layers, self.activation_coverage = activation_layers(module, targets)
            self.activations.change(layers, batch_norms(module))
        self._find_norms(module)
        self._clocks = {
            projected.path: self.projector.clock([projected.path])
            for projected in self.projected_weights
        }
        if self.weights is not None and self.started:
            self.weights.show()

    def _find_bits(self, module: LightningModule) -> dict[str, int]:
        given = self.weight_bits
        if not isinstance(given, Mapping):
            return {projected.path: given or 8 for projected in self.projected_weights}
        groups = by_pattern(module, list(given), self.exclude, self.projected_weights)
        pairs = zip(given.values(), groups, strict=True)
        return {projected.path: bits for bits, group in pairs for projected in group}

    def steer(
        self,
        *,
        step: float | None = None,
        bits: int | Mapping[str, int] | None = None,
        lmbda: float | None = None,
    ) -> None:
        """Change grids in a fit, between two steps; weights go onto the new ones at once.

        Args:
            step: of "entropy", in units of the rms of the non-zero weights.
            bits: of the other schemes: of all weights, or of some by path.
            lmbda: of "rate_distortion".

        Raises:
            ValueError: for a step that is steered to a target already, what belongs to another
                scheme, or bits out of range.
        """
        if self.weights is None:
            raise ValueError(f"{self.state_key} quantizes no weights: weight_bits is None")
        if step is not None:
            if self.entropy.is_steered:
                raise ValueError(f"{self.state_key}: its step is steered by a target already")
            self.entropy = replace(self.entropy, step=step)
            self.weights.set_step(step)
        if lmbda is not None:
            check_scheme_settings(self.scheme, None, lmbda)
            self._move_lmbda(lmbda)
        several = bits if isinstance(bits, Mapping) else dict.fromkeys(self.bits, bits)
        for path, one in several.items():
            if one is not None and one != self.bits[path]:
                self._set_bits(path, one)
        if self.started:
            self.weights.show()

    @property
    def steered_by(self) -> str | None:
        """What a `QualityBudget` moves: the step, lambda or the bits; None without weights."""
        if self.weights is None:
            return None
        return {"entropy": "step", "rate_distortion": "lmbda"}.get(self.scheme, "bits")

    @property
    def rate_settled(self) -> bool:
        """Whether the bytes have followed lambda, so that a budget may judge it."""
        grown = self.events.done >= _WARM_UP and self._settling.settled
        return self.frozen or grown

    def _move_lmbda(self, lmbda: float | None) -> None:
        self.lmbda = lmbda
        self._settling.restart()
        self._set_rate()

    def _set_rate(self) -> None:
        """Weigh bits by lambda, as far as it has grown."""
        if self.weights is None or self.lmbda is None:
            return
        total = sum(one.target.numel for one in self.projected_weights)
        self.weights.set_rate(min(self.events.done / _WARM_UP, 1.0) * self.lmbda / total)

    def snapshot(self) -> dict[str, Any]:
        """What makes the grids of now, without the clock."""
        weights, activations = self.weights, self.activations
        return deepcopy(
            {
                "bits": self.bits,
                "lmbda": self.lmbda,
                "makers": {}
                if weights is None
                else {path: one.state_dict() for path, one in weights.quantizers.items()},
                "activations": None if activations is None else activations.state_dict(),
            }
        )

    def roll_back_to(self, snapshot: dict[str, Any]) -> None:
        """Make the grids of a snapshot; weights are not touched."""
        snapshot = deepcopy(snapshot)
        for path, bits in snapshot["bits"].items():
            if bits != self.bits[path]:
                self._set_bits(path, bits)
        for path, quantizer in self.weights.quantizers.items() if self.weights is not None else ():
            quantizer.load_state_dict(snapshot["makers"][path])
        self._move_lmbda(snapshot["lmbda"])
        if self.activations is not None and snapshot["activations"] is not None:
            self.activations.load_state_dict(snapshot["activations"])
            if self._left:
                self.activations.leave_grids()

    def _set_bits(self, path: str, bits: int) -> None:
        check_bits("bits", bits)
        (projected,) = (projected for projected in self.projected_weights if projected.path == path)
        self.bits[path] = bits
        if self.weights is not None:
            self.weights.replace(path, self._make_quantizer(projected), started=self.started)
            if self.frozen:
                self.weights.freeze_one(path)

    def _make_quantizer(self, projected: ProjectedWeight) -> TensorQuantizer:
        total = sum(one.target.numel for one in self.projected_weights)
        given = self.entropy
        entropy = {"relative_step": given.step, "dead_zone": given.dead_zone}
        return make_quantizer(
            self.scheme,
            bits=self.bits[projected.path],
            axis=channel_axis(projected.target.layer) if self.per_channel else None,
            observer=self.observer,
            lr=self.lr,
            entropy={**entropy, "rate": given.rate / total},
            partition=projected.partition,
        )

    def _find_activations(self, module: LightningModule) -> None:
        targets, before = (
            [projected.target for projected in self.projected_weights],
            self.activations,
        )
        layers, self.activation_coverage = activation_layers(module, targets)
        self.activations = ActivationQuantizer(
            layers,
            parts=deployed_part(module),
            norms=batch_norms(module),
            bits=self.activation_bits or 8,
            observer=self.observer,
            clip_lr=self.lr if self.pact else None,
        )
        if before is not None and list(before.layers) == list(layers):
            self.activations.load_state_dict(before.state_dict())
            self.activations.thaw()
        elif before is None:
            self.activations.begin_from(
                {path: known for path, one in layers.items() if (known := activation_grids(one))}
            )
        for row in self.activation_coverage:
            if not row.selected:
                rank_zero_info(f"{self.state_key}: activations of {row.path}: {row.reason}")

    def _look_for_enlarged(self) -> None:
        """Layers whose weights an int8 file adds up; found as they first run."""
        if self._enlarged is not None:
            self._enlarged.stop()
        if self.weights is not None:
            layers = {
                projected.path: projected.target.layer for projected in self.projected_weights
            }
            self._enlarged = EnlargedReaders(layers, self.weights.make_room)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint, and begin if the window does."""
        super().on_train_start(trainer, pl_module)
        if self.started:
            self._install()
        elif self.events.begin <= 0:
            self._start()
        if self.weights is not None and self.started:
            self.weights.show()
        self._clocks = {
            projected.path: self.projector.clock([projected.path])
            for projected in self.projected_weights
        }
        self._last_step = self.projector.clock(self.paths())

    def _start(self) -> None:
        if self.weights is not None:
            self.weights.start()
        self.started = True
        self._install()
        self._steer()

    def _install(self) -> None:
        if self.weights is not None:
            self.weights.install()
        if self.activations is not None:
            self.activations.detach()
            self.activations.attach()

    @torch.no_grad()
    def on_weight_step(self, trainer: Trainer) -> None:
        """Let grids follow a step of the weights; at an event do the costly part, and freeze."""
        clocks = {
            projected.path: self.projector.clock([projected.path])
            for projected in self.projected_weights
        }
        stepped = {path for path, clock in clocks.items() if clock != self._clocks.get(path)}
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
        self._set_rate()
        if self.started:
            self._advance(trainer, stepped)
        elif self.events.position >= self.events.begin:
            self._start()
            self._show()

    def _advance(self, trainer: Trainer, stepped: set[str]) -> None:
        ends = self.events.over and not self.frozen
        event = self.events.due(unfinished=False) or ends
        self._follow(stepped, event=event)
        if self.activations is not None and self.activations.following:
            several = trainer.world_size > 1
            self.activations.step(partial(_reduce, trainer) if several else None)
        if event and self.activations is not None:
            self.activations.check()
        if event:
            self._steer()
        if ends:
            self._freeze()
        if event:
            self._show()

    def _follow(self, stepped: set[str], *, event: bool) -> None:
        if self.weights is not None and self.started:
            self.weights.follow(stepped, event=event)

    def _steer(self) -> None:
        if self.weights is None:
            return
        for what, message in self.weights.steer(self._target()).items():
            if what not in self._warned:
                rank_zero_warn(f"{self.state_key}: {message}")
                self._warned.add(what)

    def _target(self) -> float | None:
        """Bits of all targets together."""
        given = self.entropy
        if given.target_bytes is not None:
            return 8.0 * given.target_bytes
        total = sum(projected.target.numel for projected in self.projected_weights)
        return None if given.target_bits is None else given.target_bits * total

    def _freeze(self) -> None:
        if self.weights is not None:
            self.weights.freeze()
        if self.activations is not None:
            self._freeze_activations(self.activations)
        self.frozen = True

    def _freeze_activations(self, side: ActivationQuantizer) -> None:
        bare = side.without_range()
        side.freeze(spare=True)
        for path, why in bare.items():
            rank_zero_warn(f"{self.state_key}: activations of {path} stay as they are: {why}")
        self.activation_coverage = CoverageTable(
            replace(row, selected=False, reason=bare[row.path]) if row.path in bare else row
            for row in self.activation_coverage
        )

    def _show(self) -> None:
        if self.weights is not None:
            self.weights.show()
            self._settling.read(self._last_step, self.weights.predicted_bytes)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep BatchNorm's statistics, once frozen: Lightning puts all layers in training mode."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.freeze_batchnorm and self.frozen:
            for norm in self._norms:
                norm.eval()

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Log the bytes of the entropy-coded symbols as of the last event, and the step."""
        if self.weights is None:
            return
        values = {"predicted_bytes": self.weights.predicted_bytes}
        if (step := self.weights.relative_step) is not None:
            values["step"] = step
        self.log_new(pl_module, batch_idx, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the grids of activations in the layers.

        Raises:
            ValueError: when no batch went through any of them.
        """
        self.settle_copies()
        for norm in self._norms if self.freeze_batchnorm else ():
            norm.train(pl_module.training)
        if not self.started:
            why = self.why_no_steps() or f"the run ended before begin={self.events.begin!r}"
            if not is_trial_run(trainer):
                rank_zero_warn(f"{self.state_key}: nothing is quantized: {why}")
        elif self.activations is not None:
            if self.activations.following and not is_trial_run(trainer):
                self._freeze_activations(self.activations)
            self.activations.leave_grids()
            self._left = True

    @property
    def schedule_over(self) -> bool:
        """Whether grids stay as they are."""
        return self.frozen

    def fit_results(self) -> dict[str, Any]:
        """Bits, and how far it went, too."""
        names = ("activation_coverage", "bits", "frozen", "started")
        return {**super().fit_results(), **{name: getattr(self, name) for name in names}}

    def activation_grids_now(self) -> dict[str, ActivationGrids]:
        """Grids of activations as things are in this fit, by path of the layer."""
        return self.activations.grids() if self.started and self.activations is not None else {}

    def on_finished_run(self, module: LightningModule) -> None:  # noqa: ARG002
        """Leave the grids of activations in the layers, as when training ends."""
        if self.started and self.activations is not None:
            self.activations.leave_grids()
            self._left = True

    def _enter_grids(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate on the grids that the module carries, as validation inside the fit does."""
        if trainer.state.fn == TrainerFn.FITTING or self._evaluation is not None:
            return
        if self.activation_bits is None and not compression_state(module, masks=False).activations:
            return
        _warn_of_lost_grids(self.state_key, module)
        self._evaluation = ExitStack()
        if id(module) not in _EVALUATED:  # several callbacks round once
            self._evaluation.enter_context(fake_quantized(module))
            self._evaluation.callback(_EVALUATED.discard, id(module))
            _EVALUATED.add(id(module))

    def _leave_grids(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate on the grids of a trained module; inside a fit they are there already."""
        super().on_validation_start(trainer, pl_module)
        self._enter_grids(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test on the grids of a trained module."""
        self._enter_grids(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict on the grids of a trained module."""
        self._enter_grids(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Compute in float again."""
        self._leave_grids()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Compute in float again."""
        self._leave_grids()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Compute in float again."""
        self._leave_grids()

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Any) -> None:  # noqa: ARG002
        """Keep the ranges and steps of the channels that stay."""
        quantizers = {} if self.weights is None else self.weights.quantizers
        for path, dims in kept.items():
            if (quantizer := quantizers.get(clean_path(path))) is not None:
                quantizer.select(dims)

    def stop(self) -> None:
        """Remove the grids and hooks of activations."""
        self._leave_grids()
        if self.activations is not None:
            self.activations.detach()
        if self._enlarged is not None:
            self._enlarged.stop()

    def state_dict(self) -> dict[str, Any]:
        """Latent weights, all that makes the grids, and the clock."""
        return {
            "weights": None if self.weights is None else self.weights.state_dict(),
            "activations": None if self.activations is None else self.activations.state_dict(),
            "steps": [] if self._projector is None else list(self._projector.steps),
            "scheme": self.scheme,
            "asked_bits": dict(self.requested_bits),
            "events": self.events.state_dict(),
            "flags": (self.started, self.frozen),
            "bits": dict(self.bits),
            "lmbda": self.lmbda,
            "settling": self._settling.readings,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put everything back.

        Raises:
            ValueError: for a checkpoint of other weights or layers, another scheme or other bits.
        """
        self._check_same("scheme", state.get("scheme", self.scheme), self.scheme)
        asked = state.get("asked_bits", self.requested_bits)
        for path in sorted(set(asked) & set(self.requested_bits)):
            self._check_same(f"weight_bits of {path}", asked[path], self.requested_bits[path])
        self.started, self.frozen = state["flags"]
        sides = (("weights", self.weight_bits), ("activations", self.activation_bits))
        for side, bits in sides:
            if (state[side] is None) != (bits is None):
                word = "does not quantize" if state[side] is None else "quantizes"
                raise ValueError(f"the checkpoint {word} {side}, and this run is the other way")
        self._restore_bits(state.get("bits", {}))
        if self.weights is not None:
            self.weights.load_state_dict(state["weights"], started=self.started)
        if self.activations is not None:
            self.activations.load_state_dict(state["activations"])
        if self.lmbda is not None and state.get("lmbda") is not None:
            self.lmbda = state["lmbda"]  # a budget may have moved it
        self._settling.readings = list(state.get("settling", ()))
        self.projector.steps[:] = state["steps"]
        self.events.load_state_dict(state["events"])

    def _check_same(self, what: str, saved: object, asked: object) -> None:
        if saved != asked:
            raise ValueError(
                f"{self.state_key}: the checkpoint has {what} {saved!r}, this run {asked!r}: "
                "give what it has, or begin from its weights alone"
            )

    def _restore_bits(self, bits: Mapping[str, int]) -> None:
        """Makers of the bits that a run had come to, before their own state is put back."""
        for path in set(bits) & set(self.bits):
            if self.weights is not None and bits[path] != self.bits[path]:
                self.bits[path] = bits[path]
                (projected,) = (
                    projected for projected in self.projected_weights if projected.path == path
                )
                self.weights.replace(path, self._make_quantizer(projected), started=False)


def _reduce(trainer: Trainer, values: Tensor, how: str) -> Tensor:
    on_device = values.to(trainer.strategy.root_device)
    return trainer.strategy.reduce(on_device, reduce_op=how).to(values.device)


@torch.no_grad()
def _warn_of_lost_grids(key: str, module: nn.Module) -> None:
    """Warn where weights and grids of a module that is evaluated do not belong together."""
    off = []
    for path, grid in compression_state(module, masks=False).grids.items():
        weight = module.get_parameter(path)
        if not is_sharded(weight) and not torch.equal(grid.project(weight), weight):
            off.append(path)
    if off:
        rank_zero_warn(
            f"{key}: {', '.join(off[:2])} {'do' if len(off) > 1 else 'does'} not lie on the grid "
            "that the module carries: other weights were loaded since. "
            "restore_compression(module, checkpoint) brings back what belongs to them"
        )
    elif text := lost_grids(module):
        rank_zero_warn(f"{key}: evaluated in float. {text}")
