"""pix2pix: image to image, trained by pixels and by a judge of patches."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    AdversarialModel,
    ConditionalModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.gan import discriminator_loss, generator_loss
from lightning_compress.lab.models.image_networks import PatchGAN, ResnetGenerator, UNetGenerator

__all__ = ["Pix2Pix"]
NETWORKS = {"unet": UNetGenerator, "resnet": ResnetGenerator}
LOSS = "non_saturating"


class Pix2Pix(AdversarialModel, ConditionalModel):
    """Conditional GAN from image to image: L1 to the target, and a PatchGAN.

    Isola et al. 2017, https://arxiv.org/abs/1611.07004. Logs `train/d_loss`, `train/g_loss`,
    `train/l1` and `val/l1`.

    Args:
        image_size: pixels a side, like `channels` from the data when the app builds the model;
            a power of two for the U-Net, a multiple of 4 for the ResNet.
        channels: of condition and target.
        network: of the generator, "unet" or "resnet".
        width: channels of the generator's first layer.
        discriminator_width: of the discriminator's.
        l1_weight: of the L1 term (lambda of the paper).
        lr: learning rate of both optimizers, which falls by a cosine to a tenth.
        betas: Adam's momenta.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, and a size that the network cannot halve.

    >>> model = Pix2Pix(image_size=16, width=8, discriminator_width=8).eval()
    >>> model.outputs(torch.zeros(3, 1, 16, 16)).shape
    torch.Size([3, 1, 16, 16])
    """

    deployed: ClassVar = ("generator",)
    data_kinds: ClassVar = ("image_pairs",)
    quality_metric: ClassVar = "l1"

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 1,
        network: Literal["unet", "resnet"] = "unet",
        width: int = 64,
        discriminator_width: int = 64,
        l1_weight: float = 100.0,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("network", network, NETWORKS)
        self.shape = (
            check_count("channels", channels),
            *2 * (check_count("image_size", image_size),),
        )
        check_range("l1_weight", l1_weight, 0)
        check_range("lr", lr, 0)
        betas = (float(betas[0]), float(betas[1]))  # plain, also when a config gave a list
        self.save_hyperparameters()
        wide = scaled_width(width, width_multiplier)
        self.generator = NETWORKS[network](channels, image_size, wide)
        judged = check_count("discriminator_width", discriminator_width)
        self.discriminator = PatchGAN(2 * channels, judged)

    def forward(self, condition: Tensor) -> Tensor:
        """Maps (N, C, S, S) in [-1, 1] to images in [-1, 1]."""
        return self.generator(condition)

    def outputs(self, condition: Tensor) -> Tensor:
        """Maps (N, C, S, S) in [0, 1] to images in [0, 1]."""
        return (self.generator(2 * condition - 1).float() + 1) / 2

    def distances(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean absolute difference, and structural similarity (Wang et al. 2004)."""
        similar = structural_similarity_index_measure(outputs, targets, data_range=1.0)
        return {
            "l1": float(functional.l1_loss(outputs, targets)),
            "ssim": float(cast("Tensor", similar)),
        }

    def parts(self) -> Parts:
        """The generator, conditions in [-1, 1] -> images in [-1, 1]."""
        noise = torch.Generator().manual_seed(0)
        sample = 2 * torch.rand(SAMPLE_BATCH, *self.shape, generator=noise) - 1
        return {"generator": (self.generator, (sample.to(self.dtype),))}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """One step of the discriminator, then one of the generator."""
        condition, real = (2 * images - 1 for images in batch)
        generator, discriminator = self._both_optimizers()
        fake = self.generator(condition)
        with self._only(discriminator):
            judged = (self._judge(condition, images) for images in (real, fake.detach()))
            d_loss = discriminator_loss(*judged, loss=LOSS) / 2  # half as fast (section 3.3)
            self._update(discriminator, d_loss)
        with self._only(generator):
            g_loss = generator_loss(self._judge(condition, fake), loss=LOSS)
            l1 = functional.l1_loss(fake.float(), real)
            self._update(generator, g_loss + self.hparams["l1_weight"] * l1)
        logs = {"train/d_loss": d_loss, "train/g_loss": g_loss, "train/l1": l1 / 2}
        self.log_dict({k: v.detach() for k, v in logs.items()}, batch_size=len(real), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Log `val/l1`, of images in [0, 1]."""
        loss = functional.l1_loss(self.outputs(batch[0]), batch[1])
        self.log("val/l1", loss, batch_size=len(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the generator, Adam for the discriminator, in this order."""
        return self._in_turn(torch.optim.Adam, self.generator, self.discriminator)

    def _judge(self, condition: Tensor, images: Tensor) -> Tensor:
        return self.discriminator(torch.cat([condition, images], 1)).float()
