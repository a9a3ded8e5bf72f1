"""Quantized weights of one callback: a quantizer for each projected weight while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_compress.fast_tensors import count_non_finite
from lightning_compress.grids import check_bits
from lightning_compress.projection import ProjectedWeight, divergence_message, naming_divergence
from lightning_compress.quantization.entropy import EntropyGrid, EntropyGrids, grid_bits, steer
from lightning_compress.quantization.ranges import OBSERVERS
from lightning_compress.quantization.rate_distortion import RateDistortionGrids
from lightning_compress.quantization.weight_quantizers import (
    WEIGHT_SCHEMES,
    RangeGrids,
    TensorQuantizer,
)
from lightning_compress.targets import Pattern

__all__ = [
    "WeightQuantizer",
    "check_lmbda",
    "check_scheme_settings",
    "check_sides",
]


def check_sides(
    weight_bits: int | Mapping[Pattern, int] | None,
    activation_bits: int | None,
    scheme: str,
    observer: str,
) -> None:
    """Check bits (of weights: one for all, or one for each pattern) and names.

    Raises:
        ValueError: naming the value and the valid ones.
    """
    if weight_bits is None and activation_bits is None:
        raise ValueError("weight_bits and activation_bits are both None: nothing is quantized")
    if isinstance(weight_bits, Mapping) and not weight_bits:
        raise ValueError("weight_bits={} names no pattern")
    each = weight_bits.values() if isinstance(weight_bits, Mapping) else [weight_bits]
    for name, given in (
        *(("weight_bits", bits) for bits in each),
        ("activation_bits", activation_bits),
    ):
        if given is not None:
            check_bits(name, given)
    for name, given, valid in (
        ("scheme", scheme, WEIGHT_SCHEMES),
        ("observer", observer, OBSERVERS),
    ):
        if given not in valid:
            raise ValueError(f"{name}={given!r}: valid are {list(valid)}")


def check_scheme_settings(scheme: str, entropy: object, lmbda: float | None) -> None:
    """Check that what belongs to one scheme is given with it, and only with it.

    Raises:
        ValueError: naming the argument and the scheme.
    """
    if entropy is not None:
        if scheme != "entropy":
            raise ValueError(f"entropy= belongs to scheme='entropy', not to {scheme!r}")
        if not isinstance(entropy, EntropyGrid):
            raise ValueError(f"entropy={entropy!r}: give an EntropyGrid(step=..., rate=...)")
    if (scheme == "rate_distortion") != (lmbda is not None):
        if lmbda is None:
            raise ValueError(
                "scheme='rate_distortion' needs lmbda, the weight of a weight's mean bits in the "
                "loss: 4 to 60 where the loss is some hundred nats"
            )
        raise ValueError(f"lmbda={lmbda!r} belongs to scheme='rate_distortion', not to {scheme!r}")
    if lmbda is not None:
        check_lmbda(lmbda)


def check_lmbda(lmbda: float) -> None:
    """Check a Lagrange multiplier.

    Raises:
        ValueError: unless it is a finite number of 0 or more.
    """
    if isinstance(lmbda, bool) or not 0 <= lmbda < math.inf:
        raise ValueError(f"lmbda={lmbda!r} must be a finite number, 0 or more")


class WeightQuantizer:
    """The weights of one callback, from the first projection to the last.

    Args:
        projected_weights: the weights.
        make: the quantizer of a projected weight's grid.
        earlier: of a fit before this one: its quantizers and latent weights go on.
    """

    def __init__(
        self,
        projected_weights: Sequence[ProjectedWeight],
        make: Callable[[ProjectedWeight], TensorQuantizer],
        earlier: WeightQuantizer | None = None,
    ) -> None:
        self.pairs: list[tuple[ProjectedWeight, TensorQuantizer]] = []
        self.predicted_bytes = 0.0  # of all symbols at their entropy, when last counted
        before = {} if earlier is None else {one.path: (one, old) for one, old in earlier.pairs}
        for projected in projected_weights:
            old, quantizer = before.get(projected.path, (None, None))
            if old is None or quantizer is None or old.parameter.shape != projected.parameter.shape:
                quantizer = make(projected)
            elif projected.latent is None:  # the weight itself counts where it was changed since
                projected.latent, projected.grid = old.latent, old.grid
            quantizer.thaw()
            self.pairs.append((projected, quantizer))

    def change(
        self,
        projected_weights: Sequence[ProjectedWeight],
        make: Callable[[ProjectedWeight], TensorQuantizer],
        *,
        started: bool,
    ) -> None:
        """Continue with other weights; new ones start, if the others have.

        Args:
            projected_weights: the weights of now.
            make: the quantizer of a new projected weight's grid.
            started: whether the weights are on grids already.
        """
        quantizers = {id(projected): quantizer for projected, quantizer in self.pairs}
        fresh = [projected for projected in projected_weights if id(projected) not in quantizers]
        self.pairs = [
            (projected, quantizers.get(id(projected)) or make(projected))
            for projected in projected_weights
        ]
        for projected, quantizer in self.pairs if started else ():
            if projected in fresh:
                quantizer.start(masked_latent(projected))
        if started:
            self.install()

    @property
    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The quantizers by path."""
        return {projected.path: quantizer for projected, quantizer in self.pairs}

    @property
    def relative_step(self) -> float | None:
        """The step that entropy grids share, in units of the rms of the non-zero weights."""
        return next((m.relative_step for _, m in self.pairs if isinstance(m, EntropyGrids)), None)

    def replace(self, path: str, quantizer: TensorQuantizer, *, started: bool) -> None:
        """Give a weight another quantizer, which looks at it at once if the others have begun."""
        for index, (projected, old) in enumerate(self.pairs):
            if projected.path != path:
                continue
            if isinstance(old, RangeGrids) and isinstance(quantizer, RangeGrids):
                quantizer.enlarged = old.enlarged
            if started:
                quantizer.start(masked_latent(projected))
                projected.set_quantizer(quantizer.grid)
                projected.gradient_rule = partial(_rule, projected, quantizer)
            self.pairs[index] = (projected, quantizer)

    def make_room(self, path: str, factor: int) -> None:
        """From its next range on, sums of a weight that reads an enlarged image fit int8."""
        for projected, quantizer in self.pairs:
            if projected.path == path and isinstance(quantizer, RangeGrids):
                quantizer.enlarged = factor

    def set_rate(self, weight: float) -> None:
        """Another weight of one bit in the loss, for all rate-distortion grids."""
        for _, quantizer in self.pairs:
            if isinstance(quantizer, RateDistortionGrids):
                quantizer.weight = weight

    def set_step(self, relative_step: float) -> None:
        """Another step for all entropy grids, frozen ones too."""
        for projected, quantizer in self.pairs:
            if isinstance(quantizer, EntropyGrids):
                frozen = quantizer.held is not None
                quantizer.thaw()
                quantizer.relative_step = relative_step
                if frozen:
                    quantizer.freeze(masked_latent(projected))

    def start(self) -> None:
        """Look at the weights and put them onto grids, from the next projection on.

        Raises:
            ValueError: for weights that are not finite.
        """
        for projected, quantizer in self.pairs:
            values = masked_latent(projected)
            if not _finite(projected, values):
                raise ValueError(f"{projected.path} holds weights that are NaN or infinite")
            quantizer.start(values)
        self.install()

    def install(self) -> None:
        """Attach the quantizers to the projected weights."""
        for projected, quantizer in self.pairs:
            if projected.gradient_rule is None:
                projected.set_quantizer(quantizer.grid)
                projected.gradient_rule = partial(_rule, projected, quantizer)

    def follow(self, stepped: Collection[str], *, event: bool) -> None:
        """Update the grids of stepped weights; at an event those of all.

        Raises:
            FloatingPointError: naming the parameter whose weights are no longer finite.
        """
        for projected, quantizer in self.pairs:
            if event or projected.path in stepped:
                values = masked_latent(projected)
                if event and values.device.type != "cpu" and not _finite(projected, values):
                    raise FloatingPointError(divergence_message(projected))
                with naming_divergence([projected]):
                    moved = quantizer.step(values, event=event)
                if moved is not None:
                    projected.set_values(moved)

    def steer(self, bits: float | None) -> dict[str, str]:
        """Bring entropy grids to a target, in bits of all weights together; None: as they are.

        Returns:
            What the user should know, by what it is about.
        """
        pairs = [(projected, one) for projected, one in self.pairs if isinstance(one, EntropyGrids)]
        metrics = {}
        if pairs and bits is not None:
            with naming_divergence([projected for projected, _ in pairs]):
                found = steer(
                    [one for _, one in pairs],
                    [masked_latent(projected) for projected, _ in pairs],
                    bits,
                )
            if abs(found / bits - 1) > 0.05:
                metrics["target"] = (
                    f"{found / 8:.0f} bytes is as near as a step comes to the target of "
                    f"{bits / 8:.0f}"
                )
        for projected, one in pairs:
            if one.raised:
                metrics[projected.path] = (
                    f"the step of {projected.path} is raised above {one.relative_step:.3g} rms, "
                    f"so that its range fits {one.bits} bits"
                )
        return metrics

    def freeze(self) -> None:
        """Keep the grids."""
        for projected, quantizer in self.pairs:
            with naming_divergence([projected]):
                quantizer.freeze(masked_latent(projected))

    def freeze_one(self, path: str) -> None:
        """Keep the grid of one weight."""
        for projected, quantizer in self.pairs:
            if projected.path == path:
                quantizer.freeze(masked_latent(projected))

    def show(self) -> None:
        """Project all weights, those of other optimizers too, and count their bytes."""
        bits = 0.0
        for projected, _ in self.pairs:
            with naming_divergence([projected]):
                if projected.in_update:  # it is projected when the step ends
                    values = masked_latent(projected)
                    grid = projected.grid_for(values)
                else:
                    projected.project()
                    values, grid = projected.data, projected.grid
                if grid is not None:
                    bits += grid_bits(grid, values, partition=projected.partition)
        self.predicted_bytes = bits / 8

    def state_dict(self) -> dict[str, Any]:
        """Latent weights, and all that makes the grids."""
        latents = {
            one.path: one.whole(one.latent) for one, _ in self.pairs if one.latent is not None
        }
        quantizers = {path: quantizer.state_dict() for path, quantizer in self.quantizers.items()}
        return {"latents": latents, "makers": quantizers, "predicted_bytes": self.predicted_bytes}

    def load_state_dict(self, state: dict[str, Any], *, started: bool) -> None:
        """Restore them.

        Raises:
            ValueError: when the state is of other weights.
        """
        if set(state["makers"]) != set(self.quantizers):
            was, now = sorted(state["makers"]), sorted(self.quantizers)
            raise ValueError(f"the checkpoint quantizes {was}, this run {now}")
        for path, one in state["makers"].items():
            self.quantizers[path].load_state_dict(one)
        self.predicted_bytes = state["predicted_bytes"]
        if started:
            self.install()
        for projected, _ in self.pairs:
            if (latent := state["latents"].get(projected.path)) is not None:
                projected.set_values(projected.partition.part(latent))


def masked_latent(projected: ProjectedWeight) -> Tensor:
    """Latent values with 0 where the mask prunes."""
    values = projected.values()
    return projected.zero_pruned(values)


def _finite(projected: ProjectedWeight, values: Tensor) -> bool:
    """Whether all values are numbers, those of other processes too."""
    return int(projected.partition.all_reduce_sum(count_non_finite(values))) == 0


def _rule(projected: ProjectedWeight, quantizer: TensorQuantizer, gradient: Tensor) -> None:
    quantizer.gradient(gradient, masked_latent(projected))
