"""Rows of the compatibility table whose projects are no packages: models of their structure."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu, linear, mse_loss
from torch.nn.utils import spectral_norm, weight_norm

from shared.compat_case import OWN, Adversarial, Case, Project, batches_like

__all__ = ["own_cases"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Mean KL divergence from N(0, I), nats a unit."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


def drawn(mu: Tensor, logvar: Tensor) -> Tensor:
    """A sample of the posterior."""
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()


class ConvVAE(nn.Module):
    """PyTorch-VAE's vanilla model: all layers in one network, called through its methods."""

    def __init__(self) -> None:
        super().__init__()

        def down(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU())

        def up(a: int, b: int) -> nn.Sequential:
            deconv = nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1)
            return nn.Sequential(deconv, nn.BatchNorm2d(b), nn.LeakyReLU())

        self.encoder = nn.Sequential(down(3, 16), down(16, 32))
        self.fc_mu, self.fc_var = nn.Linear(512, 16), nn.Linear(512, 16)
        self.decoder_input = nn.Linear(16, 512)
        self.decoder = nn.Sequential(up(32, 16))
        self.final_layer = nn.Sequential(up(16, 16), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh())

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, 16) to images."""
        return self.final_layer(self.decoder(self.decoder_input(z).view(-1, 32, 4, 4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, 16, 16) to reconstruction, mean and log variance."""
        h = self.encoder(x).flatten(1)
        mu, logvar = self.fc_mu(h), self.fc_var(h)
        return self.decode(drawn(mu, logvar)), mu, logvar


class DenseVAE(nn.Module):
    """An MLP, as most VAEs for MNIST that one finds: fc1 to fc4."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(196, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.fc3, self.fc4 = nn.Linear(8, 64), nn.Linear(64, 196)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, 8) to pixels (N, 196)."""
        return self.fc4(self.fc3(z).relu()).sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to reconstruction, mean and log variance."""
        h = self.fc1(x).relu()
        mu, logvar = self.fc21(h), self.fc22(h)
        return self.decode(drawn(mu, logvar)), mu, logvar


class Decode(nn.Module):
    """The method `decode` of a model as a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        """What the method gives."""
        return self.model.decode(z)


def vae_loss(self: Any, batch: Any) -> Tensor:
    """Squared error and a tenth of the divergence."""
    recon, mu, logvar = self.model(batch[0])
    return mse_loss(recon, batch[0]) + 0.1 * kl(mu, logvar)


class Equalized(nn.Conv2d):
    """PGAN's convolution: standard normal weights, scaled at run time."""

    def __init__(self, *sizes: int, padding: int = 0) -> None:
        super().__init__(*sizes, padding=padding)
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As the convolution."""
        scale = (2 / self.weight[0].numel()) ** 0.5
        return self._conv_forward(input, self.weight * scale, self.bias)


class PixelNorm(nn.Module):
    """Each pixel's channels at unit length."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def pgan() -> nn.Module:
    """Latents (N, 16, 1, 1) to images (N, 3, 16, 16)."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [
            nn.Upsample(scale_factor=2),
            Equalized(a, b, 3, padding=1),
            nn.LeakyReLU(0.2),
            PixelNorm(),
        ]

    first = [PixelNorm(), nn.ConvTranspose2d(16, 32, 4), nn.LeakyReLU(0.2), PixelNorm()]
    return nn.Sequential(*first, *block(32, 32), *block(32, 16), Equalized(16, 3, 1))


class Residual(nn.Module):
    """SN-GAN's block of a generator."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, padding=1)
        self.skip, self.up = nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        """Twice as large."""
        h = self.conv1(self.up(self.norm1(x).relu()))
        return self.conv2(self.norm2(h).relu()) + self.skip(self.up(x))


def sngan() -> nn.Module:
    """Latents (N, 16) to images (N, 3, 16, 16)."""
    first = [nn.Linear(16, 512), nn.Unflatten(1, (32, 4, 4))]
    last = [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*first, Residual(32, 32), Residual(32, 16), *last)


