"""A small classifier whose inner layer serves as the feature space of fidelity metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's own alias)

__all__ = ["FeatureNetwork", "default_epochs", "train_classifier"]

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

    >>> network = FeatureNetwork(channels=1, num_classes=10, dim=64)
    >>> network.features(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 64])
    """

    def __init__(self, channels: int, num_classes: int, dim: int = 64) -> None:
        super().__init__()
        self.channels, self.num_features = channels, dim
        self.body = nn.Sequential(
            _block(channels, 16),
            nn.MaxPool2d(2),
            _block(16, 32),
            nn.MaxPool2d(2),
            _block(32, 64),
            nn.AdaptiveAvgPool2d(4),  # some position is kept: where strokes lie matters
            nn.Flatten(),
            nn.Linear(64 * 16, dim),
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
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    network.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        # the last, smaller batch is kept unless BatchNorm could not take it
        for rows in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            if len(rows) == 1 and len(x) > 1:
                continue
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        if progress is not None:
            progress(f"feature network: epoch {epoch}/{epochs}, loss {total / len(x):.3f}")
