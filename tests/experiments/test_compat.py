"""The compatibility table: every cell that is no tick has its reason in the page."""

import torch
from torch import nn

from lightning_compress import export_onnx


def row(project, **cells):
    return {"project": project, "source": "a package", "cells": cells}


def test_no_cell_is_silent():
    from compat import COLUMNS, table

    good = {"tick": True, "note": "fine"}
    cells = dict.fromkeys(COLUMNS, good) | {"int8": {"tick": False, "note": "1 of 4; a | b"}}
    text = table(
        [
            row("SN-GAN", **cells),
            {"project": "monai AutoencoderKL", "source": "monai", "missing": "not installed"},
        ]
    )
    assert f"{len(COLUMNS) - 1} of {len(COLUMNS)} cells are ticks" in text
    assert "no, reason 1" in text
    assert r"1. SN-GAN, int8: 1 of 4; a \| b" in text
    assert "monai AutoencoderKL was not run: not installed." in text


def test_a_reason_is_short_and_names_no_path_of_the_machine():
    from compat import reason

    assert reason(ValueError("in /home/me/file.py: bad")) == "in …: bad"
    assert len(reason(ValueError("word " * 500))) <= 220
    assert reason(KeyError()) == "KeyError"


def test_products_of_two_activations_are_not_counted(tmp_path):
    from compat import weighted_products

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Conv1d(3, 3, 1)

        def forward(self, x):
            x = self.two(self.one(x))
            return x @ x.transpose(1, 2)

    info = export_onnx(Net().eval(), tmp_path / "net.onnx", torch.randn(2, 3, 4))
    assert weighted_products(info.path) == 2
