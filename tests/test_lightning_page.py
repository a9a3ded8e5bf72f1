"""Test that the code of docs/lightning.md runs from top to bottom, on a user's own project."""

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, seed_everything
from pages import python_blocks, run_blocks
from tiny import TinyAutoencoder

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
    assert len(python_blocks(PAGE)) == 10
    run_blocks(PAGE, monkeypatch, MyVAE=MyVAE)
    small, large = tmp_path / "best.lcz", tmp_path / "plain.lcz"
    assert small.stat().st_size > 0
    assert large.stat().st_size > 0


def test_the_yaml_names_callbacks():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    for entry in yaml.safe_load(block)["trainer"]["callbacks"]:
        package, _, name = entry["class_path"].partition(".")
        assert package == "lightning_compress"
        assert isinstance(getattr(lightning_compress, name)(**entry["init_args"]), Callback)
