"""Grids of sample images as PNG: one model, or dense beside compressed from equal latents."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_compress.files import write_atomically

__all__ = ["save_comparison", "save_grid"]

TILE = 48  # pixels that the longer side of a tile has at least, so that 16x16 images show
GAP = 2  # pixels between tiles
# As in the plots, the blue a little lighter: a label must read on white and on black.
DENSE_COLOUR = (30, 136, 200, 255)
COMPRESSED_COLOUR = (213, 94, 0, 255)
GIVEN_COLOUR = (128, 128, 128, 255)
Side = tuple[str, tuple[int, int, int, int], list[Image.Image]]


def _tiles(images: Tensor, name: str) -> list[Image.Image]:
    """Turn (N, C, H, W) in [0, 1] into enlarged images, every pixel one square block."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"{name} must have the shape (N, C, H, W) with C 1 or 3 and N, H, W at least 1, "
            f"got {tuple(images.shape)}"
        )
    pixels = images.detach().float().cpu()
    low, high = float(pixels.min()), float(pixels.max())
    # Rounding in a decoder may leave the range by a hair; anything more is a wrong range.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}")
    bytes_ = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    scale = max(1, math.ceil(TILE / max(images.shape[2:])))
    size = (images.shape[3] * scale, images.shape[2] * scale)
    arrays = bytes_.permute(0, 2, 3, 1).contiguous().numpy()
    nearest = Image.Resampling.NEAREST
    return [Image.fromarray(array, "RGB").resize(size, nearest) for array in arrays]


def _save(image: Image.Image, path: str | Path) -> Path:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return write_atomically(Path(path), buffer.getvalue(), what="the image", parents=True)


def _paste_row(canvas: Image.Image, tiles: list[Image.Image], left: int, top: int) -> None:
    for column, tile in enumerate(tiles):
        canvas.paste(tile, (left + column * (tile.width + GAP), top))


def save_grid(images: Tensor, path: str | Path, *, columns: int = 8) -> Path:
    """Save images (N, C, H, W) in [0, 1] as one PNG, row by row, small ones enlarged.

    Tile `i` starts at `((i % columns) * (w + 2), (i // columns) * (h + 2))` pixels, where
    `w, h` is the size of an enlarged tile; what lies between is transparent.

    Raises:
        ValueError: for another shape, another range, NaN, or `columns` below 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_grid(torch.rand(5, 1, 16, 16), f"{folder}/a.png", columns=3)
    ...     with Image.open(path) as image:
    ...         image.size
    (148, 98)
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tiles = _tiles(images, "images")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width, height = tiles[0].size
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    for row in range(rows):
        _paste_row(canvas, tiles[row * columns : (row + 1) * columns], 0, row * (height + GAP))
    return _save(canvas, path)


def _font() -> ImageFont.FreeTypeFont:
    # The font inside matplotlib: the same labels on every machine, whatever is installed.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 14)


def save_comparison(
    dense: Tensor,
    compressed: Tensor,
    path: str | Path,
    *,
    given: Mapping[str, Tensor] | None = None,
    columns: int = 8,
) -> Path:
    """Save dense and compressed samples (N, C, H, W) in [0, 1], drawn from the same latents.

    Each row of dense images stands directly above the row of compressed ones that belongs to
    it, below those that both were given (by name, N as many), and all are labelled. The background
    is transparent.

    Raises:
        ValueError: when the shapes differ, or as for `save_grid`.
    """
    if dense.shape != compressed.shape:
        raise ValueError(
            "dense and compressed must be drawn from the same latents: shapes "
            f"{tuple(dense.shape)} and {tuple(compressed.shape)} differ"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    uneven = [name for name, images in (given or {}).items() if len(images) != len(dense)]
    if uneven:
        raise ValueError(f"{uneven[0]} must be {len(dense)} images, as many as there are samples")
    sides: list[Side] = [
        (name, GIVEN_COLOUR, _tiles(images, name)) for name, images in (given or {}).items()
    ]
    sides += [
        ("dense", DENSE_COLOUR, _tiles(dense, "dense")),
        ("compressed", COMPRESSED_COLOUR, _tiles(compressed, "compressed")),
    ]
    return _save(_compare(sides, min(columns, len(dense))), path)


def _compare(sides: list[Side], columns: int) -> Image.Image:
    """Draw rows of all sides, one below the other, a wider gap between their groups."""
    font, count = _font(), len(sides[0][2])
    width, height = sides[0][2][0].size
    margin = 18 + math.ceil(max(font.getlength(name) for name, _, _ in sides))
    group = len(sides) * (height + GAP) + 8
    rows = math.ceil(count / columns)
    size = (margin + columns * (width + GAP) - GAP, rows * group - 8 - GAP)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for row in range(rows):
        for place, (name, colour, tiles) in enumerate(sides):
            top = row * group + place * (height + GAP)
            draw.text((0, top + height / 2), name, font=font, fill=colour, anchor="lm")
            draw.rectangle((margin - 8, top, margin - 5, top + height - 1), fill=colour)
            _paste_row(canvas, tiles[row * columns : (row + 1) * columns], margin, top)
    return canvas
