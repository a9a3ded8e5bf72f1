"""Flow matching: images from noise along a learned vector field, in a fixed number of steps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    LatentModel,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.unet import TimeUNet

__all__ = ["EulerStep", "FlowMatching", "TwoSteps"]
TIMES = ("uniform", "steps")


class EulerStep(nn.Module):
    """One step of the sampler, which an ONNX file holds: x at t -> x at t + 1 / steps.

    Args:
        field: the vector field, (x, t) -> a velocity in the shape of x.
        steps: of the same length from noise at t = 0 to images at t = 1.

    >>> step = EulerStep(lambda x, t: torch.ones_like(x), 4)
    >>> step(torch.zeros(1, 2), torch.zeros(1)).tolist()
    [[0.25, 0.25]]
    """

    def __init__(self, field: nn.Module, steps: int) -> None:
        super().__init__()
        self.field, self.steps = field, steps

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Images (N, C, H, W) at times (N,) -> images one step later."""
        return x + self.field(x, t) / self.steps


class TwoSteps(nn.Module):
    """Two of a teacher's steps, which its student learns to make in one: `Pair(wrap=TwoSteps)`.

    Salimans and Ho 2022, https://arxiv.org/abs/2202.00512.

    Args:
        teacher: its step.
        student: the student's step, twice as long.

    Raises:
        ValueError: for a student of another number of steps than half of the teacher's.
    """

    def __init__(self, teacher: EulerStep, student: EulerStep) -> None:
        super().__init__()
        if teacher.steps != 2 * student.steps:
            raise ValueError(
                f"the teacher samples in {teacher.steps} steps, the student in {student.steps}: "
                f"two steps become one with student.sampling_steps={teacher.steps // 2}"
            )
        self.step = teacher

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Images (N, C, H, W) at times (N,) -> images two of the teacher's steps later."""
        return self.step(self.step(x, t), t + 1 / self.step.steps)


class FlowMatching(LatentModel):
    """Flow matching on straight paths from noise to images, sampled by Euler steps.

    Lipman et al. 2023, https://arxiv.org/abs/2210.02747, with sigma_min = 0. Training and
    validation show the network times of the whole path, so that ranges of activations that are
    observed there hold for every step of the sampler. Logs `train/flow_loss` and `val/flow_loss`.

    Args:
        channels: of the images; like `image_size` from the data when the app builds the model.
        image_size: pixels a side, a multiple of `2 ** (levels - 1)`.
        width: channels of the U-Net at full resolution, twice as many below.
        levels: resolutions.
        heads: of the attention at the lowest resolution.
        sampling_steps: Euler steps of the deployed sampler.
        times: of training: "uniform" in [0, 1], or "steps": those of the sampler.
        flow_weight: of the model's own loss; 0: a teacher alone teaches.
        lr: learning rate of AdamW, which falls by a cosine to a hundredth.
        width_multiplier: scales `width`, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, and sizes that do not divide.

    >>> model = FlowMatching(channels=1, image_size=8, width=8, levels=2, heads=2)
    >>> model.images(model.latents(3, seed=0)).shape
    torch.Size([3, 1, 8, 8])
    """

    deployed: ClassVar = ("step",)
    kind: ClassVar = "flow"

    def __init__(
        self,
        *,
        channels: int,
        image_size: int,
        width: int = 32,
        levels: int = 3,
        heads: int = 4,
        sampling_steps: int = 16,
        times: str = "uniform",
        flow_weight: float = 1.0,
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = (
            check_count("channels", channels),
            *[check_count("image_size", image_size)] * 2,
        )
        if image_size % 2 ** (check_count("levels", levels) - 1):
            raise ValueError(f"image_size={image_size} cannot be halved {levels - 1} times")
        wide = scaled_width(width, width_multiplier)
        lowest = wide if levels == 1 else 2 * wide
        if lowest % check_count("heads", heads):
            raise ValueError(
                f"heads={heads} does not divide the {lowest} channels of the attention"
            )
        check_choice("times", times, TIMES)
        check_range("flow_weight", flow_weight, 0)
        check_range("lr", lr, 0)
        self.save_hyperparameters()
        self.latent_dim = channels * image_size**2
        field = TimeUNet(channels, width=wide, levels=levels, heads=heads)
        self.step = EulerStep(field, check_count("sampling_steps", sampling_steps))

    @property
    def part_calls(self) -> dict[str, int]:
        """How often each part runs for one image."""
        return {"step": self.step.steps}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] at times (N,) -> images one step later."""
        return self.step(x, t)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> images (N, C, H, W) in [0, 1]; call in eval mode."""
        x = z.reshape(-1, *self.shape)
        for i in range(self.step.steps):
            x = self.step(x, x.new_full((len(x),), i / self.step.steps))
        return ((x.float() + 1) / 2).clamp(0, 1)

    def parts(self) -> Parts:
        """One step of the sampler, at two of its times."""
        noise = self.sample_latents().reshape(SAMPLE_BATCH, *self.shape)
        return {"step": (self.step, (noise, noise.new_tensor([0.0, 0.5])))}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The flow matching loss at random times."""
        images = batch[0]
        t = torch.rand(len(images), device=images.device, dtype=images.dtype)
        if self.hparams["times"] == "steps":
            t = (t * self.step.steps).floor() / self.step.steps
        loss = self._loss(images, torch.randn_like(images), t)
        self.log("train/flow_loss", loss.detach(), batch_size=len(images), prog_bar=True)
        return self.hparams["flow_weight"] * loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val/flow_loss` with the same noise each time, at times that cover the path."""
        images = batch[0]
        noise = self.latents(len(images), seed=batch_idx).reshape(images.shape)
        t = torch.arange(len(images), device=images.device, dtype=images.dtype) / len(images)
        loss = self._loss(images, noise, t)
        self.log("val/flow_loss", loss, batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.step.parameters(), lr=self.hparams["lr"])

    def on_train_epoch_end(self) -> None:
        """Let the learning rate fall by a cosine, to a hundredth at the end of the run."""
        self._anneal(0.01)

    def _loss(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean square error of the velocity on the path `(1 - t) noise + t image` (equation 23)."""
        target = (2 * images - 1) - noise
        x = noise + t.reshape(-1, 1, 1, 1) * target
        velocity = (self.step(x, t) - x) * self.step.steps
        return functional.mse_loss(velocity, target)
