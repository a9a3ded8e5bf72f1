"""Adversarial models: a deployed generator and a discriminator that only trains it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import (
    AdversarialModel,
    LatentModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.networks import (
    conv_discriminator,
    conv_generator,
    initialize_dcgan,
)

__all__ = [
    "DCGAN",
    "LOSSES",
    "WGANGP",
    "BaseGAN",
    "Batch",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
]
Batch = tuple[Tensor, Tensor]


class BaseGAN(AdversarialModel, LatentModel):
    """A deployed generator that is driven by latents, and a discriminator that trains it.

    Args:
        image_size: base * 2^k with base 4 to 7.
        channels: channels of the image.
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
        """Latents (N, latent_dim) -> images (N, C, H, W) in [-1, 1]."""
        return self.generator(z)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> images (N, C, H, W) in [0, 1]; call in eval mode."""
        return (self.generator(z).float() + 1) / 2

    def parts(self) -> Parts:
        """The generator, z -> images in [-1, 1]."""
        return {"generator": (self.generator, (self.sample_latents(),))}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the generator, Adam for the discriminator, in this order."""
        return self._in_turn(torch.optim.Adam, self.generator, self.discriminator)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how the discriminator judges held-out images and as many generated ones."""
        real = batch[0] * 2 - 1
        fake = self.generator(self.latents(len(real), seed=batch_idx))
        judged = {"val/d_real": self._mean_score(real), "val/d_fake": self._mean_score(fake)}
        self.log_dict(judged, batch_size=len(real), prog_bar=True)

    def _mean_score(self, images: Tensor) -> Tensor:
        """Mean probability that the discriminator gives to images being real."""
        return self.discriminator(images).float().sigmoid().mean()

    def _draw(self, real: Tensor) -> Tensor:
        z = torch.randn(len(real), self.latent_dim, device=real.device, dtype=real.dtype)
        return self.generator(z)

    def _scores(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real).float(), self.discriminator(fake).float()


LOSSES = ("non_saturating", "hinge")


def discriminator_loss(real: Tensor, fake: Tensor, *, loss: str) -> Tensor:
    """Loss of the discriminator from its scores (N,) of real and fake images.

    `"non_saturating"`: Goodfellow et al. 2014; `"hinge"`: Lim and Ye 2017.

    >>> discriminator_loss(torch.tensor([2.0]), torch.tensor([-0.5]), loss="hinge").item()
    0.5
    """
    if loss == "hinge":
        return (functional.relu(1 - real) + functional.relu(1 + fake)).mean()
    return (functional.softplus(-real) + functional.softplus(fake)).mean()


def generator_loss(fake: Tensor, *, loss: str) -> Tensor:
    """Loss of the generator from the discriminator's scores (N,) of its images."""
    return -fake.mean() if loss == "hinge" else functional.softplus(-fake).mean()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, *, mix: Tensor) -> Tensor:
    """Mean of (|gradient of the critic| - 1)^2 at mix * real + (1 - mix) * fake, in float32.

    Gulrajani et al. 2017, equation 3, https://arxiv.org/abs/1704.00028.

    Args:
        critic: images (N, C, H, W) -> scores (N,); no layer of it may mix examples.
        real: images (N, C, H, W).
        fake: images (N, C, H, W).
        mix: weights in [0, 1], (N, 1, 1, 1).
    """
    # Autocast off: half-precision gradients of gradients lose what the square needs.
    with torch.autocast(real.device.type, enabled=False):
        between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
        scores = critic(between).sum()
        (gradient,) = torch.autograd.grad(scores, between, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.float().flatten(1), dim=1)
    return (norm - 1).square().mean()


