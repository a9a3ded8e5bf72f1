"""Sets in the four IDX files of MNIST, as images or row by row: MNIST, Fashion-MNIST, one's own."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lightning_compress.errors import check_choice
from lightning_compress.lab.data.base import (
    Kind,
    SplitDataModule,
    SplitIndices,
    Splits,
    TensorSplit,
    check_integer,
    seeded_permutation,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = [
    "CIFAR10",
    "IdxImages",
    "IdxRows",
    "check_frame",
    "fit_images",
    "read_idx",
]
FITS = ("pad", "resize")


def check_frame(image_size: int, fit: str, *, content: int) -> None:
    """Check that images of `content` pixels a side fit into a frame of `image_size`.

    Raises:
        ValueError: for an unknown `fit`, a size below 1, or a padded frame that is too small.

    >>> check_frame(4, "pad", content=8)
    Traceback (most recent call last):
    ValueError: image_size must be >= 8 (the images' own size) with fit='pad', got 4;
    fit='resize' scales images down
    """
    check_choice("fit", fit, FITS)
    check_integer("image_size", image_size, 1)
    if fit == "pad" and image_size < content:
        raise ValueError(
            f"image_size must be >= {content} (the images' own size) with fit='pad',"
            f" got {image_size}; fit='resize' scales images down"
        )


def fit_images(images: Tensor, image_size: int, fit: str) -> Tensor:
    """Put images (N, C, H, W) into frames (N, C, image_size, image_size), of the same dtype.

    `"pad"` sets them in the middle of a frame of zeros, `"resize"` scales them bilinearly
    (with antialiasing where they shrink).

    Raises:
        ValueError: see `check_frame`.

    >>> import torch
    >>> fit_images(torch.ones(2, 1, 8, 8), 16, "pad").sum()
    tensor(128.)
    """
    height, width = images.shape[-2:]
    check_frame(image_size, fit, content=max(height, width))
    if height == width == image_size:
        return images
    if fit == "pad":
        left, top = (image_size - width) // 2, (image_size - height) // 2
        right, bottom = image_size - width - left, image_size - height - top
        return functional.pad(images, (left, right, top, bottom))
    frame = (image_size, image_size)
    # antialias=True equals plain bilinear where images grow
    return functional.interpolate(images, frame, mode="bilinear", antialias=True)


SIDE = 32


class CIFAR10(SplitDataModule):
    """Colour photographs of ten classes, x (N, 3, image_size, image_size).

    The set's 10,000 test images stay the test split; the 50,000 others are split by seed.
    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.

    Args:
        folder: holds torchvision's folder `cifar-10-batches-py`.
        image_size: pixels a side of the frame; the set's own is 32.
        fit: `"pad"` sets the image in the middle of a black frame, `"resize"` scales it.
        download: let torchvision download into `folder` what is missing.
        limit: use only so many rows of each split, chosen by seed; None uses all.
        val_size: training images that are kept for validation.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range, or (in `setup`) for damaged files.
        FileNotFoundError: in `setup`, naming what is missing where, and the ways to get it.

    >>> CIFAR10().dims
    {'channels': 3, 'image_size': 32, 'num_classes': 10}
    """

    kind: ClassVar[Kind] = "image"

    def __init__(
        self,
        folder: str | Path = "data",
        *,
        image_size: int = SIDE,
        fit: str = "pad",
        download: bool = False,
        limit: int | None = None,
        val_size: int = 5000,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_frame(image_size, fit, content=SIDE)
        self.folder = Path(folder).expanduser()
        self.image_size, self.fit, self.download = image_size, fit, download
        self.limit = None if limit is None else check_integer("limit", limit, 1)
        self.val_size = check_integer("val_size", val_size, 1)

    @property
    def dims(self) -> dict[str, int]:
        """`channels`, `image_size`, `num_classes`; known before `setup`."""
        return {"channels": 3, "image_size": self.image_size, "num_classes": 10}

    def prepare_data(self) -> None:
        """Download what is missing or damaged, if asked to.

        Raises:
            FileNotFoundError: when the download fails.
        """
        if not self.download or not self._faulty():
            return
        try:
            datasets.CIFAR10(self.folder, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"download failed: {error}\n{self._advice()}") from error

    def build(self) -> Splits:
        """Read and split the files."""
        self.prepare_data()  # does nothing when Lightning has called it
        faulty = self._faulty()
        if any(not path.is_file() for path in faulty):
            raise FileNotFoundError(self._advice())
        if faulty:
            raise ValueError(f"damaged, by their checksums: {', '.join(map(str, faulty))}")
        images, labels = self._read(train=True)
        if self.val_size >= len(labels):
            raise ValueError(
                f"val_size must be below the {len(labels)} training images, got {self.val_size}"
            )
        order = seeded_permutation(len(labels), self.seed)
        train, val = order.split([len(labels) - self.val_size, self.val_size])
        test_images, test_labels = self._read(train=False)
        test = seeded_permutation(len(test_labels), self.seed)
        return Splits(
            self._pick(images, labels, train),
            self._pick(images, labels, val),
            self._pick(test_images, test_labels, test),
        )

    def _pick(self, images: Tensor, labels: Tensor, rows: Tensor) -> TensorSplit:
        chosen = rows[: self.limit]
        return TensorSplit(fit_images(images[chosen], self.image_size, self.fit), labels[chosen])

    def _read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        source = datasets.CIFAR10(self.folder, train=train)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2)  # stored (N, H, W, C)
        return images, torch.tensor(source.targets)

    def _faulty(self) -> list[Path]:
        """Files that are missing or fail torchvision's checksum."""
        meta = datasets.CIFAR10.meta
        listed = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
        listed.append([meta["filename"], meta["md5"]])
        base = self.folder / datasets.CIFAR10.base_folder
        return [base / name for name, md5 in listed if not check_integrity(base / name, md5)]

    def _advice(self) -> str:
        missing = ", ".join(path.name for path in self._faulty() if not path.is_file())
        return (
            f"CIFAR-10: {self.folder / datasets.CIFAR10.base_folder} lacks {missing}\n"
            "Ways to get it: data.folder=<folder that holds cifar-10-batches-py>;"
            " data.download=true"
        )


GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 8


def read_idx(path: str | Path, axes: int) -> Tensor:
    """Read unsigned bytes, uint8 with `axes` axes: (N, H, W) images or (N,) labels.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is damaged, truncated, too long, or not of this form.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = Path(file.name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(file.name, axes=1)
    tensor([7, 9], dtype=torch.uint8)
    """
    path = Path(path)
    content = _unzipped(path)
    start = 4 + 4 * axes
    magic = bytes([0, 0, UNSIGNED_BYTE, axes])
    if content[:4] != magic:
        raise ValueError(
            f"{path}: no IDX file of unsigned bytes with {axes} axes:"
            f" starts with 0x{content[:4].hex()}, expected 0x{magic.hex()}"
        )
    if len(content) < start:
        raise ValueError(f"{path}: truncated in its header: {len(content)} of {start} bytes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = math.prod(shape)
    if not expected == len(content) - start > 0:
        state = "too long" if len(content) - start > expected else "truncated"
        state = state if expected else "empty"
        raise ValueError(
            f"{path}: {state}: its header says {'x'.join(map(str, shape))} = {expected} values,"
            f" it holds {len(content) - start}"
        )
    # bytearray: torch wants memory that may be written to
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[start:].reshape(shape)


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file: {error}") from error


@dataclass(frozen=True)
class _Source:
    """Where a named set may lie, and how to get it."""

    torchvision: type[datasets.MNIST]
    places: tuple[str, ...]
    install: str | None = None

    def downloaded(self, root: Path) -> Path:
        """Where torchvision puts the files."""
        return root / self.torchvision.__name__ / "raw"


SOURCES = {
    "fashion_mnist": _Source(
        datasets.FashionMNIST,
        ("data/fashion_mnist", "/usr/share/datasets/fashion-mnist"),
        "apt-get install dataset-fashion-mnist (Debian, Ubuntu)",
    ),
    "mnist": _Source(datasets.MNIST, ("data/mnist",)),
}
DOWNLOADS = Path("data")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class IdxImages(SplitDataModule):
    """Grey images from IDX files, x (N, 1, image_size, image_size).

    The files' own test set stays the test split; the training set is split by seed.

    Args:
        name: `"fashion_mnist"` (Xiao et al. 2017, arXiv:1708.07747) or `"mnist"` (LeCun et al.
            1998); where to look and what to download.
        folder: holds the four files, gzipped or not; None looks in `data/<name>`, in
            torchvision's folder below `data`, and where Debian installs the set.
        image_size: pixels a side of the frame; the sets' own is 28.
        fit: `"pad"` sets the image in the middle of a black frame, `"resize"` scales it.
        download: let torchvision download into `folder`, or into `data`, what is missing.
        limit: use only so many rows of each split, chosen by seed; None uses all.
        val_size: rows of the training files that are kept for validation.
        num_classes: labels are below this.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range, or (in `setup`) for damaged files.
        FileNotFoundError: in `setup`, naming what is missing where, and the ways to get it.

    >>> IdxImages().dims
    {'channels': 1, 'image_size': 28, 'num_classes': 10}
    """

    kind: ClassVar[Kind] = "image"

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        name: str = "fashion_mnist",
        image_size: int = 28,
        fit: str = "pad",
        download: bool = False,
        limit: int | None = None,
        val_size: int = 5000,
        num_classes: int = 10,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_frame(image_size, fit, content=1)
        self._name = check_choice("name", name, SOURCES)  # `name` is Lightning's own
        self.folder = None if folder is None else Path(folder).expanduser()
        self.image_size, self.fit, self.download = image_size, fit, download
        self.limit = None if limit is None else check_integer("limit", limit, 1)
        self.val_size = check_integer("val_size", val_size, 1)
        self.num_classes = check_integer("num_classes", num_classes, 1, 256)

    @property
    def dims(self) -> dict[str, int]:
        """`channels`, `image_size`, `num_classes`; known before `setup`."""
        sizes = {"channels": 1, "image_size": self.image_size}
        return {**sizes, "num_classes": self.num_classes}

    def prepare_data(self) -> None:
        """Download what is missing, if asked to.

        Raises:
            FileNotFoundError: when the download fails.
        """
        if not self.download or self._find() is not None:
            return
        try:
            SOURCES[self._name].torchvision(self.folder or DOWNLOADS, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"download failed: {error}\n{self._advice()}") from error

    def build(self) -> Splits:
        """Read and split the files."""
        self.prepare_data()  # does nothing when Lightning has called it
        folder = self._find()
        if folder is None:
            raise FileNotFoundError(self._advice())
        images, labels = self._read(folder, *FILES[:2])
        if self.val_size >= len(labels):
            raise ValueError(
                f"val_size must be below the {len(labels)} images of {folder / FILES[0]},"
                f" got {self.val_size}"
            )
        test_images, test_labels = self._read(folder, *FILES[2:])
        train, val, test = self._indices(len(labels), len(test_labels))
        return Splits(
            TensorSplit(images[train], labels[train]),
            TensorSplit(images[val], labels[val]),
            TensorSplit(test_images[test], test_labels[test]),
        )

    def _indices(self, rows: int, test_rows: int) -> SplitIndices:
        order = seeded_permutation(rows, self.seed)
        train, val = order.split([rows - self.val_size, self.val_size])
        parts = SplitIndices(train, val, seeded_permutation(test_rows, self.seed))
        return SplitIndices(*(part[: self.limit] for part in parts))

    def _read(self, folder: Path, image_file: str, label_file: str) -> tuple[Tensor, Tensor]:
        image_path, label_path = (_existing(folder, name) for name in (image_file, label_file))
        images, labels = read_idx(image_path, axes=3), read_idx(label_path, axes=1).long()
        if not 0 < len(images) == len(labels):
            raise ValueError(
                f"{image_path} has {len(images)} images, {label_path} has {len(labels)} labels;"
                " they must be as many, and more than none"
            )
        if labels.max() >= self.num_classes:
            raise ValueError(
                f"{label_path}: label {int(labels.max())} found, labels must be below"
                f" num_classes={self.num_classes}"
            )
        return fit_images(images.unsqueeze(1), self.image_size, self.fit), labels

    def _places(self) -> list[Path]:
        source = SOURCES[self._name]
        if self.folder is not None:
            return [self.folder, source.downloaded(self.folder)]
        return [*map(Path, source.places), source.downloaded(DOWNLOADS)]

    def _find(self) -> Path | None:
        return next((place for place in self._places() if not _missing(place)), None)

    def _advice(self) -> str:
        lines = [f"{self._name} was not found:"]
        for place in self._places():
            state = f"lacks {', '.join(_missing(place))}" if place.is_dir() else "no such folder"
            lines.append(f"  {place}: {state}")
        ways = [
            SOURCES[self._name].install,
            "data.folder=<folder with the four files, .gz or not>",
            "data.download=true",
        ]
        return "\n".join([*lines, f"Ways to get it: {'; '.join(filter(None, ways))}"])


class IdxRows(IdxImages):
    """The images of `IdxImages` read row by row from the top: x (N, image_size, image_size).

    The same rows lie in the same splits as those of `IdxImages` with the same arguments, which
    it shares.

    >>> IdxRows().dims
    {'steps': 28, 'features': 28, 'num_classes': 10}
    """

    kind: ClassVar[Kind] = "sequence"

    @property
    def dims(self) -> dict[str, int]:
        """`steps`, `features`, `num_classes`; known before `setup`."""
        sizes = {"steps": self.image_size, "features": self.image_size}
        return {**sizes, "num_classes": self.num_classes}

    def _read(self, folder: Path, image_file: str, label_file: str) -> tuple[Tensor, Tensor]:
        images, labels = super()._read(folder, image_file, label_file)
        return images.squeeze(1), labels


def _existing(folder: Path, name: str) -> Path:
    zipped = folder / f"{name}.gz"
    return zipped if zipped.is_file() else folder / name


def _missing(folder: Path) -> list[str]:
    return [f"{name}.gz" for name in FILES if not _existing(folder, name).is_file()]
