"""A plain user's GAN on scikit-learn's digits, with compression added: the lines marked (*).

python experiments/examples/plain_gan.py [epochs [folder]]
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (  # (*)
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
    save_compressed,
    sparsity,
)

LATENT = 16


class PlainGAN(LightningModule):
    """Images (N, 1, 8, 8) in [-1, 1]; Goodfellow et al. 2014, arXiv:1406.2661."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(LATENT, width * 16),
            nn.BatchNorm1d(width * 16),
            nn.ReLU(),
            nn.Unflatten(1, (width, 4, 4)),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(width * 16, 1),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """A step of the discriminator, one of the generator."""
        g_optimizer, d_optimizer = self.optimizers()  # type: ignore[misc]
        fake = self.generator(torch.randn(len(batch[0]), LATENT, device=self.device))
        real_score, fake_score = self.discriminator(batch[0]), self.discriminator(fake.detach())
        d_loss = (softplus(-real_score) + softplus(fake_score)).mean()
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        g_loss = softplus(-self.discriminator(fake)).mean()
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()
        self.log_dict({"d": d_loss, "g": g_loss}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each network."""
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(one.parameters(), lr=1e-3, betas=(0.5, 0.99)) for one in networks]


def trained(model: PlainGAN, epochs: int, folder: Path, callbacks: list) -> PlainGAN:
    """The model after some epochs."""
    rows, _ = load_digits(return_X_y=True)
    images = torch.tensor(rows, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    train = DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True)
    Trainer(
        max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, log_every_n_steps=10
    ).fit(model, train)
    return model


def main(epochs: int, folder: Path) -> None:
    """A dense GAN first; then it teaches its own copy, which is pruned and quantized."""
    seed_everything(0, verbose=False)
    model = trained(PlainGAN(), epochs, folder, [])
    compression = [  # (*)
        KnowledgeDistillation(deepcopy(model), balance="gradient_norm"),
        GradualPruning(final_sparsity=0.8),
        QuantizationAwareTraining(weight_bits=5, activation_bits=None),
    ]
    model = trained(model, epochs, folder, compression)  # (*)
    info = save_compressed(model.generator, folder / "generator.lcz")  # (*)
    print(f"zeros: generator {sparsity(model.generator):.1%}, discriminator untouched")
    print(f"generator.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 30)), Path(given.get(2, "outputs/plain_gan")))
