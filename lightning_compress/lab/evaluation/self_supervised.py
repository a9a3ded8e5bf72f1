"""Features of unlabelled data: a small network that solves a pretext task of the data's own.

A pretext task changes an example in one of a few known ways, and the network learns to tell which:
labels come for nothing. Its accuracy on held-out data says how much there was to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.lab.evaluation.features import (
    BATCH_SIZE,
    LEARNING_RATE,
    MIN_SIZE,
    Batch,
    FeatureExtractor,
    FeatureNetwork,
    cached_extractor,
    default_epochs,
    drawn_network,
    train_on,
)

__all__ = ["PRETEXT_TASKS", "PretextTask", "self_supervised_network"]


@dataclass(frozen=True)
class PretextTask:
    """A task whose labels come from the data alone.

    Args:
        predicts: what is predicted, in the field's words.
        classes: number of ways to change images of a height and width.
        change: images (N, C, H, W) and the number of a way -> images, of one size for all ways.
    """

    predicts: str
    classes: Callable[[int, int], int]
    change: Callable[[Tensor, int], Tensor]

    def examples(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), each changed in every way, and the ways as labels.

        >>> x, y = PRETEXT_TASKS["rotation"].examples(torch.rand(5, 1, 8, 8))
        >>> x.shape, y.unique().tolist()
        (torch.Size([20, 1, 8, 8]), [0, 1, 2, 3])
        """
        ways = range(self.classes(*x.shape[2:]))
        changed = [self.change(x, way) for way in ways]
        return torch.cat(changed), torch.arange(len(ways)).repeat_interleave(len(x))


def rotated(x: Tensor, way: int) -> Tensor:
    """Images (N, C, H, W) turned by `way` quarters; those that are not square, by halves."""
    square = x.shape[2] == x.shape[3]
    return torch.rot90(x, way if square else 2 * way, dims=(2, 3))


def direction_and_band(x: Tensor, way: int) -> Tensor:
    """Spectrograms (N, C, M, T), forwards or backwards, of which one band of three is kept.

    The bands are 3/4 of the M rows and overlap: the first, the middle and the last rows.
    """
    height = max(MIN_SIZE, x.shape[2] * 3 // 4)
    start = (x.shape[2] - height) * (way // 2) // 2
    band = x[:, :, start : start + height]
    return band.flip(3) if way % 2 else band


PRETEXT_TASKS = {
    # Gidaris et al. 2018, https://arxiv.org/abs/1803.07728
    "rotation": PretextTask("rotation", lambda h, w: 4 if h == w else 2, rotated),
    # the arrow of time (Wei et al. 2018) and a shift of frequency
    "direction_and_band": PretextTask(
        "direction of time and frequency band", lambda _h, _w: 6, direction_and_band
    ),
}


def self_supervised_network(
    train: Tensor,
    test: Tensor,
    *,
    task: str,
    cache_dir: Path,
    fingerprint: str,
    seed: int = 0,
    epochs: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> FeatureExtractor:
    """Train a feature network on a pretext task of unlabelled images, or take it from the cache.

    The caller's random streams do not move. `test_accuracy` of the result is the accuracy in the
    pretext task on the test split.

    Args:
        train: images (N, C, H, W) in [0, 1].
        test: the same, held out.
        task: a key of `PRETEXT_TASKS`.
        cache_dir: folder of the cache; each network is one file, named by its content hash.
        fingerprint: identifies the data, such as `"icons:3f2a"`.
        seed: of the initial weights and of the order of the images.
        epochs: passes over the training split, each image changed in every way; None chooses by
            its size.
        progress: called with one line of text after each epoch.

    Raises:
        ValueError: for an unknown task, and images that are not floats in [0, 1] of 8 x 8 or more.
    """
    if task not in PRETEXT_TASKS:
        raise ValueError(f"pretext task {task!r}: valid are {sorted(PRETEXT_TASKS)}")
    for split, x in (("train", train), ("test", test)):
        _check(split, x)
    pretext = PRETEXT_TASKS[task]
    classes = pretext.classes(*train.shape[2:])
    epochs = default_epochs(classes * len(train)) if epochs is None else epochs
    network = drawn_network(train.shape[1], classes, seed=seed)
    recipe = {
        "data": fingerprint,
        "architecture": repr(network),
        "training": f"{task}, Adam {LEARNING_RATE}, batch {BATCH_SIZE}, {epochs} epochs, "
        f"seed {seed}",
        "features": "unit mean square",
    }

    def fit() -> float:
        _train(network, train, pretext, epochs=epochs, seed=seed, progress=progress)
        network.eval().set_scale(train)
        return _accuracy(network, test, pretext)

    return cached_extractor(
        network, recipe, fit, name=task, cache_dir=cache_dir, task=pretext.predicts
    )


def _check(split: str, x: Tensor) -> None:
    if x.dim() != 4 or len(x) == 0 or min(x.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"{split}: images must be (N, C, H, W) with H, W >= {MIN_SIZE}, got {tuple(x.shape)}"
        )
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        low, high = x.min().item(), x.max().item()
        raise ValueError(f"{split}: images must be floats in [0, 1], got {x.dtype}, {low}..{high}")


def _train(
    network: FeatureNetwork,
    x: Tensor,
    pretext: PretextTask,
    *,
    epochs: int,
    seed: int,
    progress: Callable[[str], None] | None,
) -> None:
    """Adam and cross-entropy; each batch holds its images changed in every way."""
    order = torch.Generator().manual_seed(seed)
    images = max(1, BATCH_SIZE // pretext.classes(*x.shape[2:]))

    def batches() -> Iterator[Batch]:
        for rows in torch.randperm(len(x), generator=order).split(images):
            changed, ways = pretext.examples(x[rows])
            yield changed, ways, len(rows)

    train_on(network, batches, epochs=epochs, examples=len(x), progress=progress)


@torch.no_grad()
def _accuracy(network: FeatureNetwork, x: Tensor, pretext: PretextTask) -> float:
    hits = 0
    for rows in x.split(BATCH_SIZE):
        changed, ways = pretext.examples(rows)
        hits += int((network(changed).argmax(1) == ways).sum())
    return hits / (len(x) * pretext.classes(*x.shape[2:]))
