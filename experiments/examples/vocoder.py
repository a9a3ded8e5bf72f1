"""A HiFi-GAN-like vocoder in plain Lightning (Kong et al. 2020, arXiv:2010.05646), compressed.

Lines marked (*) are the compression. python experiments/examples/vocoder.py [epochs [folder]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import l1_loss, leaky_relu
from torch.nn.utils import weight_norm  # as all vocoders have it  # pyright: ignore[reportDeprecated]
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (  # (*)  # (*)
    GradualPruning,
    QuantizationAwareTraining,
    save_compressed,
    sparsity,
)

BANDS, HOP = 16, 16


class Residual(nn.Module):
    """Dilated convolutions (N, width, T)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv1d(width, width, 3, padding=gap, dilation=gap) for gap in (1, 3)]
        self.convs = nn.ModuleList(map(weight_norm, convs))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        for conv in self.convs:
            x = x + conv(leaky_relu(x, 0.1))
        return x


class Vocoder(LightningModule):
    """Spectra (N, 16, T) to waves (N, 1, 16 T)."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        layers: list[nn.Module] = [weight_norm(nn.Conv1d(BANDS, 32, 7, padding=3))]
        for wide in (32, 16):
            up = weight_norm(nn.ConvTranspose1d(wide, wide // 2, 8, 4, 2))
            layers += [nn.LeakyReLU(0.1), up, Residual(wide // 2)]
        last = weight_norm(nn.Conv1d(8, 1, 7, padding=3))
        self.generator = nn.Sequential(*layers, nn.LeakyReLU(0.1), last, nn.Tanh())
        judge = [weight_norm(nn.Conv1d(*sizes, 15, 4, padding=7)) for sizes in ((1, 16), (16, 1))]
        self.msd = nn.Sequential(judge[0], nn.LeakyReLU(0.1), judge[1])  # no callback touches it

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """A step of the judge, one of the generator: least squares, and the spectrum."""
        (wave,) = batch
        g_optimizer, d_optimizer = self.optimizers()  # type: ignore[misc]
        fake = self.generator(spectrum(wave))
        d_loss = (self.msd(wave) - 1).square().mean() + self.msd(fake.detach()).square().mean()
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        g_loss = (self.msd(fake) - 1).square().mean()
        g_optimizer.zero_grad()
        self.manual_backward(g_loss + 45 * l1_loss(spectrum(fake), spectrum(wave)))
        g_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each network."""
        return [torch.optim.AdamW(one.parameters(), 2e-3) for one in (self.generator, self.msd)]


def spectrum(wave: Tensor) -> Tensor:
    """Log magnitudes (N, 16, T) of waves (N, 1, 16 T)."""
    window = torch.hann_window(2 * BANDS, device=wave.device)
    found = torch.stft(wave[:, 0], 2 * BANDS, HOP, window=window, return_complex=True)
    return found.abs().clamp(min=1e-3)[:, :BANDS, : wave.shape[-1] // HOP].log()


def main(epochs: int, folder: Path) -> None:
    """Two tones of random pitch a wave; the generator is pruned and quantized as it learns."""
    seed_everything(0, verbose=False)
    pitch = torch.rand(256, 2, 1) * 0.5 + 0.02
    waves = torch.sin(pitch * torch.arange(512)).mean(1, keepdim=True)
    train = DataLoader(TensorDataset(waves), batch_size=32, shuffle=True)
    compression = [GradualPruning(final_sparsity=0.8), QuantizationAwareTraining()]  # (*)
    model, options = Vocoder(), {"default_root_dir": folder, "log_every_n_steps": 4}
    Trainer(max_epochs=epochs, callbacks=compression, **options).fit(model, train)  # (*)
    info = save_compressed(model.generator, folder / "vocoder.lcz")  # (*)
    print(f"zeros: generator {sparsity(model.generator):.1%}, msd {sparsity(model.msd):.1%}")
    print(f"vocoder.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 30)), Path(given.get(2, "outputs/vocoder")))
