"""Vocoder: speech from log-mel spectrograms, trained as HiFi-GAN is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.lab.audio import log_mel, stft_distance
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    AdversarialModel,
    ConditionalModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.hifi_gan import Discriminators, HiFiGenerator, Judgement

__all__ = ["Vocoder", "discriminator_loss", "feature_matching_loss", "generator_loss"]
MEL_WEIGHT, FEATURE_WEIGHT = 45.0, 2.0  # the paper's lambda_mel and lambda_fm


def discriminator_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Least-squares loss of all discriminators (equation 1 of the paper)."""
    losses = [
        (1 - r).square().mean() + f.square().mean()
        for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).sum()


def generator_loss(fake: Judgement) -> Tensor:
    """Least-squares loss of the generator (equation 2)."""
    return torch.stack([(1 - scores).square().mean() for scores, _ in fake]).sum()


def feature_matching_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Mean absolute difference of each layer's features, summed (equation 4)."""
    losses = [
        (a.detach() - b).abs().mean()
        for (_, ours), (_, theirs) in zip(real, fake, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(losses).sum()


class Vocoder(AdversarialModel, ConditionalModel):
    """HiFi-GAN: log-mels -> waveforms, judged by period and scale, and by their log-mels.

    Kong et al. 2020, https://arxiv.org/abs/2010.05646. Logs `train/d_loss`, `train/g_loss`,
    `train/mel_loss` and `val/mel_loss`.

    Args:
        sample_rate: in Hz; like the next four from the data when the app builds the model.
        n_fft: size of the spectrogram's Fourier transform.
        hop_length: samples between two frames; the product of `rates`.
        num_mels: rows of the spectrogram.
        segment: samples of a training waveform.
        width: channels after the generator's first convolution, halved by each upsampling.
        rates: upsampling factors.
        discriminator_width: channels of each discriminator's first layer, a multiple of 4.
        lr: learning rate of both optimizers, which falls by a cosine to a tenth.
        betas: AdamW's momenta.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, and rates whose product is not the hop.

    >>> model = Vocoder(sample_rate=8000, n_fft=64, hop_length=16, num_mels=8, segment=512,
    ...                 width=16, rates=(4, 4), discriminator_width=4)
    >>> model.outputs(torch.zeros(3, 8, 32)).shape
    torch.Size([3, 1, 512])
    """

    deployed: ClassVar = ("generator",)
    data_kinds: ClassVar = ("audio",)
    quality_metric: ClassVar = "mel_distance"

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        hop_length: int,
        num_mels: int,
        segment: int,
        width: int = 128,
        rates: Sequence[int] = (4, 4, 4),
        discriminator_width: int = 16,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.8, 0.99),
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        rates = tuple(check_count("rates", int(rate), least=2) for rate in rates)
        if prod(rates) != check_count("hop_length", hop_length):
            raise ValueError(f"rates={rates} multiply to {prod(rates)}, hop_length={hop_length}")
        wide = scaled_width(width, width_multiplier)
        if wide % 2 ** len(rates):
            raise ValueError(f"width={wide} cannot be halved by each of {len(rates)} rates")
        if check_count("discriminator_width", discriminator_width) % 4:
            raise ValueError(f"discriminator_width={discriminator_width}: expected a multiple of 4")
        check_range("lr", lr, 0)
        betas = (float(betas[0]), float(betas[1]))  # plain, also when a config gave a list
        self.save_hyperparameters()
        self.spectrum = {
            "sample_rate": check_count("sample_rate", sample_rate),
            "n_fft": check_count("n_fft", n_fft),
            "hop_length": hop_length,
            "num_mels": check_count("num_mels", num_mels),
        }
        self.segment = check_count("segment", segment)
        self.generator = HiFiGenerator(num_mels, width=wide, rates=rates)
        self.discriminators = Discriminators(discriminator_width)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mels (N, num_mels, T) -> waveforms (N, 1, T * hop_length) in [-1, 1]."""
        return self.generator(mel)

    def outputs(self, condition: Tensor) -> Tensor:
        """Log-mels (N, num_mels, T) -> waveforms (N, 1, T * hop_length) in [-1, 1]."""
        return self.generator(condition)

    def distances(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean absolute difference of log-mels, and the multi-resolution STFT distance."""
        parts = list(zip(outputs.split(256), targets.split(256), strict=True))
        means = {
            "mel_distance": [float(self._mel_loss(*part)) for part in parts],
            "stft_distance": [float(stft_distance(*part)) for part in parts],
        }
        rows = torch.tensor([len(part) for part, _ in parts]) / len(outputs)
        return {name: float(torch.tensor(each) @ rows) for name, each in means.items()}

    def parts(self) -> Parts:
        """The generator, log-mels of a segment -> waveforms."""
        noise = torch.Generator().manual_seed(0)
        frames = self.segment // self.spectrum["hop_length"]
        mel = torch.randn(SAMPLE_BATCH, self.spectrum["num_mels"], frames, generator=noise)
        return {"generator": (self.generator, ((2 * mel - 5).to(self.dtype),))}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """One step of the discriminators, then one of the generator."""
        mel, real = batch
        generator, discriminator = self._both_optimizers()
        fake = self.generator(mel)
        with self._only(discriminator):
            judged = (self.discriminators(waves) for waves in (real, fake.detach()))
            d_loss = discriminator_loss(*judged)
            self._update(discriminator, d_loss)
        with self._only(generator):
            scores, mel_loss = self.discriminators(fake), self._mel_loss(fake, real)
            with torch.no_grad():
                features = self.discriminators(real)
            matching = feature_matching_loss(features, scores)
            g_loss = generator_loss(scores) + FEATURE_WEIGHT * matching
            self._update(generator, g_loss + MEL_WEIGHT * mel_loss)
        logs = {"train/d_loss": d_loss, "train/g_loss": g_loss, "train/mel_loss": mel_loss}
        self.log_dict({k: v.detach() for k, v in logs.items()}, batch_size=len(mel), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Log `val/mel_loss`."""
        loss = self._mel_loss(self.generator(batch[0]), batch[1])
        self.log("val/mel_loss", loss, batch_size=len(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the generator, AdamW for the discriminators, in this order."""
        return self._in_turn(torch.optim.AdamW, self.generator, self.discriminators)

    def _mel_loss(self, made: Tensor, real: Tensor) -> Tensor:
        """Mean absolute difference of log-mels (equation 3)."""
        return functional.l1_loss(log_mel(made, **self.spectrum), log_mel(real, **self.spectrum))
