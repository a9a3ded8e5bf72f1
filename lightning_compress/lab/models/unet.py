"""U-Net over images and times: residual blocks with GroupNorm, self-attention at the bottom."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResidualBlock", "SelfAttention", "TimeUNet", "time_features"]
GROUPS = 8  # of each GroupNorm; widths are multiples of it
FASTEST = 1000.0  # the fastest sine of the time features, in radians over t from 0 to 1


def time_features(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of times (N,) in [0, 1], (N, size), as positions in a transformer.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.

    >>> time_features(torch.zeros(1), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    exponents = torch.arange(size // 2, device=t.device, dtype=t.dtype) / max(size // 2 - 1, 1)
    angles = t[:, None] * (math.log(FASTEST) * exponents).exp()
    return torch.cat([angles.sin(), angles.cos()], 1)


class ResidualBlock(nn.Module):
    """Two convolutions behind GroupNorm and SiLU; a time, if there is one, is added between them.

    Args:
        inputs: channels, a multiple of 8.
        outputs: channels, a multiple of 8.
        embedding: size of the embedded time; 0: there is none.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inputs), nn.GroupNorm(GROUPS, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs) if embedding else None
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Maps (N, inputs, H, W) and embedded times (N, embedding) -> (N, outputs, H, W)."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        if self.time is not None:
            hidden = hidden + self.time(embedded)[:, :, None, None]
        return self.skip(x) + self.conv2(functional.silu(self.norm2(hidden)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of a map, added to it.

    Args:
        width: channels of the map.
        heads: a divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.to_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> the same shape."""
        normed, (height, width) = self.norm(x), x.shape[2:]
        query, key, value = (
            self._heads(layer(normed)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return x + self.to_out(attended.transpose(2, 3).reshape(x.shape[0], -1, height, width))

    def _heads(self, maps: Tensor) -> Tensor:
        """(N, heads * E, H, W) -> (N, heads, H * W, E)."""
        each = maps.shape[1] // self.num_heads
        return maps.reshape(maps.shape[0], self.num_heads, each, -1).transpose(2, 3)


class TimeUNet(nn.Module):
    """U-Net of a vector field: noisy images and their times -> maps in the images' shape.

    Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, with the residual blocks and the
    attention of diffusion models: Ho et al. 2020, https://arxiv.org/abs/2006.11239. The width
    doubles with the first halving of the resolution, and stays.

    Args:
        channels: of the images.
        width: channels at full resolution, a multiple of 8.
        levels: resolutions; the image's sides divide by `2 ** (levels - 1)`.
        heads: of the attention at the lowest resolution, a divisor of its width.

    >>> TimeUNet(1, width=8, levels=2, heads=2)(torch.zeros(3, 1, 8, 8), torch.rand(3)).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(self, channels: int, *, width: int, levels: int, heads: int) -> None:
        super().__init__()
        widths = [width, *[2 * width] * (levels - 1)]
        embedding = 4 * width
        self.features = 2 * width  # of the time
        self.embed = nn.Sequential(
            nn.Linear(self.features, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.halve = nn.ModuleList(), nn.ModuleList()
        self.up, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for i, wide in enumerate(widths):
            self.down.append(ResidualBlock(widths[max(i - 1, 0)], wide, embedding))
            self.up.insert(0, ResidualBlock(2 * wide, widths[max(i - 1, 0)], embedding))
            if i + 1 < levels:
                self.halve.append(nn.Conv2d(wide, wide, 3, 2, 1))
                self.enlarge.insert(0, nn.Conv2d(wide, wide, 3, padding=1))
        self.middle1 = ResidualBlock(widths[-1], widths[-1], embedding)
        self.attention = SelfAttention(widths[-1], heads)
        self.middle2 = ResidualBlock(widths[-1], widths[-1], embedding)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # begins at the mean of all fields

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Images (N, C, H, W) and times (N,) in [0, 1] -> (N, C, H, W)."""
        embedded = functional.silu(self.embed(time_features(t, self.features)))
        x, skips = self.first(x), []
        for i, block in enumerate(self.down):
            x = block(x, embedded)
            skips.append(x)
            if i < len(self.halve):
                x = self.halve[i](x)
        x = self.middle2(self.attention(self.middle1(x, embedded)), embedded)
        for i, block in enumerate(self.up):
            x = block(torch.cat([x, skips.pop()], 1), embedded)
            if i < len(self.enlarge):
                x = self.enlarge[i](functional.interpolate(x, scale_factor=2.0))
        return self.last(functional.silu(self.norm(x)))
