"""Every file in conf/data: complete, equal to the code's defaults, and trained on."""

import inspect
import struct
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from PIL import Image

from lightning_compress.lab import data as data_package
from lightning_compress.lab.data import SplitDataModule
from tests.helpers.fonts import CHARACTERS, SANS, SERIF
from tests.helpers.sounds import chirps

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "data").glob("*.yaml"))
EXAMPLE = {  # the only values that differ from the code's defaults
    "mnist": {"name": "mnist"},
    "icons": {
        "folder": "/usr/share/icons/oxygen/base",
        "image_size": 32,
        "background": "white",
        "filing": {
            "_target_": "lightning_compress.lab.data.image_folder.ImageFiling",
            "classes": False,
            "group": "stem",
            "min_size": 32,
            "package": "oxygen-icon-theme",
        },
        "batch_size": 32,
    },
}

pytestmark = [
    # the machine decides how many loader processes are worth it, and these runs need none
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 asks torch 2.14 for a tree's leaves in the old way
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def load(path):
    root = OmegaConf.create({"seed": 0, "data": OmegaConf.load(path)})
    OmegaConf.resolve(root)
    return root.data


def test_each_data_module_has_a_config():
    named = {load(path)._target_.rpartition(".")[2] for path in CONFIGS}
    assert named == set(data_package.__all__) - {"SplitDataModule"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_spell_out_the_codes_defaults(path):
    config = load(path)
    parameters = {}
    for cls in (get_class(config.pop("_target_")), SplitDataModule):
        parameters |= inspect.signature(cls).parameters
    parameters.pop("common")
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert dict(config) == {**defaults, **EXAMPLE.get(path.stem, {})}
    assert OmegaConf.load(path)._get_node("seed")._value() == "${seed}"


@pytest.fixture
def sources(tmp_path):
    """What each config needs on top to have data here."""
    images, text = tmp_path / "images", tmp_path / "text"
    images.mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(images / f"{i}.png")
    text.write_text("".join(f"word {i}\n" for i in range(20)))
    for part in ("train", "t10k"):
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, 20) + bytes(20)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        pixels = struct.pack(">BBBB3I", 0, 0, 8, 3, 20, 28, 28) + bytes(20 * 28 * 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(pixels)
    idx = {"folder": str(tmp_path), "val_size": 8}
    return {
        "image_folder": {"folder": str(images), "image_size": 8},
        "icons": {"folder": str(images), "image_size": 8, "filing": None},
        "text_lines": {"file": str(text)},
        "fashion_mnist": idx,
        "fashion_rows": idx,
        "mnist": idx,
        "digits": {},
        "digit_rows": {},
        "audio_folder": {"folder": str(chirps(tmp_path / "sounds", 20))},
        "glyph_pairs": {"source": SANS, "target": SERIF, "characters": CHARACTERS},
    }


class Tiny(pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        self.layer = torch.nn.Linear(size, 1)
        self.steps = 0

    def training_step(self, batch, _):
        self.steps += 1
        return self.layer(batch[0].flatten(1).float()).square().mean()

    def validation_step(self, batch, _):
        self.layer(batch[0].flatten(1).float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# cifar10 has no small files of its own that its checksums accept: see test_cifar.py
TRAINABLE = [path for path in CONFIGS if path.stem != "cifar10"]


@pytest.mark.parametrize("path", TRAINABLE, ids=lambda path: path.stem)
def test_lightning_trains_on_it(path, sources, tmp_path):
    data = instantiate(load(path), **sources[path.stem], batch_size=4)
    data.setup()
    model = Tiny(data.train_dataset[0][0].numel())
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    assert model.steps == 2
