"""Feature extractors of fidelity metrics: the data set's own network, or Inception."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's own alias)
from torch.utils.data import Dataset

from lightning_compress.errors import require
from lightning_compress.files import write_atomically
from lightning_compress.lab.evaluation.likelihood import accuracy

__all__ = [
    "Batch",
    "FeatureExtractor",
    "FeatureNetwork",
    "FrozenFeatures",
    "cached_extractor",
    "default_epochs",
    "drawn_network",
    "inception_extractor",
    "train_classifier",
    "train_on",
    "trained_feature_network",
]
MIN_SIZE = 8
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


class FeatureNetwork(nn.Module):
    """Convolutional classifier of images (N, C, H, W) in [0, 1], any size from 8 x 8.

    Args:
        channels: C of the images.
        num_classes: size of the logits.
        dim: size of the features, the layer before the last activation.
        width: channels of the first convolution; the next two have twice and four times as many.

    >>> network = FeatureNetwork(channels=1, num_classes=10, dim=64)
    >>> network.features(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 64])
    """

    def __init__(self, channels: int, num_classes: int, dim: int = 64, width: int = 16) -> None:
        super().__init__()
        self.channels, self.num_features = channels, dim
        self.body = nn.Sequential(
            _block(channels, width),
            nn.MaxPool2d(2),
            _block(width, 2 * width),
            nn.MaxPool2d(2),
            _block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(4),  # some position is kept: where strokes lie matters
            nn.Flatten(),
            nn.Linear(4 * width * 16, dim),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dim, num_classes))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Features (N, dim) of images (N, C, H, W), of unit mean square once trained.

        The kernel distance cubes products of features: without a common scale its numbers mean
        nothing from one data set to the next.

        Raises:
            ValueError: when the images have another number of channels, or are below 8 x 8.
        """
        if x.dim() != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"images must be (N, {self.channels}, H, W) with H, W >= {MIN_SIZE}, "
                f"got {tuple(x.shape)}"
            )
        return self.body(x) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.head(self.features(x) * self.scale)

    @torch.no_grad()
    def set_scale(self, x: Tensor, batch_size: int = 256) -> None:
        """Measure the features' root mean square on images (N, C, H, W), in eval mode."""
        self.scale.fill_(1.0)
        squares = [self.features(rows).square().mean(1) for rows in x.split(batch_size)]
        self.scale.copy_(torch.cat(squares).mean().sqrt().clamp(min=1e-6))


