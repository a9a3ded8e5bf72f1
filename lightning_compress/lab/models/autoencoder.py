"""Base of the autoencoders whose decoder is deployed, and their residual networks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import ConditionalModel, Parts, check_count
from lightning_compress.lab.models.unet import GROUPS, ResidualBlock

__all__ = ["ImageAutoencoder", "ResidualDecoder", "ResidualEncoder"]
TRAIN_PARTS = ("all", "decoder")


def _head(width: int, outputs: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)]


class ResidualEncoder(nn.Sequential):
    """Images (N, channels, S, S) -> maps (N, outputs, S / 2^halvings, S / 2^halvings).

    Args:
        channels: of the images.
        outputs: channels of the maps.
        width: channels at full resolution, a multiple of 8; twice as many below.
        halvings: of the resolution.

    >>> ResidualEncoder(3, 4, width=8, halvings=2)(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 4, 4, 4])
    """

    def __init__(self, channels: int, outputs: int, *, width: int, halvings: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        widths = [width, *[2 * width] * halvings]
        for wide, below in pairwise(widths):
            layers += [ResidualBlock(wide, wide), nn.Conv2d(wide, below, 3, 2, 1)]
        last = widths[-1]
        super().__init__(*layers, ResidualBlock(last, last), *_head(last, outputs))


class ResidualDecoder(nn.Sequential):
    """Maps (N, inputs, s, s) -> images (N, channels, s * 2^doublings, s * 2^doublings).

    Args:
        inputs: channels of the maps.
        channels: of the images.
        width: channels at full resolution, a multiple of 8; twice as many below.
        doublings: of the resolution.

    >>> ResidualDecoder(4, 3, width=8, doublings=2)(torch.zeros(1, 4, 4, 4)).shape
    torch.Size([1, 3, 16, 16])
    """

    def __init__(self, inputs: int, channels: int, *, width: int, doublings: int) -> None:
        widths = [*[2 * width] * doublings, width]
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
        layers.append(ResidualBlock(widths[0], widths[0]))
        for wide, above in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(wide, above, 3, padding=1)]
            layers.append(ResidualBlock(above, above))
        super().__init__(*layers, *_head(width, channels))


class ImageAutoencoder(ConditionalModel):
    """An autoencoder of images whose decoder is deployed, with an encoder that may be frozen.

    The networks see images in [-1, 1]. A subclass makes `encoder` and `decoder`, then calls
    `choose_part`, and says what the decoder receives: `code`, and `sample_code` for an export.
    """

    deployed: ClassVar = ("decoder",)
    quality_metric: ClassVar = "psnr"
    encoder: Any  # modules, of a class of the subclass's own
    decoder: Any

    def check_sizes(self, image_size: int, channels: int, halvings: int) -> None:
        """Keep the sizes of images and of the decoder's input.

        Raises:
            ValueError: for an image that cannot be halved so often.
        """
        check_count("channels", channels)
        if check_count("image_size", image_size) % 2 ** check_count("halvings", halvings):
            raise ValueError(f"image_size={image_size} cannot be halved {halvings} times")
        self.code_size = image_size // 2**halvings

    def choose_part(self, train_part: str) -> None:
        """Train all, or freeze the encoder.

        Raises:
            ValueError: for another part.
        """
        if check_choice("train_part", train_part, TRAIN_PARTS) == "decoder":
            self.encoder.requires_grad_(False)

    def trained_weights(self) -> list[nn.Parameter]:
        """What the optimizer of encoder and decoder updates; tied weights once."""
        both = nn.ModuleList([self.encoder, self.decoder])
        return [weight for weight in both.parameters() if weight.requires_grad]

    def code(self, x: Tensor) -> Tensor:
        """What the decoder receives for images (N, C, S, S) in [0, 1], without sampling."""
        raise NotImplementedError

    def sample_code(self) -> Tensor:
        """An input of the decoder in the shape of its codes, of batch 2, on the CPU."""
        raise NotImplementedError

    def forward(self, code: Tensor) -> Tensor:
        """Codes -> images (N, C, S, S) around [-1, 1]."""
        return self.decoder(code)

    def outputs(self, condition: Tensor) -> Tensor:
        """Images (N, C, S, S) in [0, 1] -> their reconstructions in [0, 1]."""
        return ((self.decoder(self.code(condition)).float() + 1) / 2).clamp(0, 1)

    def distances(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """PSNR in dB and SSIM, means over images in [0, 1]."""
        images = {"preds": outputs, "target": targets, "data_range": 1.0}
        psnr = peak_signal_noise_ratio(**images, dim=(1, 2, 3), reduction="elementwise_mean")
        ssim = structural_similarity_index_measure(**images)
        return {"psnr": float(psnr), "ssim": float(torch.as_tensor(ssim))}

    def parts(self) -> Parts:
        """The decoder: codes -> images in [-1, 1]."""
        return {"decoder": (self.decoder, (self.sample_code(),))}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Log `val/l1`, of images in [0, 1]."""
        loss = functional.l1_loss(self.outputs(batch[0]), batch[0])
        self.log("val/l1", loss, batch_size=len(batch[0]), prog_bar=True)
