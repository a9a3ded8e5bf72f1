"""Classifiers: small references for the callbacks, and feature networks."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    BaseModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.networks import ResNet18Network, simple_network

__all__ = ["ResNet18", "SimpleNet"]

Batch = tuple[Tensor, Tensor]
SMALL_IMAGE = 64  # below it ResNet-18's own stem would leave too few positions


class _Classifier(BaseModel):
    """Cross-entropy, Adam and accuracy around a network `net`."""

    deployed = ("net",)
    kind = "classifier"
    net: nn.Module

    def __init__(self, image_size: int, channels: int, num_classes: int, lr: float) -> None:
        super().__init__()
        self.image_size = check_count("image_size", image_size, least=4)
        self.channels = check_count("channels", channels)
        check_count("num_classes", num_classes, least=2)
        check_range("lr", lr, 0)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) in [0, 1] -> logits (N, num_classes)."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:  # noqa: ARG002
        """Cross-entropy in nats."""
        loss = functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("train/loss", loss, batch_size=len(batch[1]), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log `val/loss` and `val/accuracy`."""
        logits = self(batch[0]).float()
        loss = functional.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("val/loss", loss, batch_size=len(batch[1]))
        self.log("val/accuracy", self.accuracy, batch_size=len(batch[1]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the network."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])

    def parts(self) -> Parts:
        """The network, images -> logits."""
        shape = (SAMPLE_BATCH, self.channels, self.image_size, self.image_size)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return {"net": (self.net, (x.to(self.dtype),))}


class SimpleNet(_Classifier):
    """Two convolutions and two linear layers.

    Args:
        image_size: at least 4; from the data when the app builds the model.
        channels: channels of the image.
        num_classes: number of classes.
        width: channels of the first convolution.
        lr: Adam's learning rate.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, with the valid ones.

    >>> SimpleNet(image_size=16, channels=1, num_classes=10)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 1,
        num_classes: int,
        width: int = 32,
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__(image_size, channels, num_classes, lr)
        self.save_hyperparameters()
        wide = scaled_width(width, width_multiplier)
        self.net = simple_network(image_size, channels, num_classes=num_classes, width=wide)


class ResNet18(_Classifier):
    """torchvision's ResNet-18; images under 64 pixels get a 3x3 stem without max-pool.

    Args:
        image_size: at least 4; from the data when the app builds the model.
        channels: channels of the image.
        num_classes: number of classes.
        width: channels of the first of the four layers.
        lr: Adam's learning rate.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, with the valid ones.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        num_classes: int,
        width: int = 64,
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__(image_size, channels, num_classes, lr)
        self.save_hyperparameters()
        wide = scaled_width(width, width_multiplier)
        small = image_size < SMALL_IMAGE
        self.net = ResNet18Network(channels, num_classes, width=wide, small=small)
