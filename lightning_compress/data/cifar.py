"""CIFAR-10, read by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lightning_compress.data.base import Kind, SplitDataModule, Splits
from lightning_compress.data.checks import check_whole
from lightning_compress.data.datasets import TensorSplit
from lightning_compress.data.frames import check_frame, fit_images
from lightning_compress.data.splits import seeded_permutation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.data.base import LoaderOptions

__all__ = ["CIFAR10"]

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
        self.limit = None if limit is None else check_whole("limit", limit, 1)
        self.val_size = check_whole("val_size", val_size, 1)

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
