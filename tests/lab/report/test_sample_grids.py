"""Pixels of the saved pictures against the tensors they came from."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_compress.lab.report import sample_grids
from lightning_compress.lab.report.sample_grids import save_comparison, save_grid


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGBA")).astype(int)


def block(image, scale):
    """The tile that an image (C, H, W) must become, by repetition."""
    array = np.rint(image.numpy() * 255).astype(int)
    array = np.broadcast_to(array, (3, *array.shape[1:]))
    return array.repeat(scale, axis=1).repeat(scale, axis=2).transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("shape", "scale"), [((7, 1, 16, 16), 3), ((5, 3, 8, 5), 6), ((2, 1, 64, 64), 1)]
)
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_grid_holds_every_image_in_order(tmp_path, shape, scale, columns):
    images = torch.rand(shape)
    picture = pixels(save_grid(images, tmp_path / "ä b.png", columns=columns))
    height, width = shape[2] * scale, shape[3] * scale
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        tile = picture[top : top + height, left : left + width]
        np.testing.assert_array_equal(tile[..., :3], block(image, scale))
        assert (tile[..., 3] == 255).all()
    assert (picture[..., 3] == 255).sum() == len(images) * height * width


@pytest.mark.parametrize("given", [(), ("condition", "real")])
def test_comparison_puts_each_dense_row_above_its_compressed_row(tmp_path, given):
    dense, compressed, *others = torch.rand(2 + len(given), 10, 1, 16, 16)
    above = dict(zip(given, others, strict=True))
    made = save_comparison(dense, compressed, tmp_path / "c.png", given=above, columns=4)
    picture = pixels(made)
    left = picture.shape[1] - (4 * 50 - 2)
    assert left > 60  # room for the labels
    sides = [*others, dense, compressed]
    for index in range(10):
        x = left + index % 4 * 50
        y = index // 4 * (len(sides) * 50 + 8)
        for place, images in enumerate(sides):
            top = y + 50 * place
            tile = picture[top : top + 48, x : x + 48, :3]
            np.testing.assert_array_equal(tile, block(images[index], 3))
    labels = picture[:, : left - 10]
    for colour in (sample_grids.DENSE_COLOUR, sample_grids.COMPRESSED_COLOUR):
        assert (labels == colour).all(axis=-1).any()


def test_values_a_hair_outside_are_clamped(tmp_path):
    picture = pixels(save_grid(torch.tensor([-5e-4, 1.0005]).reshape(1, 1, 1, 2), tmp_path / "a"))
    assert picture[0, 0].tolist() == [0, 0, 0, 255]
    assert picture[0, -1].tolist() == [255, 255, 255, 255]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 16, 16), r"shape \(N, C, H, W\).*got \(2, 16, 16\)"),
        (torch.zeros(2, 2, 4, 4), r"C 1 or 3.*got \(2, 2, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), "at least 1"),
        (torch.full((1, 1, 2, 2), 1.5), r"in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((1, 1, 2, 2), -1.0), "got values from -1 to -1"),
        (torch.full((1, 1, 2, 2), float("nan")), "got values from nan"),
    ],
)
def test_wrong_images_are_refused(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        save_grid(images, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(tmp_path):
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        save_grid(images, tmp_path / "a.png", columns=0)
    with pytest.raises(ValueError, match="columns must be at least 1, got -1"):
        save_comparison(images, images, tmp_path / "a.png", columns=-1)
    with pytest.raises(ValueError, match="same latents"):
        save_comparison(images, images[:1], tmp_path / "a.png")
    with pytest.raises(ValueError, match="real must be 2 images"):
        save_comparison(images, images, tmp_path / "a.png", given={"real": images[:1]})
