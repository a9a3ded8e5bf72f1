"""Networks of HiFi-GAN: a generator of waveforms and its two families of discriminators.

Kong et al. 2020, https://arxiv.org/abs/2010.05646.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["Discriminators", "HiFiGenerator", "Judgement"]
SLOPE = 0.1  # of all leaky ReLUs
Judgement = list[tuple[Tensor, list[Tensor]]]  # of each discriminator: scores, features


class ResidualBlock(nn.Module):
    """Dilated convolutions of one kernel size, each with a residual connection (its ResBlock2)."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, padding="same", dilation=dilation))
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> (N, C, T)."""
        for conv in self.convs:
            x = x + conv(functional.leaky_relu(x, SLOPE))
        return x


class MultiReceptiveField(nn.Module):
    """Mean of residual blocks of several kernel sizes: receptive fields of several lengths."""

    def __init__(self, channels: int, kernels: Sequence[int], dilations: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, k, dilations) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> (N, C, T)."""
        total = self.blocks[0](x)
        for block in self.blocks[1:]:
            total = total + block(x)
        return total / len(self.blocks)


class HiFiGenerator(nn.Module):
    """Log-mels (N, num_mels, T) -> waveforms (N, 1, T * product of `rates`) in [-1, 1].

    Args:
        num_mels: rows of the spectrogram.
        width: channels after the first convolution, halved by each transposed one.
        rates: factors of the transposed convolutions, whose kernels are twice as long.
        kernels: of the multi-receptive fields.
        dilations: of each of their blocks.

    >>> HiFiGenerator(40, width=32, rates=(4, 4, 4))(torch.zeros(2, 40, 8)).shape
    torch.Size([2, 1, 512])
    """

    def __init__(
        self,
        num_mels: int,
        *,
        width: int,
        rates: Sequence[int],
        kernels: Sequence[int] = (3, 5, 7),
        dilations: Sequence[int] = (1, 3),
    ) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(num_mels, width, 7, padding=3))
        self.ups, self.fields = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            up = nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, (rate + 1) // 2)
            up.output_padding = (rate % 2,)  # the length is exactly `rate` times the input's
            # dim=1: one norm an output channel, as the convolutions have; int8 products need that
            self.ups.append(weight_norm(up, dim=1))
            width //= 2
            self.fields.append(MultiReceptiveField(width, kernels, dilations))
        self.last = weight_norm(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mels (N, num_mels, T) -> waveforms (N, 1, L)."""
        x = self.first(mel)
        for up, field in zip(self.ups, self.fields, strict=True):
            x = field(up(functional.leaky_relu(x, SLOPE)))
        return torch.tanh(self.last(functional.leaky_relu(x, SLOPE)))


class PeriodDiscriminator(nn.Module):
    """Judges every p-th sample together: the waveform as an image (L / p, p), kernels (5, 1)."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, width, 2 * width, 4 * width, 4 * width]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)))
            for a, b in itertools.pairwise(sizes)
        )
        self.score = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Waveforms (N, 1, L) -> scores (N, S), features of all layers."""
        x = functional.pad(x, (0, -x.shape[2] % self.period), mode="reflect")
        return _judge(self, x.unflatten(2, (-1, self.period)))


class ScaleDiscriminator(nn.Module):
    """Judges the waveform averaged over `scale` samples, by strided grouped convolutions."""

    def __init__(self, scale: int, width: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(2 * scale, scale, scale // 2) if scale > 1 else nn.Identity()
        sizes, groups = [1, width, 2 * width, 4 * width, 4 * width], (1, 4, 4, 4)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 15, stride, padding=7, groups=g))
            for a, b, g, stride in zip(sizes, sizes[1:], groups, (1, 4, 4, 4), strict=False)
        )
        self.score = weight_norm(nn.Conv1d(sizes[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Waveforms (N, 1, L) -> scores (N, S), features of all layers."""
        return _judge(self, self.pool(x))


def _judge(
    network: PeriodDiscriminator | ScaleDiscriminator, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    features: list[Tensor] = []
    for conv in network.convs:
        x = functional.leaky_relu(conv(x), SLOPE)
        features.append(x)
    return network.score(x).flatten(1), features


class Discriminators(nn.Module):
    """The multi-period and the multi-scale discriminator.

    Args:
        width: channels of each one's first layer.
        periods: prime, so that they overlap least.
        scales: factors of the average pooling.
    """

    def __init__(
        self, width: int, periods: Sequence[int] = (2, 3, 5, 7, 11), scales: Sequence[int] = (1, 2)
    ) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            [
                *(PeriodDiscriminator(period, width) for period in periods),
                *(ScaleDiscriminator(scale, width) for scale in scales),
            ]
        )

    def forward(self, x: Tensor) -> Judgement:
        """Waveforms (N, 1, L) -> scores and features of each discriminator."""
        return [one(x) for one in self.each]
