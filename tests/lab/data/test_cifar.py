"""CIFAR10 against torchvision, on a small set in CIFAR's own files."""

import hashlib
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torchvision import datasets

from lightning_compress.lab.data import CIFAR10

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six batches of 8 images, with torchvision's checksums replaced by theirs."""
    random = np.random.default_rng(0)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(name):
        pixels = random.integers(0, 256, (8, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": list(range(8))})]

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(name) for name in BATCHES])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch")])
    names = {"label_names": [str(i) for i in range(10)]}
    meta = {**datasets.CIFAR10.meta, "md5": write("batches.meta", names)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def ready(folder, **kwargs):
    data = CIFAR10(folder, **{"val_size": 10, **kwargs})
    data.setup()
    return data


def as_set(x, y):
    pairs = zip(x.flatten(1).tolist(), y.tolist(), strict=True)
    return sorted((*row, label) for row, label in pairs)


def test_equals_torchvision(folder):
    train, val, test = (split.tensors for split in ready(folder).splits)
    for part, ours in (
        (True, [torch.cat(v) for v in zip(train, val, strict=True)]),
        (False, test),
    ):
        source = datasets.CIFAR10(folder, train=part)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2) / 255
        assert as_set(*ours) == as_set(images, torch.tensor(source.targets))


def test_batches_dims_limit_and_frame(folder):
    data = ready(folder, batch_size=4, image_size=40, limit=6)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((4, 3, 40, 40), torch.float32, torch.int64)
    assert [len(split) for split in data.splits] == [6, 6, 6]
    assert data.dims == CIFAR10(image_size=40).dims
    plain = ready(folder)
    assert torch.equal(data.train_dataset[:][0][..., 4:36, 4:36], plain.train_dataset[:6][0])
    assert not torch.equal(plain.val_dataset[:][0], ready(folder, seed=1).val_dataset[:][0])


# the machine decides how many loader processes are worth it, and this run needs none
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
# Lightning 2.6 asks torch 2.14 for a tree's leaves in the old way
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_lightning_trains_on_it(folder, tmp_path):
    class Tiny(pl.LightningModule):
        layer = torch.nn.Conv2d(3, 1, 32)

        def training_step(self, batch, _):
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch, _):
            self.layer(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), CIFAR10(folder, val_size=10, batch_size=4))
    assert trainer.global_step == 2


def test_missing_files_are_listed_with_the_ways_to_get_them(folder):
    (folder / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py lacks data_batch_3\n") as e:
        ready(folder)
    assert "data.folder=" in str(e.value)
    assert "data.download=true" in str(e.value)


def test_damaged_files_are_named(folder):
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"damaged, by their checksums: .*test_batch$"):
        ready(folder)


def test_failed_download_says_why_and_what_else(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "gone.tar.gz").as_uri())
    with pytest.raises(FileNotFoundError, match=r"download failed: .*gone\.tar\.gz") as caught:
        ready(tmp_path, download=True)
    assert "data.folder=" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 31}, "image_size must be >= 32 .* got 31"),
        ({"limit": -1}, "limit must be an integer >= 1, got -1"),
        ({"val_size": 0}, "val_size must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10(**kwargs)


def test_validation_must_leave_something_to_train_on(folder):
    with pytest.raises(ValueError, match=r"val_size.* 40 training.*got 40"):
        ready(folder, val_size=40)