def default_epochs(examples: int) -> int:
    """Passes over the data that suffice: 12 for digits, 2 for 55,000 images.

    >>> default_epochs(1_200), default_epochs(55_000)
    (12, 2)
    """
    return max(2, min(12, 32_000 // max(examples, 1)))


def drawn_network(channels: int, classes: int, *, seed: int, **sizes: int) -> FeatureNetwork:
    """A network whose weights come from `seed`; the caller's random streams do not move."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        return FeatureNetwork(channels, classes, **sizes)


Batch = tuple[Tensor, Tensor, int]  # images, classes, and how many examples they are of


def train_on(
    network: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    *,
    epochs: int,
    examples: int,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    label_smoothing: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train a classifier in place with cross-entropy.

    Args:
        network: images -> (N, classes).
        batches: those of one epoch, anew at each call.
        epochs: calls of it.
        examples: of the training split, over which the loss that is told is a mean.
        optimizer: of the network; None: Adam.
        schedule: of its learning rate, a step a batch.
        label_smoothing: share of each label that is spread over all classes.
        progress: called with one line of text after each epoch.
    """
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    network.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for images, classes, count in batches():
            loss = F.cross_entropy(network(images), classes, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += float(loss.detach()) * count
        if progress is not None:
            progress(f"feature network: epoch {epoch}/{epochs}, loss {total / examples:.3f}")


def train_classifier(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train on images (N, C, H, W) and labels (N,) in place, with Adam and cross-entropy.

    The order of the examples comes from `seed` alone; no global random stream is read.
    """
    order = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        for rows in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            # the last, smaller batch is kept unless BatchNorm could not take it
            if len(rows) > 1 or len(x) == 1:
                yield x[rows], y[rows], len(rows)

    train_on(network, batches, epochs=epochs, examples=len(x), progress=progress)


Labelled = tuple[Tensor, Tensor] | Dataset[Any]


class FrozenFeatures(nn.Module):
    """A network's `features`, for ever in eval mode and without trainable parameters.

    torchmetrics takes it as `feature=`: images (N, C, H, W) in [0, 1] in, (N, num_features) out.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.num_features = network.num_features
        self.train(False)

    def train(self, mode: bool = True) -> FrozenFeatures:  # noqa: ARG002
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, num_features) of images (N, C, H, W) in [0, 1]."""
        return self.network.features(x)


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature space for fidelity metrics; numbers from different ones are never compared.

    Args:
        module: maps images (N, C, H, W) in [0, 1] to features (N, D); frozen, in eval mode.
        name: what the report prints beside each number, such as `"digits-cnn-1f0c2a9b"`.
        test_accuracy: of the network in its own task on the test split; None where unknown.
        task: what the network was trained to predict: labels, or what a pretext task hides.
    """

    module: nn.Module
    name: str
    test_accuracy: float | None
    task: str = "labels"


def trained_feature_network(
    train: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    cache_dir: Path,
    fingerprint: str,
    seed: int = 0,
    epochs: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> FeatureExtractor:
    """Train the data set's own feature network, or take it from the cache.

    The caller's random streams do not move. The test split is only used for the accuracy.

    Args:
        train: images (N, C, H, W) in [0, 1] and labels (N,), or a data set of such pairs.
        test: the same for the test split.
        num_classes: labels lie in `[0, num_classes)`.
        cache_dir: folder of the cache; each network is one file, named by its content hash.
        fingerprint: identifies the data, such as `"digits:3f2a"`; the part before the first
            colon becomes part of the extractor's name.
        seed: of the initial weights and of the order of the examples.
        epochs: passes over the training split; None chooses by its size.
        progress: called with one line of text after each epoch.

    Raises:
        ValueError: when images are not floats in [0, 1] or labels are out of range.
    """
    x, y = _tensors(train, "train", num_classes)
    epochs = default_epochs(len(x)) if epochs is None else epochs
    network = drawn_network(x.shape[1], num_classes, seed=seed)
    recipe = {
        "data": fingerprint,
        "architecture": repr(network),
        "training": f"Adam {LEARNING_RATE}, batch {BATCH_SIZE}, {epochs} epochs, seed {seed}",
        "features": "unit mean square",
    }

    def fit() -> float:
        train_classifier(network, x, y, epochs=epochs, seed=seed, progress=progress)
        network.eval().set_scale(x)
        return accuracy(network, *_tensors(test, "test", num_classes))["accuracy"]

    return cached_extractor(network, recipe, fit, name="cnn", cache_dir=cache_dir)


def cached_extractor(
    network: FeatureNetwork,
    recipe: Mapping[str, str],
    fit: Callable[[], float],
    *,
    name: str,
    cache_dir: Path,
    task: str = "labels",
) -> FeatureExtractor:
    """A feature network from the cache, or trained now and stored there.

    Args:
        network: untrained; filled in place.
        recipe: everything that decides the trained weights; its hash names the file. `"data"`
            identifies the data: what stands before its first colon begins the extractor's name.
        fit: trains the network and returns its accuracy on held-out data.
        name: of the kind of network.
        cache_dir: folder of the cache.
        task: of the network.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    data = recipe["data"]
    dataset = data.split(":")[0] if ":" in data else "data"
    path = Path(cache_dir) / f"{dataset}-{name}-{digest[:16]}.safetensors"
    if (score := _load(network, path)) is None:
        score = _store(network, path, recipe, fit())
    called = f"{dataset}-{name}-{digest[:8]}"
    return FeatureExtractor(FrozenFeatures(network), called, score, task)


def inception_extractor() -> FeatureExtractor:
    """The standard Inception-v3 features (2048) of FID; grey images are repeated to RGB.

    Downloads its weights on first use.

    Raises:
        MissingExtraError: when torch-fidelity is not installed.
    """
    require("torch_fidelity", extra="inception")
    from torchmetrics.image.fid import NoTrainInceptionV3

    inception = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    return FeatureExtractor(_InceptionFeatures(inception), "inception-v3-2048", None)


class _InceptionFeatures(nn.Module):
    """Inception wants RGB bytes; the package's images are floats in [0, 1]."""

    num_features = 2048

    def __init__(self, inception: nn.Module) -> None:
        super().__init__()
        self.inception = inception.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        rgb = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return self.inception((rgb.clamp(0, 1) * 255).round().byte())


def _tensors(data: Labelled, split: str, num_classes: int) -> tuple[Tensor, Tensor]:
    if isinstance(data, Dataset):
        pairs = [data[index] for index in range(len(data))]  # pyright: ignore[reportArgumentType]
        data = (torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs]))
    x, y = data[0], data[1].long()
    if x.dim() != 4 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"{split}: images must be (N, C, H, W) and labels (N,), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        low, high = x.min().item(), x.max().item()
        raise ValueError(f"{split}: images must be floats in [0, 1], got {x.dtype}, {low}..{high}")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"{split}: labels must lie in [0, {num_classes}), got {int(y.min())}..{int(y.max())}"
        )
    return x.float(), y


def _load(network: nn.Module, path: Path) -> float | None:
    """Fill the network from the cache; None when it is not there."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            score = float((stored.metadata() or {})["test_accuracy"])
            network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged and is built again: {error}", stacklevel=3)
        path.unlink(missing_ok=True)
        return None
    return score


def _store(network: nn.Module, path: Path, recipe: Mapping[str, str], score: float) -> float:
    """Write weights and record as one file, so that no reader sees one without the other."""
    if (theirs := _load(network, path)) is not None:
        return theirs  # another process was faster: both go on with the same network
    record = {**recipe, "test_accuracy": repr(score)}
    content = save(network.state_dict(), metadata=record)
    try:
        write_atomically(path, content, what="the feature network", parents=True)
    except OSError as error:  # it is here all the same: no reason to lose a run
        warnings.warn(f"{error}: it is trained again next time", stacklevel=3)
    return score
