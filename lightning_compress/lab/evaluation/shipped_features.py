"""Feature networks that ship with the package, so that all machines measure in one space."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's own alias)

from lightning_compress.files import write_atomically
from lightning_compress.lab.evaluation.features import (
    Batch,
    FeatureExtractor,
    FeatureNetwork,
    FrozenFeatures,
    drawn_network,
    train_on,
)
from lightning_compress.lab.evaluation.likelihood import accuracy
from lightning_compress.lcz.artifact import load_compressed, save_compressed

__all__ = ["FOLDER", "RECIPES", "Recipe", "image_set_digest", "ship", "shipped_extractor"]

FOLDER = Path(__file__).with_name("networks")
INDEX = "networks.json"
COMMAND = "make feature-networks"


@dataclass(frozen=True)
class Recipe:
    """How a shipped classifier is trained: one-cycle learning rate, augmented images.

    Args:
        width: see `FeatureNetwork`.
        epochs: passes over the training split.
        flip: whether images are mirrored at random.
        shift: most pixels that images are moved by, each way.
        batch_size: images a step.
        peak: highest learning rate of the cycle (Smith and Topin 2018, arXiv:1708.07120).
    """

    width: int
    epochs: int
    flip: bool
    shift: int
    batch_size: int = 128
    peak: float = 8e-3


RECIPES = {
    "fashion_mnist": Recipe(width=32, epochs=6, flip=True, shift=1),
    "digits": Recipe(width=16, epochs=60, flip=False, shift=1, batch_size=64),
}


def image_set_digest(x: Tensor) -> str:
    """Sixteen hexadecimal digits that stand for images (N, C, H, W), in whatever order.

    >>> x = torch.rand(3, 1, 8, 8)
    >>> image_set_digest(x) == image_set_digest(x.flip(0))
    True
    """
    content = (x * 255).round().to(torch.uint8).contiguous()
    each = sorted(hashlib.sha256(image.numpy().tobytes()).digest() for image in content)
    return hashlib.sha256(b"".join(each) + repr(tuple(x.shape)).encode()).hexdigest()[:16]


def shipped_extractor(
    dataset: str, test: Tensor, *, folder: Path = FOLDER
) -> FeatureExtractor | None:
    """The network that ships for a data set; None where none was made for these test images.

    It is only taken where the test split holds the very images that it was kept from while it was
    trained: a split by another seed may have them among its test rows.

    Args:
        dataset: name of the data, such as "digits".
        test: images (N, C, H, W) of the test split, in [0, 1].
        folder: where the networks lie.

    Warns:
        UserWarning: when its file is missing or damaged, with the command that makes it.
    """
    index = folder / INDEX
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    about = known.get(dataset)
    if about is None or about["test_images"] != image_set_digest(test):
        return None
    path = folder / f"{dataset}.lcz"
    network = FeatureNetwork(test.shape[1], about["num_classes"], width=about["width"])
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError("its content is not what was shipped")
        load_compressed(path, network)
    except (OSError, ValueError, RuntimeError) as error:
        warnings.warn(
            f"feature network {path}: {error}; another one is trained, whose distances cannot be "
            f"compared with those of the shipped one ({COMMAND} makes it again)",
            stacklevel=2,
        )
        return None
    name = f"{dataset}-shipped-{about['sha256'][:8]}"
    return FeatureExtractor(FrozenFeatures(network), name, about["test_accuracy"])


def ship(
    dataset: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    folder: Path = FOLDER,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a data set's network and write it where `shipped_extractor` finds it.

    Args:
        dataset: one of `RECIPES`.
        train: images (N, C, H, W) in [0, 1] and labels (N,).
        test: the same; only for the accuracy, which is that of the written file.
        num_classes: labels lie in `[0, num_classes)`.
        folder: where to write; it is made if it does not exist.
        seed: of weights, order and augmentation.
        progress: called with one line of text after each epoch.

    Returns:
        What the index says of it: accuracy, digests and recipe.

    Raises:
        ValueError: for a data set without a recipe.
    """
    if dataset not in RECIPES:
        raise ValueError(f"dataset={dataset!r}: valid are {sorted(RECIPES)}")
    recipe = RECIPES[dataset]
    network = drawn_network(train[0].shape[1], num_classes, seed=seed, width=recipe.width)
    train_augmented(network, *train, recipe, seed=seed, progress=progress)
    network.eval().set_scale(train[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dataset}.lcz"
    save_compressed(network, path, float_dtype="fp16")
    load_compressed(path, network)
    about = {
        "test_accuracy": accuracy(network.eval(), *test)["accuracy"],
        "test_images": image_set_digest(test[0]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "num_classes": num_classes,
        "width": recipe.width,
        "recipe": f"{recipe}, seed {seed}",
    }
    index = folder / INDEX
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    text = json.dumps(known | {dataset: about}, indent=2, sort_keys=True) + "\n"
    write_atomically(index, text.encode(), what="the index of feature networks")
    return about


def train_augmented(
    network: FeatureNetwork,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train on images (N, C, H, W) and labels (N,) in place; no global random stream is read."""
    draws = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * (len(x) // recipe.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak, weight_decay=0.02)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak, total_steps=steps)

    def batches() -> Iterator[Batch]:
        whole = len(x) // recipe.batch_size * recipe.batch_size
        for rows in torch.randperm(len(x), generator=draws)[:whole].split(recipe.batch_size):
            yield augmented(x[rows], recipe, draws), y[rows], len(rows)

    train_on(
        network,
        batches,
        epochs=recipe.epochs,
        examples=len(x),
        optimizer=optimizer,
        schedule=cycle,
        label_smoothing=0.05,
        progress=progress,
    )


def augmented(x: Tensor, recipe: Recipe, draws: torch.Generator) -> Tensor:
    """Images (N, C, H, W) mirrored and moved at random, as a recipe has it."""
    if recipe.flip:
        mirrored = torch.rand(len(x), generator=draws) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if (most := recipe.shift) > 0:
        height, width = x.shape[2:]
        top, left = torch.randint(2 * most + 1, (2,), generator=draws).tolist()
        x = F.pad(x, (most,) * 4)[:, :, top : top + height, left : left + width]
    return x
