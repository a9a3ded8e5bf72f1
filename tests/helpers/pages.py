"""Code blocks of the pages, run as a reader would: from top to bottom; and their commands."""

import doctest
import re
import shlex

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


def fenced(text, *languages):
    """The blocks of some languages, without the indentation of a list around them."""
    opening = rf"^( *)```(?:{'|'.join(languages)})\b[^\n]*\n(.*?)^ *```"
    found = re.findall(opening, text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def python_blocks(text):
    """Python code, of sessions with prompts too."""
    sessions = fenced(text, "pycon", "python-console")
    examples = [doctest.DocTestParser().get_examples(block) for block in sessions]
    return [
        *fenced(text, "python", "py"),
        *("".join(one.source for one in block) for block in examples),
    ]


def shell_commands(text):
    """Words of each command of a page: in shell fences, in indented blocks, in code font."""
    fences = fenced(text, "sh", "bash", "shell", "console", "")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (\S.*)$", re.sub(r"\\\n\s*", " ", prose), re.MULTILINE)
    spans = [one.replace("\n", " ") for one in re.findall(r"`([^`]+)`", prose)]
    lines = [line for block in fences for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    for line in (*lines, *indented, *spans):
        line = line.strip().removeprefix("$ ")
        if re.match(r"(lightning-compress|make|python3?|pip)( |$)", line):
            yield shlex.split(line, comments=True)


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
