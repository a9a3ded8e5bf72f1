"""Variational autoencoder, and the base of all VAEs: ELBO, importance weights, steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    LatentModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.networks import ConvEncoder, conv_generator

__all__ = ["VAE", "BaseVAE", "bernoulli_nll", "gaussian_nll", "normal_kl"]

Batch = tuple[Tensor, Tensor]


def normal_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL in nats, (N,), of a diagonal normal (N, L) from the standard normal.

    >>> normal_kl(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)).item()
    2.0
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    """-log p(x) in nats, (N,), summed over all but the first axis; x in [0, 1].

    Grey values count as probabilities: the expected value over black-and-white images drawn
    from them.
    """
    loss = functional.binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none")
    return loss.flatten(1).sum(1)


def gaussian_nll(x: Tensor, mean: Tensor, *, std: float) -> Tensor:
    """-log density in nats, (N,), of a normal with one fixed standard deviation."""
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)
    loss = 0.5 * ((x.float() - mean.float()) / std).square() + constant
    return loss.flatten(1).sum(1)


class BaseVAE(LatentModel):
    """ELBO, importance weights and Lightning steps for any `encoder` and `decoder`.

    The encoder returns (mu, logvar), each (N, latent_dim). Subclasses give `reconstruction_nll`.
    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114.
    """

    deployed = ("encoder", "decoder")
    encoder: nn.Module
    decoder: nn.Module

    def reconstruction_nll(
        self, x: Tensor, z: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """-log p(x | z) in nats, (N,); `generator` drives word dropout where there is one."""
        raise NotImplementedError

    def kl_factor(self) -> float:
        """Weight of the KL in the training loss at this step."""
        return float(self.hparams["kl_weight"])

    def forward(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> the decoder's output."""
        return self.decoder(z)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of q(z | x), each (N, latent_dim), in float32."""
        mu, logvar = self.encoder(x)
        return mu.float(), logvar.float()

    def elbo_terms(
        self, x: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Per example and in nats: (-log p(x | z) at one posterior sample, KL), each (N,)."""
        nll, mu, logvar = self.reconstructed(x, generator=generator)
        return nll, normal_kl(mu, logvar)

    def reconstructed(
        self, x: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-log p(x | z) in nats at one posterior sample, (N,), and the posterior's mu, logvar."""
        mu, logvar = self.posterior(x)
        z = mu + (0.5 * logvar).exp() * _noise_like(mu, generator)
        return self.reconstruction_nll(x, z.to(self.dtype), generator=generator), mu, logvar

    def log_weights(self, x: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return log p(x, z) - log q(z | x) in nats at k posterior samples, (k, N).

        `logsumexp(weights, 0) - log(k)` is the importance-weighted bound of Burda et al. 2016,
        https://arxiv.org/abs/1509.00519.
        """
        mu, logvar = self.posterior(x)
        rows = []
        for _ in range(check_count("k", k)):
            noise = _noise_like(mu, generator)
            z = mu + (0.5 * logvar).exp() * noise
            prior_minus_posterior = 0.5 * (noise.square() + logvar - z.square()).sum(1)
            nll = self.reconstruction_nll(x, z.to(self.dtype), generator=generator)
            rows.append(prior_minus_posterior - nll)
        return torch.stack(rows)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:  # noqa: ARG002
        """Mean of reconstruction + kl_factor * KL."""
        nll, mu, logvar = self.reconstructed(batch[0])
        kl, factor = normal_kl(mu, logvar), self.kl_factor()
        loss = self.training_loss(nll, mu, logvar)
        logs = {"train/recon": nll.mean(), "train/kl": kl.mean(), "train/kl_factor": factor}
        self.log("train/loss", loss, batch_size=len(nll), prog_bar=True)
        self.log_dict(logs, batch_size=len(nll))
        return loss

    def training_loss(self, nll: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """Mean of reconstruction (N,) and weighted KL."""
        return (nll + self.kl_factor() * normal_kl(mu, logvar)).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `val/elbo` (nats, higher is better), `val/recon` and `val/kl`, all unweighted.

        The noise depends on the batch alone: epochs and models are compared at equal noise, and
        the training's random stream does not move.
        """
        generator = torch.Generator().manual_seed(batch_idx)
        nll, kl = self.elbo_terms(batch[0], generator=generator)
        self.log("val/elbo", -(nll + kl).mean(), batch_size=len(nll), prog_bar=True)
        self.log_dict({"val/recon": nll.mean(), "val/kl": kl.mean()}, batch_size=len(nll))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the encoder and the decoder."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def _noise_like(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    device = mu.device if generator is None else generator.device
    return torch.randn(mu.shape, generator=generator, device=device, dtype=mu.dtype).to(mu.device)


class VAE(BaseVAE):
    """Convolutional VAE for images.

    The decoder gives logits under the Bernoulli likelihood and the mean, in [0, 1], under the
    Gaussian one. Logs `train/` loss, recon, kl and kl_factor, and `val/` elbo, recon and kl.

    Args:
        image_size: base * 2^k with base 4 to 7; from the data when the app builds the model.
        channels: channels of the image.
        latent_dim: size of z.
        width: channels that a full-resolution layer would have, doubled at each halving.
        likelihood: `"bernoulli"` or `"gaussian"`.
        observation_std: standard deviation of the Gaussian likelihood, fixed; unused by Bernoulli.
        kl_weight: weight of the KL in the training loss (beta-VAE); logged ELBOs are unweighted.
        lr: Adam's learning rate.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, with the valid ones.

    >>> model = VAE(image_size=16, width=8).eval()
    >>> [tuple(term.shape) for term in model.elbo_terms(torch.rand(3, 1, 16, 16))]
    [(3,), (3,)]
    """

    kind = "vae"

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 1,
        latent_dim: int = 32,
        width: int = 32,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        observation_std: float = 0.1,
        kl_weight: float = 1.0,
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_size = check_count("image_size", image_size)
        self.channels = check_count("channels", channels)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.likelihood = check_choice("likelihood", likelihood, ("bernoulli", "gaussian"))
        self.observation_std = check_range("observation_std", observation_std, 1e-6)
        check_range("kl_weight", kl_weight, 0)
        check_range("lr", lr, 0)
        self.save_hyperparameters()
        sizes: dict[str, Any] = {
            "latent_dim": latent_dim,
            "width": scaled_width(width, width_multiplier),
        }
        final = nn.Identity() if likelihood == "bernoulli" else nn.Sigmoid()
        self.encoder = ConvEncoder(image_size, channels, **sizes)
        self.decoder = conv_generator(image_size, channels, final=final, **sizes)

    def reconstruction_nll(
        self, x: Tensor, z: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """-log p(x | z) in nats, (N,)."""
        del generator  # nothing random here
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return bernoulli_nll(x, output)
        return gaussian_nll(x, output, std=self.observation_std)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> mean images (N, C, H, W) in [0, 1]; call in eval mode."""
        output = self.decoder(z).float()
        return output.sigmoid() if self.likelihood == "bernoulli" else output

    def parts(self) -> Parts:
        """The decoder (logits or mean, see the class) and the encoder (mu, logvar)."""
        z = self.sample_latents()
        x = torch.rand(
            (SAMPLE_BATCH, self.channels, self.image_size, self.image_size),
            generator=torch.Generator().manual_seed(0),
        )
        return {"decoder": (self.decoder, (z,)), "encoder": (self.encoder, (x.to(z.dtype),))}
