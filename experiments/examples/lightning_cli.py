"""A LightningCLI project: the compression is in its YAML alone, the code is the project's own.

python experiments/examples/lightning_cli.py fit --config experiments/examples/lightning_cli.yaml
needs `pip install "jsonargparse[signatures]"`.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from plain_vae import PlainVAE
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ArtifactCallback


class Digits(LightningDataModule):
    """Scikit-learn's digits, (N, 1, 8, 8) in [0, 1].

    Args:
        batch_size: of a training step.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images = (
            torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8)
            / 16
        )
        self.train, self.val = TensorDataset(images[:1500]), TensorDataset(images[1500:])

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All at once."""
        return DataLoader(self.val, len(self.val))


def main() -> None:
    """What `fit` wrote, if it was that."""
    cli = LightningCLI(PlainVAE, Digits, save_config_callback=None)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ArtifactCallback) and (info := callback.info) is not None:
            print(f"{info.path}: {info.bytes} bytes, {info.ratio:.1f}x smaller")


if __name__ == "__main__":
    main()
