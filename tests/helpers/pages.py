"""Code blocks of the pages, run as a reader would: from top to bottom."""

import re

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.trainer import Trainer
from tiny import batches
from torch import nn


class MyVAE(LightningModule):
    """A model of somebody who has read no other page."""

    def __init__(self, width=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def quiet(**arguments):
    """A Trainer on the CPU that prints nothing."""
    silent = ("enable_progress_bar", "enable_model_summary", "logger")
    return Trainer(accelerator="cpu", **dict.fromkeys(silent, False), **arguments)


def run_blocks(text, monkeypatch, **names):
    """Run the page's blocks; returns the names that they leave."""
    monkeypatch.setattr("lightning.pytorch.Trainer", quiet)
    names = {
        "__name__": "page",
        "train_loader": batches(),
        "val_loader": batches(seed=1),
        "sample": torch.randn(2, 6),
        **names,
    }
    for block in python_blocks(text):
        exec(block, names)
    return names
