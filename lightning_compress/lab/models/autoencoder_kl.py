"""KL autoencoder: the first stage of latent diffusion, whose decoder is deployed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.lab.models.autoencoder import (
    ImageAutoencoder,
    ResidualDecoder,
    ResidualEncoder,
)
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    AdversarialModel,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.gan import discriminator_loss, generator_loss
from lightning_compress.lab.models.image_networks import PatchDiscriminator
from lightning_compress.lab.models.vae import normal_kl

__all__ = ["AutoencoderKL"]
LOSS = "hinge"


class AutoencoderKL(AdversarialModel, ImageAutoencoder):
    """Images <-> Gaussian latent maps: L1, a discriminator's features and scores, a small KL.

    Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G (equation 25). The perceptual
    distance is taken in the features of the model's own discriminator (Larsen et al. 2016,
    https://arxiv.org/abs/1512.09300), so that no network need be downloaded.
    Logs `train/l1`, `train/perceptual`, `train/kl`, `train/d_loss` and `val/l1`.

    Args:
        image_size: pixels a side, a multiple of `2 ** halvings`; like `channels` from the data when
            the app builds the model.
        channels: of the images.
        latent_channels: of the latent maps.
        width: channels at full resolution, twice as many below.
        halvings: of the resolution, from images to latents.
        discriminator_width: channels of its first layer.
        perceptual_weight: of the distance in the discriminator's features.
        adversarial_weight: of the discriminator's scores.
        kl_weight: of the KL in nats an image.
        train_part: "all"; or "decoder": the encoder is frozen.
        lr: learning rate of both optimizers, which falls by a cosine to a tenth.
        width_multiplier: scales the decoder's width, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, and sizes that do not divide.

    >>> model = AutoencoderKL(image_size=8, channels=3, width=8, discriminator_width=4).eval()
    >>> model.outputs(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        latent_channels: int = 4,
        width: int = 32,
        halvings: int = 2,
        discriminator_width: int = 16,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.01,
        kl_weight: float = 1e-6,
        train_part: str = "all",
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.check_sizes(image_size, channels, halvings)
        check_count("latent_channels", latent_channels)
        check_count("discriminator_width", discriminator_width)
        weights = {"perceptual_weight": perceptual_weight, "adversarial_weight": adversarial_weight}
        for name, value in (weights | {"kl_weight": kl_weight, "lr": lr}).items():
            check_range(name, value, 0)
        self.save_hyperparameters()
        encoded, decoded = scaled_width(width, 1.0), scaled_width(width, width_multiplier)
        self.encoder = ResidualEncoder(
            channels, 2 * latent_channels, width=encoded, halvings=halvings
        )
        self.decoder = ResidualDecoder(latent_channels, channels, width=decoded, doublings=halvings)
        self.discriminator = PatchDiscriminator(channels, discriminator_width)
        self.choose_part(train_part)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of q(z | x), each (N, latent_channels, s, s), in float32."""
        mu, logvar = self.encoder(2 * x - 1).float().chunk(2, 1)
        return mu, logvar.clamp(-30, 20)

    def code(self, x: Tensor) -> Tensor:
        """The mean of q(z | x)."""
        return self.posterior(x)[0].to(x.dtype)

    def sample_code(self) -> Tensor:
        """Latents (2, latent_channels, s, s) of a standard normal."""
        shape = (SAMPLE_BATCH, self.hparams["latent_channels"], self.code_size, self.code_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(cast("torch.dtype", self.dtype))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """One step of the discriminator, then one of encoder and decoder."""
        images = batch[0]
        real = 2 * images - 1
        autoencoder, discriminator = self._both_optimizers()
        mu, logvar = self.posterior(images)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        made = self.decoder(z.to(images.dtype))
        with self._only(discriminator):
            judged = (self.discriminator(images) for images in (real, made.detach()))
            d_loss = discriminator_loss(*judged, loss=LOSS) / 2
            self._update(discriminator, d_loss)
        with self._only(autoencoder):
            l1 = functional.l1_loss(made, real)
            perceptual, scores = self._judged(made, real)
            kl = normal_kl(mu.flatten(1), logvar.flatten(1)).mean()
            loss = l1 + self.hparams["perceptual_weight"] * perceptual
            loss = loss + self.hparams["adversarial_weight"] * generator_loss(scores, loss=LOSS)
            self._update(autoencoder, loss + self.hparams["kl_weight"] * kl)
        logs = {"train/l1": l1, "train/perceptual": perceptual, "train/kl": kl}
        logs |= {"train/d_loss": d_loss}
        self.log_dict({k: v.detach() for k, v in logs.items()}, batch_size=len(images))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for what is trained of encoder and decoder, AdamW for the discriminator."""
        arguments = {"lr": self.hparams["lr"], "betas": (0.5, 0.9)}
        groups = (self.trained_weights(), list(self.discriminator.parameters()))
        return [torch.optim.AdamW(weights, **arguments) for weights in groups]

    def _judged(self, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Mean absolute difference of the discriminator's features, over layers; its scores."""
        with torch.no_grad():
            *theirs, _ = self.discriminator.features(real)
        *ours, scores = self.discriminator.features(made)
        each = [functional.l1_loss(a, b) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(each).mean(), scores
