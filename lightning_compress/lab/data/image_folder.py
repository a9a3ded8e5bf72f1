"""Any folder of image files, decoded as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from lightning_compress.lab.data.base import (
    Kind,
    Split,
    SplitDataModule,
    Splits,
    check_fractions,
    check_integer,
    fraction_split,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = ["ImageFiles", "ImageFolder", "read_image"]


def read_image(path: Path, image_size: int, *, grey: bool) -> Tensor:
    """Decode a file, scale its shorter side to `image_size`, crop the centre.

    Turned upright by its EXIF tag; transparent parts become black.
    Returns float32 (C, image_size, image_size) in [0, 1], C = 1 if grey, else 3.

    Raises:
        ValueError: naming the file, when it is no readable image of 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert() would clip these to 255
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            upright = _opaque(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    scaled = functional.resize(functional.pil_to_tensor(upright), [image_size])
    return functional.center_crop(scaled, [image_size]).float().div_(255)


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    visible = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, "black"), visible)


class ImageFiles(Split):
    """Image files and their labels; see `read_image` for what becomes of them.

    Args:
        root: folder that the paths below are relative to.
        files: (path, label) pairs.
        image_size: pixels a side.
        grey: one channel instead of three.
    """

    def __init__(
        self, root: Path, files: Sequence[tuple[Path, int]], image_size: int, *, grey: bool
    ) -> None:
        self.root, self.files, self.image_size, self.grey = root, files, image_size, grey

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.files[index]
        image = read_image(self.root / path, self.image_size, grey=self.grey)
        return image, torch.tensor(label)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Frame, then name, label and bytes of every file."""
        yield f"{self.image_size} {self.grey}".encode()
        for path, label in self.files:
            content = (self.root / path).read_bytes()
            yield f"{path.as_posix()} {label} {len(content)}\n".encode()
            yield content


class ImageFolder(SplitDataModule):
    """A folder of images, x (N, C, image_size, image_size), split by seed.

    Subfolders are classes, as in `torchvision.datasets.ImageFolder`; images that lie in the
    folder itself, or in one single subfolder, have no labels.

    Args:
        folder: where the images are.
        image_size: the shorter side is scaled to this, then the centre is cropped.
        grey: one channel instead of three.
        val_fraction: part of the images to validate on.
        test_fraction: part of the images to test on.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range; in `setup` for a folder that mixes images
            and subfolders; in the loaders for a file that is no image.
        FileNotFoundError: in `setup`, for a folder that is missing or without images.
    """

    kind: ClassVar[Kind] = "image"

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        image_size: int = 64,
        grey: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.folder = None if folder is None else Path(folder).expanduser()
        self.image_size, self.grey = check_integer("image_size", image_size, 1), grey
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.classes: list[str] = []

    @property
    def dims(self) -> dict[str, int]:
        """`channels`, `image_size`, `num_classes` (1 without labels); known after `setup`."""
        _ = self.splits
        sizes = {"channels": 1 if self.grey else 3, "image_size": self.image_size}
        return {**sizes, "num_classes": max(1, len(self.classes))}

    @property
    def labelled(self) -> bool:
        """Whether there are two classes or more; known after `setup`."""
        _ = self.splits
        return len(self.classes) > 1

    def build(self) -> Splits:
        """List the files and split the list."""
        folder = self._existing_folder()
        self.classes, files = _list_images(folder)
        parts = fraction_split(len(files), self.val_fraction, self.test_fraction, self.seed)
        chosen = ([files[row] for row in part.tolist()] for part in parts)
        return Splits(*(ImageFiles(folder, c, self.image_size, grey=self.grey) for c in chosen))

    def _existing_folder(self) -> Path:
        if self.folder is None:
            raise FileNotFoundError("no image folder given: data.folder=<folder of images>")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"data.folder={self.folder}: no such folder")
        return self.folder


def _list_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names, and every image with its label, in a fixed order."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path.name for path in visible if path.is_dir()]
    loose = [path for path in visible if _is_image(path)]
    if classes and loose:
        raise ValueError(
            f"{folder} holds images ({loose[0].name}) and subfolders ({classes[0]}): either every"
            " image lies in a class subfolder, or there are no subfolders"
        )
    parents = [folder / name for name in classes] or [folder]
    files = [
        (path.relative_to(folder), label)
        for label, parent in enumerate(parents)
        for path in _images_below(parent, deep=bool(classes))
    ]
    return classes, files


def _images_below(parent: Path, *, deep: bool) -> list[Path]:
    found = [path for path in parent.glob("**/*" if deep else "*") if path.is_file()]
    images = sorted(path for path in found if _is_image(path))
    if not images:
        raise FileNotFoundError(f"{parent} holds no image ({', '.join(IMG_EXTENSIONS)})")
    if len(images) < len(found):
        rank_zero_info(f"{parent}: {len(found) - len(images)} files are no images, left out")
    return images


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMG_EXTENSIONS
