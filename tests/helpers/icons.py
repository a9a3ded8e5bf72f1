"""A small icon theme: coloured discs on transparent ground, each in two sizes."""

import numpy as np
from PIL import Image


def discs(folder, count=40, sizes=(16, 24)):
    """Write `count` icons in each size; returns the folder."""
    draw = np.random.default_rng(0)
    for index in range(count):
        colour, (x, y), radius = draw.integers(0, 256, 3), draw.uniform(0.3, 0.7, 2), 0.3
        for size in sizes:
            at = (np.arange(size) + 0.5) / size
            inside = (at[None] - x) ** 2 + (at[:, None] - y) ** 2 < radius**2
            pixels = np.zeros((size, size, 4), np.uint8)
            pixels[inside] = (*colour, 255)
            home = folder / f"{size}x{size}"
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(home / f"disc{index}.png")
    return folder
