"""Characters in two typefaces, rendered from installed fonts: pairs for image-to-image models."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_compress.lab.data.base import (
    Kind,
    SplitDataModule,
    Splits,
    TensorSplit,
    check_fractions,
    check_integer,
    fraction_split,
    seeded_permutation,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer, Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = ["GlyphPairs", "font_file"]
PACKAGES = {
    "AR PL UKai": "fonts-arphic-ukai",
    "AR PL UMing": "fonts-arphic-uming",
    "WenQuanYi Zen Hei": "fonts-wqy-zenhei",
    "Noto Sans CJK": "fonts-noto-cjk",
    "Noto Serif CJK": "fonts-noto-cjk",
}  # of Debian, by the beginning of a family's name
IDEOGRAPHS = range(0x4E00, 0x9FA6)  # the first block of unified ideographs, without later additions
NO_CHARACTER = "\uffff"  # what a font draws for characters that it lacks
FILLED = 0.9  # of an image's side: an em


def font_file(name: str | Path) -> tuple[Path, int]:
    """File of a font and its index there, by the file's path or by the family's name.

    Raises:
        FileNotFoundError: when it is not installed, with the Debian package that has it.

    >>> font_file("No Such Family")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    if Path(name).is_file():
        return Path(name), 0
    if shutil.which("fc-match") is None:
        raise FileNotFoundError(
            f"font {str(name)!r}: no such file, and without fc-match no family is found by its "
            "name: `apt-get install fontconfig` brings it, or give the path of a font file"
        )
    families, file, index = _told("fc-match", "--format=%{family}\n%{file}\n%{index}", name)
    if not any(one.casefold() == str(name).casefold() for one in families.split(",")):
        raise FileNotFoundError(f"font {str(name)!r} is not installed: {_way(str(name))}")
    return Path(file), int(index) & 0xFFFF  # named instances of variable fonts are in the high bits


def _told(*command: str | Path) -> list[str]:
    """The lines that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def _way(name: str) -> str:
    """How a family comes to be found: by its whole name, or by a package."""
    families = {one for line in _told("fc-list", ":", "family") for one in line.split(",") if one}
    longer = sorted(one for one in families if one.casefold().startswith(name.casefold()))
    if longer:
        return f"these are: {', '.join(map(repr, longer))}"
    package = next((one for start, one in PACKAGES.items() if name.startswith(start)), None)
    way = f"`apt-get install {package}` brings it" if package else "install it"
    return f"{way}, or give the path of a font file"


class GlyphPairs(SplitDataModule):
    """Pairs of glyphs: x the character in one typeface, y in another, (N, 1, S, S) in [0, 1].

    White on black. Characters are split by seed, so that those of a test are new. Only characters
    that both fonts have are drawn.

    Args:
        source: typeface of x: a family's name, found by `fc-match`, or a font file.
        target: typeface of y.
        characters: that are drawn; None: the unified ideographs.
        limit: use only so many of them, drawn by `seed`; None: all.
        image_size: pixels a side.
        val_fraction: part of the characters to validate on.
        test_fraction: part of the characters to test on.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range; in `setup`, when too few characters are in
            both fonts.
        FileNotFoundError: in `setup`, for a font that is not installed.
    """

    kind: ClassVar[Kind] = "image_pairs"
    paired: ClassVar[bool] = True

    def __init__(
        self,
        source: str | Path = "WenQuanYi Zen Hei",
        target: str | Path = "AR PL UKai CN",
        *,
        characters: str | None = None,
        limit: int | None = 4000,
        image_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.source, self.target, self.characters = source, target, characters
        self.limit = None if limit is None else check_integer("limit", limit, 3)
        self.image_size = check_integer("image_size", image_size, 8)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    @property
    def dims(self) -> dict[str, int]:
        """`image_size` and `channels`."""
        return {"image_size": self.image_size, "channels": 1}

    def build(self) -> Splits:
        """Find the fonts and the characters of both, draw them, split them."""
        fonts = [self._font(name) for name in (self.source, self.target)]
        chosen = self._chosen(fonts)
        x, y = (torch.stack([self._drawn(font, one) for one in chosen]) for font in fonts)
        parts = fraction_split(len(chosen), self.val_fraction, self.test_fraction, self.seed)
        return Splits(*(TensorSplit(x[rows], y[rows]) for rows in parts))

    def _font(self, name: str | Path) -> ImageFont.FreeTypeFont:
        path, index = font_file(name)
        return ImageFont.truetype(str(path), round(FILLED * self.image_size), index=index)

    def _chosen(self, fonts: list[ImageFont.FreeTypeFont]) -> list[str]:
        given = map(chr, IDEOGRAPHS) if self.characters is None else iter(self.characters)
        every = list(dict.fromkeys(given))
        order = seeded_permutation(len(every), self.seed).tolist()
        common = _in_all((every[index] for index in order), fonts)
        found = [one for one, _ in zip(common, range(self.limit or len(every)), strict=False)]
        if len(found) < 3:
            raise ValueError(
                f"{self.source} and {self.target} have {len(found)} of the characters in common: "
                "three splits need three at least; choose others by data.characters"
            )
        return found

    def _drawn(self, font: ImageFont.FreeTypeFont, character: str) -> Tensor:
        """One glyph in the middle of its em, (1, S, S)."""
        image = Image.new("L", (self.image_size, self.image_size))
        middle = self.image_size / 2
        ImageDraw.Draw(image).text((middle, middle), character, fill=255, font=font, anchor="mm")
        return torch.from_numpy(np.array(image, dtype=np.float32) / 255).unsqueeze(0)


def _in_all(characters: Iterator[str], fonts: list[ImageFont.FreeTypeFont]) -> Iterator[str]:
    """The characters that each font has a visible glyph of."""
    missing = [_glyph(font, NO_CHARACTER) for font in fonts]
    for one in characters:
        glyphs = [_glyph(font, one) for font in fonts]
        if all(any(glyph) and glyph != lacks for glyph, lacks in zip(glyphs, missing, strict=True)):
            yield one


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """Its pixels."""
    return bytes(cast("Buffer", font.getmask(character)))
