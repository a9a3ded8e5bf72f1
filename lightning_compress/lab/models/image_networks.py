"""Networks from image to image: generators of pix2pix, and judges of patches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["PatchDiscriminator", "PatchGAN", "ResnetGenerator", "UNetGenerator"]
MAX_GROWTH = 8  # widest layer / width
SLOPE = 0.2  # of the leaky activations
INITIAL_STD = 0.02  # of all convolutions, as in the paper


def initialize(network: nn.Module) -> None:
    """Convolutions from N(0, 0.02), norms from N(1, 0.02) (appendix of the paper)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, INITIAL_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INITIAL_STD)
            nn.init.zeros_(module.bias)


class UNetGenerator(nn.Module):
    """Encoder and decoder with skip connections, down to 2 x 2 pixels.

    Isola et al. 2017, https://arxiv.org/abs/1611.07004: layers of 4 x 4 kernels and stride 2,
    leaky units on the way down, dropout in the innermost layers on the way up.

    Args:
        channels: of condition and image.
        image_size: a power of two, at least 8.
        width: channels of the first layer, doubled by each further one, up to 8 times as many.

    >>> UNetGenerator(1, 16, 8)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(self, channels: int, image_size: int, width: int) -> None:
        super().__init__()
        depth = image_size.bit_length() - 2
        if image_size < 8 or image_size != 1 << (depth + 1):
            raise ValueError(
                f"image_size={image_size}: a U-Net halves it down to 2, give a power of two of at "
                "least 8; or network='resnet'"
            )
        widths = [width * min(MAX_GROWTH, 1 << level) for level in range(depth)]
        outer, inner = [channels, *widths[:-1]], widths
        self.down = nn.ModuleList(
            self._down(a, b, first=level == 0, last=level == depth - 1)
            for level, (a, b) in enumerate(zip(outer, inner, strict=True))
        )
        self.up = nn.ModuleList(
            self._up(b if level == depth - 1 else 2 * b, a, level, depth)
            for level, (a, b) in enumerate(zip(outer, inner, strict=True))
        )
        initialize(self)

    def forward(self, condition: Tensor) -> Tensor:
        """Maps (N, channels, S, S) in [-1, 1] to the same shape and range."""
        levels = []
        x = condition
        for down in self.down:
            x = down(x)
            levels.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](x if level == len(self.up) - 1 else torch.cat([x, levels[level]], 1))
        return x

    @staticmethod
    def _down(inputs: int, outputs: int, *, first: bool, last: bool) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if not first:
            layers["activation"] = nn.LeakyReLU(SLOPE)
        layers["conv"] = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=first or last)
        if not (first or last):  # of 2 x 2 pixels and a batch of one, little is left to normalize
            layers["norm"] = nn.BatchNorm2d(outputs)
        return nn.Sequential(layers)

    @staticmethod
    def _up(inputs: int, outputs: int, level: int, depth: int) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict(activation=nn.ReLU())
        layers["conv"] = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=level == 0)
        if level == 0:
            layers["final"] = nn.Tanh()
            return nn.Sequential(layers)
        layers["norm"] = nn.BatchNorm2d(outputs)
        if level >= depth - 2:
            layers["dropout"] = nn.Dropout2d(0.5)
        return nn.Sequential(layers)


class ResnetBlock(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return x + self.body(x)


class ResnetGenerator(nn.Sequential):
    """Two halvings, residual blocks, two doublings.

    Johnson et al. 2016, https://arxiv.org/abs/1603.08155, as pix2pix's successors use it.

    Args:
        channels: of condition and image.
        image_size: a multiple of 4.
        width: channels of the first layer; four times as many in the blocks.
        blocks: how many.

    >>> ResnetGenerator(1, 12, 8, blocks=1)(torch.zeros(2, 1, 12, 12)).shape
    torch.Size([2, 1, 12, 12])
    """

    def __init__(self, channels: int, image_size: int, width: int, *, blocks: int = 6) -> None:
        if image_size % 4:
            raise ValueError(f"image_size={image_size}: a ResNet generator needs a multiple of 4")

        def layer(make: Callable[..., nn.Module], a: int, b: int, *size: int, **more: int) -> None:
            layers.extend([make(a, b, *size, bias=False, **more), nn.BatchNorm2d(b), nn.ReLU()])

        layers: list[nn.Module] = []
        layer(nn.Conv2d, channels, width, 7, padding=3)
        layer(nn.Conv2d, width, 2 * width, 3, 2, 1)
        layer(nn.Conv2d, 2 * width, 4 * width, 3, 2, 1)
        layers.extend(ResnetBlock(4 * width) for _ in range(blocks))
        layer(nn.ConvTranspose2d, 4 * width, 2 * width, 4, 2, 1)
        layer(nn.ConvTranspose2d, 2 * width, width, 4, 2, 1)
        super().__init__(*layers, nn.Conv2d(width, channels, 7, padding=3), nn.Tanh())
        initialize(self)


class PatchGAN(nn.Sequential):
    """Judges overlapping patches of a condition and an image: (N, C, S, S) -> (N, 1, s, s).

    Isola et al. 2017, https://arxiv.org/abs/1611.07004, section 3.2.2.

    Args:
        channels: of condition and image together.
        width: channels of the first layer.
        halvings: layers of stride 2.

    >>> PatchGAN(2, 8)(torch.zeros(1, 2, 32, 32)).shape
    torch.Size([1, 1, 6, 6])
    """

    def __init__(self, channels: int, width: int, *, halvings: int = 2) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        last = width
        for level in range(1, halvings + 1):
            wide = width * min(MAX_GROWTH, 1 << level)
            stride = 2 if level < halvings else 1
            layers += [nn.Conv2d(last, wide, 4, stride, 1, bias=False), nn.BatchNorm2d(wide)]
            layers.append(nn.LeakyReLU(SLOPE))
            last = wide
        super().__init__(*layers, nn.Conv2d(last, 1, 4, 1, 1))
        initialize(self)


class PatchDiscriminator(nn.Sequential):
    """Scores (N, 1, S / 4, S / 4) of the patches of images (N, channels, S, S).

    Isola et al. 2017, https://arxiv.org/abs/1611.07004; without norms, and its layers' outputs can
    be compared.

    >>> PatchDiscriminator(3, 8)(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 1, 4, 4])
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each activation, then the scores."""
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                yield x
        yield x