class EqualLinear(nn.Module):
    """StyleGAN2's linear layer: a raw parameter."""

    def __init__(self, a: int, b: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(b, a)),
            nn.Parameter(torch.full((b,), bias)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, a) to (N, b)."""
        return linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class Modulated(nn.Module):
    """StyleGAN2's modulated convolution: a raw parameter, scaled by each sample's style."""

    def __init__(self, a: int, b: int, style: int) -> None:
        super().__init__()
        self.weight, self.modulation = (
            nn.Parameter(torch.randn(1, b, a, 3, 3)),
            EqualLinear(style, a, 1.0),
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(N, a, H, W) to (N, b, H, W)."""
        n, a, height, width = x.shape
        weight = self.weight * (a * 9) ** -0.5 * self.modulation(style).view(n, 1, a, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        b = weight.shape[1]
        out = conv2d(
            x.reshape(1, n * a, height, width), weight.view(n * b, a, 3, 3), padding=1, groups=n
        )
        return out.view(n, b, height, width)


class StyleGAN2(nn.Module):
    """Latents (N, 16) to images (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(EqualLinear(16, 32), nn.LeakyReLU(0.2), EqualLinear(32, 32))
        self.constant = nn.Parameter(torch.randn(1, 32, 4, 4))
        self.conv1, self.conv2 = Modulated(32, 32, 32), Modulated(32, 16, 32)
        self.up, self.to_rgb = nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images."""
        style = self.mapping(z)
        x = leaky_relu(self.conv1(self.constant.expand(z.shape[0], -1, -1, -1), style), 0.2)
        return self.to_rgb(leaky_relu(self.conv2(self.up(x), style), 0.2))


class UNet(nn.Module):
    """pix2pix's generator: skips are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 16, 4, 2, 1)
        self.down2 = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32)
        )
        self.up2 = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.Dropout(0.5)
        )
        self.up1 = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 16, 16) to images."""
        a = self.down1(x)
        return self.up1(torch.cat([a, self.up2(self.down2(a))], dim=1))


class ResnetBlock(nn.Module):
    """CycleGAN's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(
            *conv,
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.conv_block(x)


def cyclegan() -> nn.Module:
    """Images (N, 3, 16, 16) to images."""
    first = [nn.ReflectionPad2d(3), nn.Conv2d(3, 16, 7), nn.InstanceNorm2d(16), nn.ReLU()]
    down = [nn.Conv2d(16, 32, 3, 2, 1), nn.InstanceNorm2d(32), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(16), nn.ReLU()]
    last = [nn.ReflectionPad2d(3), nn.Conv2d(16, 3, 7), nn.Tanh()]
    return nn.Sequential(*first, *down, ResnetBlock(32), ResnetBlock(32), *up, *last)


class HiFiGAN(nn.Module):
    """Spectra (N, 16, T) to waves (N, 1, 16 T), with the older weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(16, 32, 7, padding=3))
        widths = ((32, 16), (16, 8))
        self.ups = nn.ModuleList(weight_norm(nn.ConvTranspose1d(a, b, 8, 4, 2)) for a, b in widths)
        self.resblocks = nn.ModuleList(example("vocoder").Residual(b) for _, b in widths)
        self.conv_post = weight_norm(nn.Conv1d(8, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        """Waves."""
        x = self.conv_pre(x)
        for up, block in zip(self.ups, self.resblocks, strict=True):
            x = block(up(leaky_relu(x, 0.1)))
        return self.conv_post(leaky_relu(x, 0.1)).tanh()


def judge(channels: int = 3, wrap: Any = lambda layer: layer) -> nn.Module:
    """Of images."""
    convs = [
        wrap(nn.Conv2d(channels, 16, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        wrap(nn.Conv2d(16, 1, 4, 2, 1)),
    ]
    return nn.Sequential(*convs)


def wave_judge() -> nn.Module:
    """Of waves."""
    return nn.Sequential(
        weight_norm(nn.Conv1d(1, 16, 15, 4, 7)),
        nn.LeakyReLU(0.1),
        weight_norm(nn.Conv1d(16, 1, 3, padding=1)),
    )


def gan(name: str, network: Any, judged: Any, z: tuple[int, ...], size: int) -> Case:
    """A generator from latents."""

    def generate(self: Any, batch: Any) -> list[tuple[Tensor, Tensor]]:
        return [(self.generator(batch[1]), batch[0])]

    return Case(
        name,
        OWN,
        lambda: Adversarial(generate, {"generator": network()}, {"discriminator": judged()}),
        lambda model: (model.generator, (torch.randn(4, *z),)),
        batches_like((8, 3, size, size), (8, *z)),
        ("discriminator",),
    )


def example(name: str) -> Any:
    """The module of a whole example."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return import_module(name)


def plain_vae() -> Any:
    """The example's own model."""
    return example("plain_vae").PlainVAE()


def own_cases() -> list[Case]:
    """All of them."""
    images = batches_like((8, 3, 16, 16))
    pixels = lambda: [(x.abs(),) for (x,) in batches_like((16, 196))()]  # noqa: E731
    pairs = batches_like((4, 3, 16, 16), (4, 3, 16, 16))

    def paired(self: Any, batch: Any) -> list[tuple[Tensor, Tensor]]:
        a, b = batch
        return [(torch.cat([a, self.netG(a)], 1), torch.cat([a, b], 1))]

    def cycle(self: Any, batch: Any) -> list[tuple[Tensor, Tensor]]:
        a, b = batch
        return [(self.netG_B(b), a), (self.netG_A(a), b)]

    def sound(self: Any, batch: Any) -> list[tuple[Tensor, Tensor]]:
        fake = self.generator(batch[0])
        return [(fake, batch[1]), (fake, batch[1])]

    def classify(self: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[0].abs().argmax(1) % 10)

    dense = lambda a, b: [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]  # noqa: E731
    return [
        Case(
            "PyTorch-VAE",
            OWN,
            lambda: Project(vae_loss, model=ConvVAE()),
            lambda one: (Decode(one.model), (torch.randn(4, 16),)),
            images,
        ),
        Case(
            "pretrained MNIST VAE",
            OWN,
            lambda: Project(vae_loss, model=DenseVAE()),
            lambda one: (Decode(one.model), (torch.randn(4, 8),)),
            pixels,
        ),
        Case(
            "lightning-hydra-template",
            OWN,
            lambda: Project(
                classify,
                net=nn.Sequential(
                    *dense(196, 64), *dense(64, 128), *dense(128, 64), nn.Linear(64, 10)
                ),
            ),
            lambda one: (one.net, (torch.randn(4, 196),)),
            pixels,
        ),
        Case(
            "LightningCLI",
            "experiments/examples/lightning_cli.py",
            plain_vae,
            lambda one: (one.decoder, (torch.randn(4, 8),)),
            lambda: [(x.abs(),) for (x,) in batches_like((8, 1, 8, 8))()],
        ),
        gan("PGAN", pgan, judge, (16, 1, 1), 16),
        gan("SN-GAN", sngan, lambda: judge(wrap=spectral_norm), (16,), 16),
        replace(gan("StyleGAN2", StyleGAN2, judge, (16,), 8), batch=4),
        Case(
            "HiFi-GAN",
            OWN,
            lambda: Adversarial(
                sound, {"generator": HiFiGAN()}, {"mpd": wave_judge(), "msd": wave_judge()}
            ),
            lambda one: (one.generator, (torch.randn(2, 16, 8),)),
            batches_like((4, 16, 16), (4, 1, 256)),
            ("mpd", "msd"),
        ),
        Case(
            "pix2pix generator",
            OWN,
            lambda: Adversarial(paired, {"netG": UNet()}, {"netD": judge(6)}),
            lambda one: (one.netG, (torch.randn(2, 3, 16, 16),)),
            pairs,
            ("netD",),
        ),
        Case(
            "CycleGAN generators",
            OWN,
            lambda: Adversarial(
                cycle,
                {"netG_A": cyclegan(), "netG_B": cyclegan()},
                {"netD_A": judge(), "netD_B": judge()},
            ),
            lambda one: (one.netG_A, (torch.randn(2, 3, 16, 16),)),
            pairs,
            ("netD_A", "netD_B"),
        ),
    ]
