"""A plain user's VAE on scikit-learn's digits, with compression added: the lines marked (*).

python experiments/examples/plain_vae.py [epochs [folder]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (  # (*)
    GradualPruning,
    QuantizationAwareTraining,
    export_onnx,
    load_compressed,
    save_compressed,
)

LATENT = 8


class PlainVAE(LightningModule):
    """Images (N, 1, 8, 8) in [0, 1]; Kingma and Welling 2014, arXiv:1312.6114."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, 2 * LATENT),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, width * 16),
            nn.ReLU(),
            nn.Unflatten(1, (width, 4, 4)),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def loss(self, x: Tensor) -> Tensor:
        """Negative evidence lower bound in nats an image."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        pixels = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
        return (pixels + kl) / len(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """One step of one optimizer."""
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """The same on held-out images."""
        self.log("val/loss", self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(epochs: int, folder: Path) -> None:
    """Train, prune and quantize in one run, then write and read the small files."""
    seed_everything(0, verbose=False)
    rows, _ = load_digits(return_X_y=True)
    images = torch.tensor(rows, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train = DataLoader(TensorDataset(images[:1500]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(images[1500:]), batch_size=297)
    model = PlainVAE()
    compression = [  # (*)
        GradualPruning(final_sparsity=0.8),
        QuantizationAwareTraining(weight_bits=5, activation_bits=8),
    ]
    options = {"default_root_dir": folder, "log_every_n_steps": 10}
    trainer = Trainer(max_epochs=epochs, callbacks=compression, **options)  # (*)
    trainer.fit(model, train, val)

    info = save_compressed(model, folder / "vae.lcz")  # (*)
    fresh = load_compressed(folder / "vae.lcz", PlainVAE())  # (*)
    same = all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    onnx = export_onnx(  # (*)
        model.decoder.cpu().eval(), folder / "decoder.onnx", torch.randn(4, LATENT), int8=True
    )
    print(f"vae.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller, loads exactly: {same}")
    print(f"decoder.onnx: {onnx.bytes} bytes, in int8: {dict(onnx.int8_ops)}")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 30)), Path(given.get(2, "outputs/plain_vae")))
