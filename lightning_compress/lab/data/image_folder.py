"""Any folder of image files, decoded as they are needed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from lightning_compress.errors import check_choice
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

__all__ = ["ImageFiles", "ImageFiling", "ImageFolder", "read_image"]


def read_image(path: Path, image_size: int, *, grey: bool, background: str = "black") -> Tensor:
    """Decode a file, scale its shorter side to `image_size`, crop the centre.

    Turned upright by its EXIF tag; transparent parts show the background, a colour name of Pillow.
    Returns float32 (C, image_size, image_size) in [0, 1], C = 1 if grey, else 3.

    Raises:
        ValueError: naming the file, when it is no readable image of 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert() would clip these to 255
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            upright = _opaque(ImageOps.exif_transpose(image), background)
            upright = upright.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    scaled = functional.resize(functional.pil_to_tensor(upright), [image_size])
    return functional.center_crop(scaled, [image_size]).float().div_(255)


def _opaque(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    visible = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, background), visible)


class ImageFiles(Split):
    """Image files and their labels; see `read_image` for what becomes of them.

    Args:
        root: folder that the paths below are relative to.
        files: (path, label) pairs.
        image_size: pixels a side.
        grey: one channel instead of three.
        background: of transparent parts.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[tuple[Path, int]],
        image_size: int,
        *,
        grey: bool,
        background: str = "black",
    ) -> None:
        self.root, self.files, self.image_size = root, files, image_size
        self.grey, self.background = grey, background

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.files[index]
        look = {"grey": self.grey, "background": self.background}
        return read_image(self.root / path, self.image_size, **look), torch.tensor(label)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Frame, then name, label and bytes of every file."""
        yield f"{self.image_size} {self.grey} {self.background}".encode()
        for path, label in self.files:
            content = (self.root / path).read_bytes()
            yield f"{path.as_posix()} {label} {len(content)}\n".encode()
            yield content


@dataclass(frozen=True, kw_only=True)
class ImageFiling:
    """How the files of a folder are filed: which of them count, and which belong together.

    Args:
        classes: whether subfolders are classes; else the images of all subfolders count, without
            labels.
        group: "stem": files of one name, such as an icon in several sizes, are in one split, and
            of files with equal bytes the first counts; None: each file stands for itself.
        min_size: pixels; images whose shorter side is below do not count.
        package: Debian package that brings the folder: named when the folder is missing.

    Raises:
        ValueError: for an argument out of its range.
    """

    classes: bool = True
    group: Literal["stem"] | None = None
    min_size: int = 0
    package: str | None = None

    def __post_init__(self) -> None:
        check_choice("group", self.group, (None, "stem"))
        check_integer("min_size", self.min_size, 0)

    def listed(self, folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
        """Class names, and the images that count, each with its label, in a fixed order.

        Raises:
            ValueError: for a folder that mixes images and subfolders that are classes.
            FileNotFoundError: for a folder that is missing or without images that count.
        """
        if not folder.is_dir():
            brings = f": `apt-get install {self.package}` brings it" if self.package else ""
            raise FileNotFoundError(f"data.folder={folder}: no such folder{brings}")
        if self.classes:
            classes, files = _list_images(folder)
        else:
            classes, paths = [], _images_below(folder, deep=True)
            files = [(path.relative_to(folder), 0) for path in paths]
        if self.min_size:
            files = [one for one in files if _shorter_side(folder / one[0]) >= self.min_size]
        if self.group is not None:
            files = _without_copies(folder, files)
        if not files:
            raise FileNotFoundError(f"{folder} holds no image of {self.min_size} pixels or more")
        return classes, files

    def split(
        self,
        files: Sequence[tuple[Path, int]],
        val_fraction: float,
        test_fraction: float,
        seed: int,
    ) -> list[list[tuple[Path, int]]]:
        """Training, validation and test files, split by seed, groups whole."""
        groups: dict[str, list[tuple[Path, int]]] = {}
        for path, label in files:
            name = path.as_posix() if self.group is None else path.stem
            groups.setdefault(name, []).append((path, label))
        whole = list(groups.values())
        parts = fraction_split(len(whole), val_fraction, test_fraction, seed)
        return [[one for row in part.tolist() for one in whole[row]] for part in parts]


class ImageFolder(SplitDataModule):
    """A folder of images, x (N, C, image_size, image_size), split by seed.

    Subfolders are classes, as in `torchvision.datasets.ImageFolder`; images that lie in the
    folder itself, or in one single subfolder, have no labels.

    Args:
        folder: where the images are.
        image_size: the shorter side is scaled to this, then the centre is cropped.
        grey: one channel instead of three.
        background: of transparent parts, a colour name of Pillow.
        filing: which files count and which belong together; None: all, each for itself.
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
        background: str = "black",
        filing: ImageFiling | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.folder = None if folder is None else Path(folder).expanduser()
        self.image_size, self.grey = check_integer("image_size", image_size, 1), grey
        self.background = check_colour("background", background)
        self.filing = filing or ImageFiling()
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
        if (folder := self.folder) is None:
            raise FileNotFoundError("no image folder given: data.folder=<folder of images>")
        self.classes, files = self.filing.listed(folder)
        parts = self.filing.split(files, self.val_fraction, self.test_fraction, self.seed)
        look = {"grey": self.grey, "background": self.background}
        return Splits(*(ImageFiles(folder, part, self.image_size, **look) for part in parts))


def check_colour(name: str, value: str) -> str:
    """Return `value` if Pillow knows the colour.

    Raises:
        ValueError: when it does not.

    >>> check_colour("background", "white")
    'white'
    """
    try:
        ImageColor.getrgb(value)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name}={value!r} is no colour: such as white, or '#808080'") from error
    return value


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


def _shorter_side(path: Path) -> int:
    """In pixels; a file that cannot be read counts as large: the loaders name it."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except OSError:
        return sys.maxsize


def _without_copies(folder: Path, files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The first of all files with equal bytes: aliases would be in two splits by two names."""
    first: dict[bytes, tuple[Path, int]] = {}
    for path, label in files:
        digest = hashlib.sha256((folder / path).read_bytes()).digest()
        first.setdefault(digest, (path, label))
    if len(first) < len(files):
        rank_zero_info(f"{folder}: {len(files) - len(first)} files are copies, left out")
    return list(first.values())
