"""PostTrainingQuantization: weights go onto their grids when training has ended."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.callbacks.base import tell_of_overlooked
from lightning_compress.quantization.post_training import SCHEMES, quantize_weights
from lightning_compress.quantization.quantizers import check_bits
from lightning_compress.targets import Coverage, Pattern, select

__all__ = ["PostTrainingQuantization"]


class PostTrainingQuantization(Callback):
    """Quantize the weights at the end of `fit`, over the min/max range of each channel.

    Args:
        weight_bits: 2 to 8.
        scheme: "symmetric" or "affine".
        per_channel: one scale an output channel, else one a tensor.
        include: path globs or layer classes; None: the weights of the part that ships.
        exclude: the same, taken away again.

    Raises:
        ValueError: for bits or a scheme out of range; the message names the valid ones.

    >>> PostTrainingQuantization(weight_bits=4).weight_bits
    4
    """

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
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r}: valid are {list(SCHEMES)}")
        self.weight_bits, self.scheme, self.per_channel = weight_bits, scheme, per_channel
        self.include, self.exclude = include, exclude
        self.coverage: list[Coverage] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Find mistakes in the patterns before anything is trained."""
        if stage == "fit" and not is_overridden("configure_model", pl_module):
            self.coverage = select(pl_module, self.include, self.exclude).coverage

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Find the targets, which `configure_model` may have made since."""
        self.coverage = select(pl_module, self.include, self.exclude).coverage
        if self.include is None:
            tell_of_overlooked(pl_module)

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