class DCGAN(BaseGAN):
    """Deep convolutional GAN: one discriminator and one generator step a batch.

    Radford et al. 2016, https://arxiv.org/abs/1511.06434, with a discriminator without BatchNorm.
    Logs `train/d_loss`, `train/g_loss`, and the discriminator's mean sigmoid on real and fake
    images as `train/d_real`, `train/d_fake`, `val/d_real`, `val/d_fake`.

    Args:
        image_size: base * 2^k with base 4 to 7; from the data when the app builds the model.
        channels: channels of the image.
        latent_dim: size of z.
        width: channels that a full-resolution layer of the generator would have, doubled at each
            halving.
        discriminator_width: the same for the discriminator.
        loss: `"non_saturating"` or `"hinge"`.
        lr: learning rate of both optimizers.
        betas: Adam's momenta.
        spectral_norm: normalize the discriminator's weights.
        width_multiplier: scales `width`, to a multiple of 8; the discriminator, which does not
            deployed, keeps its own.

    Raises:
        ValueError: for a bad argument, with the valid ones.

    >>> model = DCGAN(image_size=16, width=8)
    >>> model.eval().images(model.latents(3, seed=0)).shape
    torch.Size([3, 1, 16, 16])
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 1,
        latent_dim: int = 64,
        width: int = 64,
        discriminator_width: int = 32,
        loss: Literal["non_saturating", "hinge"] = "non_saturating",
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        spectral_norm: bool = False,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            latent_dim=latent_dim,
            widths=(scaled_width(width, width_multiplier), discriminator_width),
            spectral_norm=spectral_norm,
        )
        initialize_dcgan(self.generator)
        initialize_dcgan(self.discriminator)
        betas = (float(betas[0]), float(betas[1]))  # plain, also when a config gave a list
        self.loss = check_choice("loss", loss, LOSSES)
        check_range("lr", lr, 0)
        self.save_hyperparameters()

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """One step of the discriminator, then one of the generator."""
        real = batch[0] * 2 - 1
        generator, discriminator = self._both_optimizers()
        with self._only(discriminator):
            logs = self._discriminator_step(real, discriminator)
        with self._only(generator):
            loss = generator_loss(self.discriminator(self._draw(real)).float(), loss=self.loss)
            self._update(generator, loss)
        self.log_dict({**logs, "train/g_loss": loss.detach()}, batch_size=len(real), prog_bar=True)

    def _discriminator_step(self, real: Tensor, optimizer: LightningOptimizer) -> dict[str, Any]:
        with torch.no_grad():
            fake = self._draw(real)
        on_real, on_fake = self._scores(real, fake)
        loss = discriminator_loss(on_real, on_fake, loss=self.loss)
        self._update(optimizer, loss)
        judged = {"train/d_real": on_real.detach(), "train/d_fake": on_fake.detach()}
        means = {name: scores.sigmoid().mean() for name, scores in judged.items()}
        return {"train/d_loss": loss.detach(), **means}


class WGANGP(BaseGAN):
    """Wasserstein GAN with gradient penalty: several critic steps a batch, then one generator step.

    Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028. The critic is `discriminator`. Logs
    `train/wasserstein` (the critic's estimate), `train/gradient_penalty` (unweighted), both of the
    last critic step, `train/g_loss`, and the critic's mean scores `val/d_real`, `val/d_fake`.

    Args:
        image_size: base * 2^k with base 4 to 7; from the data when the app builds the model.
        channels: channels of the image.
        latent_dim: size of z.
        width: channels that a full-resolution layer of the generator would have, doubled at each
            halving.
        discriminator_width: the same for the discriminator.
        critic_steps: critic steps a batch, each with fresh latents.
        gradient_penalty: weight of the penalty.
        lr: learning rate of both optimizers.
        betas: Adam's momenta.
        width_multiplier: scales `width`, to a multiple of 8; the discriminator, which does not
            deployed, keeps its own.

    Raises:
        ValueError: for a bad argument, with the valid ones.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 1,
        latent_dim: int = 64,
        width: int = 64,
        discriminator_width: int = 32,
        critic_steps: int = 5,
        gradient_penalty: float = 10.0,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.9),
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            latent_dim=latent_dim,
            widths=(scaled_width(width, width_multiplier), discriminator_width),
        )
        initialize_dcgan(self.generator)
        betas = (float(betas[0]), float(betas[1]))
        self.critic_steps = check_count("critic_steps", critic_steps)
        self.penalty_weight = check_range("gradient_penalty", gradient_penalty, 0)
        check_range("lr", lr, 0)
        self.save_hyperparameters()

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """`critic_steps` steps of the critic, then one of the generator."""
        real = batch[0] * 2 - 1
        generator, critic = self._both_optimizers()
        logs: dict[str, Any] = {}
        with self._only(critic):
            for _ in range(self.critic_steps):
                logs = self._critic_step(real, critic)
        with self._only(generator):
            loss = -self.discriminator(self._draw(real)).float().mean()
            self._update(generator, loss)
        self.log_dict({**logs, "train/g_loss": loss.detach()}, batch_size=len(real), prog_bar=True)

    def _mean_score(self, images: Tensor) -> Tensor:
        return self.discriminator(images).float().mean()

    def _critic_step(self, real: Tensor, optimizer: LightningOptimizer) -> dict[str, Any]:
        with torch.no_grad():
            fake = self._draw(real)
        on_real, on_fake = self._scores(real, fake)
        distance = on_real.mean() - on_fake.mean()
        mix = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
        penalty = gradient_penalty(self.discriminator, real, fake.to(real.dtype), mix=mix)
        self._update(optimizer, self.penalty_weight * penalty - distance)
        return {
            "train/wasserstein": distance.detach(),
            "train/gradient_penalty": penalty.detach(),
        }
