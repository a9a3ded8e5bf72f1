"""Time of a training step of small models, where calls and not products take the time.

An MLP of scvi-tools' size, a VAE, a DCGAN and a U-Net; each with pruning, W8A8, W4A8 and both,
against no callback, interleaved in one process. PyTorch's own quantization-aware training stands
in `bench_pt2e.py`.

python experiments/benchmarks/bench_small_models.py [steps of an epoch [copies [model ...]]]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from lightning.pytorch import Callback, LightningModule
from shared.turns import measure_steps
from torch import Tensor, nn

from lightning_compress import GradualPruning, QuantizationAwareTraining
from lightning_compress.lab.models import DCGAN, VAE

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 2


class Reconstruction(LightningModule):
    """A network that gives its input again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Squared error."""
        return (self.network(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def mlp() -> LightningModule:
    """Eight layers of 128."""
    widths = [784, *[128] * 7, 784]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return Reconstruction(nn.Sequential(*layers[:-1], nn.Unflatten(1, (1, 28, 28))))


class UNet(nn.Module):
    """Two levels, skips concatenated; images (N, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 4, 2, 1)
        self.middle, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.last = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        skip = self.first(x).relu()
        up = self.up(self.middle(self.down(skip).relu()).relu()).relu()
        return self.last(torch.cat([skip, up], dim=1))


MODELS: dict[str, Callable[[], LightningModule]] = {
    "mlp": mlp,
    "vae": lambda: VAE(image_size=28, channels=1, width=16),
    "dcgan": lambda: DCGAN(image_size=28),
    "unet": lambda: Reconstruction(UNet()),
}
ARMS: dict[str, Callable[[], list[Callback]]] = {
    "no callback": list,
    "90 % zeros": lambda: [GradualPruning(final_sparsity=0.9, end=0.45)],
    "W8A8": lambda: [QuantizationAwareTraining(freeze=1.0)],
    "W4A8": lambda: [QuantizationAwareTraining(weight_bits=4, freeze=1.0)],
    "90 % zeros, W4A8": lambda: [
        GradualPruning(final_sparsity=0.9, end=0.45),
        QuantizationAwareTraining(weight_bits=4, freeze=1.0),
    ],
}

if __name__ == "__main__":
    for name in sys.argv[3:] or MODELS:
        print(name)
        setups = {arm: lambda arm=arm, name=name: (MODELS[name](), ARMS[arm]()) for arm in ARMS}
        measure_steps(setups, steps=STEPS, copies=COPIES)
