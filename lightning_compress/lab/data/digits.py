"""The 1,797 handwritten digits of scikit-learn, as images and as sequences of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_compress.lab.data.base import (
    Kind,
    SplitDataModule,
    Splits,
    TensorSplit,
    stratified_split,
)
from lightning_compress.lab.data.images import check_frame, fit_images

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = ["DigitRows", "Digits"]

SIDE, LEVELS, CLASSES = 8, 16, 10  # pixels a side, the brightest value, digits
TRAIN_ROWS, VAL_ROWS = 1200, 200  # the other 397 are test rows


def _read_digits() -> tuple[Tensor, Tensor]:
    """All digits, float32 (1797, 8, 8) in [0, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div_(LEVELS).reshape(-1, SIDE, SIDE)
    return images, torch.from_numpy(labels).long()


def _split_digits(x: Tensor, y: Tensor, seed: int) -> Splits:
    parts = stratified_split(y, TRAIN_ROWS, VAL_ROWS, seed)
    return Splits(*(TensorSplit(x[rows], y[rows]) for rows in parts))


class Digits(SplitDataModule):
    """Handwritten digits, x (N, 1, image_size, image_size); nothing to download.

    Split by class into 1,200 / 200 / 397 rows. Source: Alpaydin and Kaynak, Optical Recognition
    of Handwritten Digits, UCI 1998 (its test part, as in `sklearn.datasets.load_digits`).

    Args:
        image_size: pixels a side of the frame.
        fit: `"pad"` sets the 8x8 digit in the middle of a black frame, `"resize"` fills the
            frame by bilinear scaling.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range.

    >>> data = Digits(batch_size=32)
    >>> data.setup()
    >>> x, y = next(iter(data.train_dataloader()))
    >>> x.shape, y.shape, data.dims["image_size"]
    (torch.Size([32, 1, 16, 16]), torch.Size([32]), 16)
    """

    kind: ClassVar[Kind] = "image"

    def __init__(
        self, *, image_size: int = 16, fit: str = "pad", **common: Unpack[LoaderOptions]
    ) -> None:
        super().__init__(**common)
        check_frame(image_size, fit, content=SIDE)
        self.image_size, self.fit = image_size, fit

    @property
    def dims(self) -> dict[str, int]:
        """`channels`, `image_size`, `num_classes`; known before `setup`."""
        return {"channels": 1, "image_size": self.image_size, "num_classes": CLASSES}

    def build(self) -> Splits:
        """Read, frame and split the digits."""
        images, labels = _read_digits()
        framed = fit_images(images.unsqueeze(1), self.image_size, self.fit)
        return _split_digits(framed, labels, self.seed)


class DigitRows(SplitDataModule):
    """Handwritten digits read row by row from the top: x (N, 8, 8), 8 steps of 8 pixels.

    The same rows lie in the same splits as those of `Digits` with the same seed.

    Args:
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    >>> DigitRows().dims
    {'steps': 8, 'features': 8, 'num_classes': 10}
    """

    kind: ClassVar[Kind] = "sequence"

    def __init__(self, **common: Unpack[LoaderOptions]) -> None:
        super().__init__(**common)

    @property
    def dims(self) -> dict[str, int]:
        """`steps`, `features`, `num_classes`; known before `setup`."""
        return {"steps": SIDE, "features": SIDE, "num_classes": CLASSES}

    def build(self) -> Splits:
        """Read and split the digits."""
        return _split_digits(*_read_digits(), self.seed)
