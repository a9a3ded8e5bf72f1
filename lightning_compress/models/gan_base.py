"""What the adversarial models share: two networks, two optimizers, validation, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_compress.models.base import LatentModel, Parts, check_count
from lightning_compress.models.networks import conv_discriminator, conv_generator

__all__ = ["BaseGAN", "Batch"]

Batch = tuple[Tensor, Tensor]


class BaseGAN(LatentModel):
    """A generator that ships, a discriminator that trains it, and manual optimization.

    Args:
        image_size: base * 2^k with base 4 to 7.
        channels: channels of the picture.
        latent_dim: size of z.
        widths: widths of the generator and of the discriminator.
        spectral_norm: normalize the discriminator's weights.
    """

    deployed: ClassVar = ("generator",)
    kind: ClassVar = "gan"

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        latent_dim: int,
        widths: tuple[int, int],
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        image_size = check_count("image_size", image_size)
        channels = check_count("channels", channels)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.generator = conv_generator(
            image_size, channels, latent_dim=latent_dim, width=widths[0], final=nn.Tanh()
        )
        self.discriminator = conv_discriminator(
            image_size,
            channels,
            width=check_count("discriminator_width", widths[1]),
            spectral_norm=spectral_norm,
        )

    def forward(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> pictures (N, C, H, W) in [-1, 1]."""
        return self.generator(z)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> pictures (N, C, H, W) in [0, 1]; call in eval mode."""
        return (self.generator(z).float() + 1) / 2

    def parts(self) -> Parts:
        """The generator, z -> pictures in [-1, 1]."""
        return {"generator": (self.generator, (self.sample_latents(),))}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the generator, Adam for the discriminator, in this order."""
        arguments = {"lr": self.hparams["lr"], "betas": tuple(self.hparams["betas"])}
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), **arguments) for network in networks]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how the discriminator judges held-out pictures and as many generated ones."""
        real = batch[0] * 2 - 1
        fake = self.generator(self.latents(len(real), seed=batch_idx))
        judged = {"val/d_real": self._judge(real), "val/d_fake": self._judge(fake)}
        self.log_dict(judged, batch_size=len(real), prog_bar=True)

    def _judge(self, pictures: Tensor) -> Tensor:
        """How real pictures look to the discriminator, from 0 to 1."""
        return self.discriminator(pictures).float().sigmoid().mean()

    def _draw(self, real: Tensor) -> Tensor:
        z = torch.randn(len(real), self.latent_dim, device=real.device, dtype=real.dtype)
        return self.generator(z)

    def _scores(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real).float(), self.discriminator(fake).float()

    def _both_optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer]:
        generator, discriminator = cast("list[LightningOptimizer]", self.optimizers())
        return generator, discriminator

    @contextmanager
    def _only(self, optimizer: LightningOptimizer) -> Iterator[None]:
        """Let gradients flow to this optimizer's parameters alone, also when the step fails."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _update(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
