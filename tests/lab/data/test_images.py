"""IdxImages against torchvision's readers of the same files."""

import functools
import gzip
import hashlib
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from lightning_compress.lab.data import IdxImages, IdxRows

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
SETS = {"fashion_mnist": datasets.FashionMNIST, "mnist": datasets.MNIST}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def write_idx(path, values):
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    content = header + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_set(folder, *, suffix=".gz", rows=60, test_rows=20, side=28):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(rows)
    for prefix, n in (("train", rows), ("t10k", test_rows)):
        images = torch.randint(0, 256, (n, side, side), generator=generator)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        labels = torch.arange(n) % 10
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return folder


def ready(folder, **kwargs):
    data = IdxImages(folder, **{"val_size": 10, **kwargs})
    data.setup()
    return data


def as_set(x, y):
    pairs = zip(x.flatten(1).tolist(), y.tolist(), strict=True)
    return sorted((*row, label) for row, label in pairs)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", SETS)
def test_equals_torchvision(name, suffix, tmp_path):
    # torchvision wants unzipped files in <root>/<class>/raw
    raw = tmp_path / SETS[name].__name__ / "raw"
    write_set(raw, suffix="")
    ours = ready(write_set(tmp_path / "own", suffix=suffix), name=name)
    train, test = (SETS[name](tmp_path, train=part) for part in (True, False))
    parts = [split.tensors for split in ours.splits]
    x, y = (torch.cat(values) for values in zip(*parts[:2], strict=True))
    assert as_set(x, y) == as_set(train.data / 255, train.targets)
    assert as_set(*parts[2]) == as_set(test.data / 255, test.targets)
    assert [len(split) for split in ours.splits] == [50, 10, 20]


def test_batches_and_dims(tmp_path):
    data = ready(write_set(tmp_path), batch_size=8)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((8, 1, 28, 28), torch.float32, torch.int64)
    assert 0 <= x.min() < x.max() <= 1
    assert data.dims == {"channels": 1, "image_size": 28, "num_classes": 10}


def test_rows_are_the_images_read_from_the_top(tmp_path):
    folder = write_set(tmp_path)
    images, rows = (one(folder, val_size=10, seed=3, limit=9) for one in (IdxImages, IdxRows))
    for data in (images, rows):
        data.setup()
    for whole, read in zip(images.splits, rows.splits, strict=True):
        assert torch.equal(whole.tensors[0][:, 0], read.tensors[0])
        assert torch.equal(whole.tensors[1], read.tensors[1])
    assert rows.dims == {"steps": 28, "features": 28, "num_classes": 10}
    assert (rows.kind, rows.labelled) == ("sequence", True)


def test_frames(tmp_path):
    folder = write_set(tmp_path)
    plain, padded = ready(folder), ready(folder, image_size=32)
    assert torch.equal(padded.val_dataset[:][0][..., 2:30, 2:30], plain.val_dataset[:][0])
    assert ready(folder, image_size=14, fit="resize").val_dataset[0][0].shape == (1, 14, 14)
    with pytest.raises(ValueError, match=r"image_size must be >= 28 .* got 27"):
        ready(folder, image_size=27)


def test_limit_takes_the_first_rows_of_each_split(tmp_path):
    folder = write_set(tmp_path)
    whole, few = ready(folder, seed=4), ready(folder, seed=4, limit=7)
    for a, b in zip(whole.splits, few.splits, strict=True):
        assert len(b) == 7
        assert torch.equal(a.tensors[0][:7], b.tensors[0])
    other = ready(folder, seed=5, limit=7)
    assert not torch.equal(few.train_dataset[:][0], other.train_dataset[:][0])


def test_named_places_are_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set(Path("data/mnist"), rows=40)
    assert len(ready(None, name="mnist").train_dataset) == 30
    write_set(Path("data/fashion_mnist"), rows=50)
    assert len(ready(None, name="fashion_mnist").train_dataset) == 40


def test_missing_files_are_listed_with_the_ways_to_get_them(tmp_path):
    folder = write_set(tmp_path / "set")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        ready(folder)
    message = str(caught.value)
    assert f"{folder}: lacks train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz" in message
    for way in ("apt-get install dataset-fashion-mnist", "data.folder=", "data.download=true"):
        assert way in message
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder") as caught:
        ready(tmp_path / "nowhere", name="mnist")
    assert "apt-get" not in str(caught.value)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror on this machine, so that torchvision's own download runs without a network."""
    folder = write_set(tmp_path / "server")
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        address = f"http://127.0.0.1:{running.server_port}/"
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
        monkeypatch.setattr(datasets.FashionMNIST, "resources", list(md5.items()))
        yield folder
        running.shutdown()


def test_download(tmp_path, server):
    data = ready(tmp_path / "target", download=True)
    assert torch.equal(data.val_dataset[:][0], ready(server).val_dataset[:][0])
    # once downloaded, found without asking
    assert data.fingerprint == ready(tmp_path / "target").fingerprint


def test_failed_download_says_why_and_what_else(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [(tmp_path / "gone").as_uri() + "/"])
    with pytest.raises(FileNotFoundError, match="download failed: Error downloading") as caught:
        ready(tmp_path / "target", download=True)
    assert "data.folder=" in str(caught.value)


def test_damaged_sets_are_refused(tmp_path):
    images, labels = (tmp_path / f"{name}.gz" for name in NAMES)
    write_set(tmp_path)
    write_idx(labels, torch.zeros(59))
    with pytest.raises(ValueError, match=r"train-images.* has 60 images, .*labels.* has 59 labels"):
        ready(tmp_path)
    write_idx(labels, torch.full((60,), 10))
    with pytest.raises(ValueError, match=r"label 10 .*num_classes=10"):
        ready(tmp_path)
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged or truncated"):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "kmnist"}, "name='kmnist'"),
        ({"limit": 0}, "limit must be an integer >= 1, got 0"),
        ({"val_size": 0}, "val_size must be an integer >= 1, got 0"),
        ({"num_classes": 300}, "num_classes must be an integer from 1 to 256, got 300"),
        ({"fit": "crop"}, "fit='crop'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IdxImages(**kwargs)


def test_validation_must_leave_something_to_train_on(tmp_path):
    with pytest.raises(ValueError, match=r"val_size.* 60 images.*got 60"):
        ready(write_set(tmp_path), val_size=60)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist not installed")
def test_the_real_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data folder here: the conventional place must be found
    data = IdxImages()
    data.setup()
    assert [len(split) for split in data.splits] == [55_000, 5_000, 10_000]
    x, y = data.test_dataset.tensors
    assert torch.bincount(y).tolist() == [1000] * 10
    raw = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    assert (x * 255).round().long().sum() == pixels.sum()
    x, y = data.train_dataset[:]
    assert x.mean() == pytest.approx(0.286, abs=0.001)  # the figure its users normalise with
    assert len(torch.unique(y)) == 10
