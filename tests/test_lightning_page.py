"""Test that the code of docs/lightning.md runs from top to bottom, on a user's own project."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from tiny import TinyAutoencoder, batches

import lightning_compress

PAGE = (Path(__file__).parents[1] / "docs" / "lightning.md").read_text(encoding="utf-8")


class MyVAE(TinyAutoencoder):
    """A model of somebody who has read no other page."""

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().mean())

    def test_step(self, batch):
        self.log("test/loss", (self(batch[0]) - batch[0]).square().mean())


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:Checkpoint directory", "ignore:.*num_workers"
)
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    monkeypatch.setattr("lightning.pytorch.Trainer", _quiet)
    names = {
        "__name__": "page",
        "MyVAE": MyVAE,
        "train_loader": batches(),
        "val_loader": batches(seed=1),
        "sample": torch.randn(2, 6),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 10
    for block in blocks:
        exec(block, names)
    small, large = tmp_path / "best.lcz", tmp_path / "plain.lcz"
    assert small.stat().st_size > 0
    assert large.stat().st_size > 0


def _quiet(**arguments):
    from lightning.pytorch.trainer.trainer import Trainer

    quiet = ("enable_progress_bar", "enable_model_summary", "logger")
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **arguments)


def test_the_yaml_names_callbacks():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    for entry in yaml.safe_load(block)["trainer"]["callbacks"]:
        package, _, name = entry["class_path"].partition(".")
        assert package == "lightning_compress"
        assert isinstance(getattr(lightning_compress, name)(**entry["init_args"]), Callback)
