"""Convolutional networks as plain modules: no Lightning, no in-place layers, ready for export.

Strides are 2 and kernels 4, so that a size `base * 2^k` (base 4 to 7) meets the base after k
layers and a transposed convolution's kernel divides by its stride. A layer at full resolution
would have `width` channels; each halving of the resolution doubles them, up to 8 times `width`.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as spectral_norm_of
from torchvision.models.resnet import BasicBlock

__all__ = [
    "ConvEncoder",
    "ResNet18Network",
    "conv_discriminator",
    "conv_generator",
    "initialize_dcgan",
    "simple_network",
    "split_image_size",
]

SMALLEST_BASE, LARGEST_BASE = 4, 7
MAX_GROWTH = 8  # widest layer / width


def split_image_size(image_size: int) -> tuple[int, int]:
    """Write a size as `base * 2^k` with base 4 to 7 and k of at least 1; return (base, k).

    >>> [split_image_size(size) for size in (16, 28, 32, 64)]
    [(4, 2), (7, 2), (4, 3), (4, 4)]

    Raises:
        ValueError: for other sizes, with the nearest valid ones.
    """
    base, stages = image_size, 0
    while base > LARGEST_BASE and base % 2 == 0:
        base, stages = base // 2, stages + 1
    if stages and SMALLEST_BASE <= base <= LARGEST_BASE:
        return base, stages
    raise ValueError(
        f"image_size={image_size} is not base * 2^k with base 4 to 7 and k >= 1; "
        f"nearest valid sizes: {', '.join(map(str, _nearest_sizes(image_size)))}"
    )


def _nearest_sizes(image_size: int) -> list[int]:
    exponents = range(1, max(2, image_size.bit_length()))
    sizes = [base << k for k in exponents for base in range(SMALLEST_BASE, LARGEST_BASE + 1)]
    below = [size for size in sizes if size < image_size]
    above = [size for size in sizes if size > image_size]
    return [*below[-1:], *above[:1]]


def _channels(width: int, stages: int) -> list[int]:
    """Channels from the base resolution up to half of the full one."""
    return [width * min(2**k, MAX_GROWTH) for k in range(stages, 0, -1)]


def conv_generator(
    image_size: int, channels: int, *, latent_dim: int, width: int, final: nn.Module
) -> nn.Sequential:
    """Latents (N, latent_dim) -> image (N, channels, image_size, image_size), as in DCGAN.

    Radford et al. 2016, https://arxiv.org/abs/1511.06434. `final` is the last activation.

    >>> import torch
    >>> net = conv_generator(16, 1, latent_dim=4, width=8, final=nn.Tanh())
    >>> net(torch.zeros(2, 4)).shape
    torch.Size([2, 1, 16, 16])
    """
    base, stages = split_image_size(image_size)
    widths = _channels(width, stages)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["project"] = nn.Linear(latent_dim, widths[0] * base**2, bias=False)
    layers["unflatten"] = nn.Unflatten(1, (-1, base, base))  # -1: channels may be removed later
    for i, (wide, narrow) in enumerate(zip(widths, [*widths[1:], channels], strict=True)):
        layers[f"norm{i}"] = nn.BatchNorm2d(wide)
        layers[f"relu{i}"] = nn.ReLU()
        # BatchNorm brings the bias of every layer but the last.
        layers[f"up{i + 1}"] = nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=i + 1 == stages)
    layers["final"] = final
    return nn.Sequential(layers)


def conv_discriminator(
    image_size: int, channels: int, *, width: int, spectral_norm: bool = False
) -> nn.Sequential:
    """Image (N, C, H, W) in [-1, 1] -> score (N,), the generator's mirror without BatchNorm.

    No layer mixes examples, so the score of an image does not depend on its batch: a gradient
    penalty needs that, and scores on held-out images can be compared. `spectral_norm` is
    Miyato et al. 2018, https://arxiv.org/abs/1802.05957.
    """
    base, stages = split_image_size(image_size)
    widths = [channels, *reversed(_channels(width, stages))]
    wrap = spectral_norm_of if spectral_norm else _identity
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(stages):
        layers[f"down{i + 1}"] = wrap(nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1))
        layers[f"relu{i + 1}"] = nn.LeakyReLU(0.2)
    layers["flatten"] = nn.Flatten()
    layers["score"] = wrap(nn.Linear(widths[-1] * base**2, 1))
    layers["squeeze"] = nn.Flatten(0)
    return nn.Sequential(layers)


def initialize_dcgan(network: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers from N(0, 0.02^2), as in DCGAN.

    Without it the discriminator wins within a few epochs. Weights under spectral_norm stay.
    """
    for layer in network.modules():
        drawn = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        if drawn and not parametrize.is_parametrized(layer):
            nn.init.normal_(layer.weight, std=0.02)


def _identity(layer: nn.Module) -> nn.Module:
    return layer


class ConvEncoder(nn.Module):
    """Image (N, C, H, W) -> (mu, logvar) of a diagonal normal, each (N, latent_dim)."""

    def __init__(self, image_size: int, channels: int, *, latent_dim: int, width: int) -> None:
        super().__init__()
        base, stages = split_image_size(image_size)
        widths = [channels, *reversed(_channels(width, stages))]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(stages):
            layers[f"down{i + 1}"] = nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1, bias=False)
            layers[f"norm{i + 1}"] = nn.BatchNorm2d(widths[i + 1])
            layers[f"relu{i + 1}"] = nn.ReLU()
        layers["flatten"] = nn.Flatten()
        layers["hidden"] = nn.Linear(widths[-1] * base**2, 2 * width)
        layers["relu"] = nn.ReLU()
        self.body = nn.Sequential(layers)
        self.mu = nn.Linear(2 * width, latent_dim)
        self.logvar = nn.Linear(2 * width, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar)."""
        hidden = self.body(x)
        return self.mu(hidden), self.logvar(hidden)


def simple_network(image_size: int, channels: int, *, num_classes: int, width: int) -> nn.Module:
    """Image (N, C, H, W) -> logits (N, num_classes): two convolutions and two linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, width, 3, padding=1)
    layers["relu1"] = nn.ReLU()
    layers["pool1"] = nn.MaxPool2d(2)
    layers["conv2"] = nn.Conv2d(width, 2 * width, 3, padding=1)
    layers["relu2"] = nn.ReLU()
    layers["pool2"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(2 * width * (image_size // 4) ** 2, 4 * width)
    layers["relu3"] = nn.ReLU()
    layers["logits"] = nn.Linear(4 * width, num_classes)
    return nn.Sequential(layers)


class ResNet18Network(nn.Module):
    """torchvision's ResNet-18 with a free width, image channels and stem.

    Its blocks, names and initial values are torchvision's, so that at width 64 with the large
    stem a torchvision `state_dict` loads. He et al. 2016, https://arxiv.org/abs/1512.03385.

    Args:
        channels: channels of the image.
        num_classes: number of logits.
        width: channels of the first of the four layers; the last has eight times as many.
        small: a 3x3 stem without max-pool, for images under 64 pixels.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int, small: bool) -> None:
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = _residual_layer(width, width, stride=1)
        self.layer2 = _residual_layer(width, 2 * width, stride=2)
        self.layer3 = _residual_layer(2 * width, 4 * width, stride=2)
        self.layer4 = _residual_layer(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.ReLU):
                module.inplace = False  # in place it exports a slow ScatterND

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) -> logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _residual_layer(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
    )
