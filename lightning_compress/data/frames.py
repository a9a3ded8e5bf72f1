"""How images of one size get into square frames of another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lightning_compress.data.checks import check_choice, check_whole

__all__ = ["check_frame", "fit_images"]

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
    check_whole("image_size", image_size, 1)
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
