"""Sets in the four IDX files of MNIST, as images or row by row: MNIST, Fashion-MNIST, one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torchvision import datasets

from lightning_compress.data.base import Kind, SplitDataModule, Splits
from lightning_compress.data.checks import check_choice, check_whole
from lightning_compress.data.datasets import TensorSplit
from lightning_compress.data.frames import check_frame, fit_images
from lightning_compress.data.idx import read_idx
from lightning_compress.data.splits import SplitIndices, seeded_permutation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.data.base import LoaderOptions

__all__ = ["IdxImages", "IdxRows"]


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
        self.limit = None if limit is None else check_whole("limit", limit, 1)
        self.val_size = check_whole("val_size", val_size, 1)
        self.num_classes = check_whole("num_classes", num_classes, 1, 256)

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
