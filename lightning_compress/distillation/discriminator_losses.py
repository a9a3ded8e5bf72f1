"""Distillation losses on a student's images through the teacher's trained discriminator.

A GAN's discriminator is training equipment that the teacher's run has paid for. Frozen, it is a
perceptual distance made on the very data, and its scores say what the teacher's run found real.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.distillation.losses import Loss, LossInputs
from lightning_compress.distillation.pairs import find_module
from lightning_compress.errors import TargetError, check_choice
from lightning_compress.hooks import Taps, tensors_of

__all__ = ["Perceptual", "TeacherScore"]

SCORES = ("match", "non_saturating", "hinge")


class Perceptual(Loss):
    """Mean squared difference of the discriminator's features of both images, over layers.

    Each layer's difference is divided by the mean square of the teacher's features, so that layers
    count alike. After Larsen et al. 2016, https://arxiv.org/abs/1512.09300.

    Args:
        network: path of the discriminator in the teacher.
        layers: paths inside it; None: all its activations.
    """

    name = "perceptual"

    def __init__(self, network: str = "discriminator", layers: list[str] | None = None) -> None:
        self.path, self.layers = network, layers
        self._network: nn.Module | None = None
        self._taps: Taps | None = None

    def bind(self, teacher: nn.Module) -> None:
        """Find the discriminator and its layers.

        Raises:
            TargetError: when there is none, or it has no such layers.
        """
        network = find_module(teacher, self.path, side="teacher")
        for path in self.layers or ():
            find_module(network, path, side=f"teacher's {self.path}")
        layers = self.layers or [name for name, one in network.named_modules() if _activates(one)]
        if not layers:
            raise TargetError(f"the teacher's {self.path} has no activation layers: give layers")
        self.release()
        self._network, self._taps = network, Taps(network, layers)

    def release(self) -> None:
        """Remove the hooks from the discriminator."""
        if self._taps is not None:
            self._taps.remove()
        self._network = self._taps = None

    def __call__(self, call: LossInputs) -> Tensor:
        """The distance."""
        theirs = {path: one.detach() for path, one in self._features(call.teacher).items()}
        ours = self._features(call.student)
        distances = [
            functional.mse_loss(ours[path], theirs[path])
            / theirs[path].square().mean().clamp_min(1e-12)
            for path in theirs
        ]
        return torch.stack(distances).mean()

    def _features(self, output: object) -> dict[str, Tensor]:
        assert self._network is not None
        assert self._taps is not None
        with self._taps.catching() as found:
            self._network(tensors_of(output)[0])
        return found


def _activates(layer: nn.Module) -> bool:
    return type(layer).__module__ == "torch.nn.modules.activation"


class TeacherScore(Loss):
    """Loss by the teacher's discriminator's scores of the student's images.

    Args:
        network: path of the discriminator in the teacher: images -> scores (N,).
        loss: "match": the squared difference from its scores of the teacher's own images;
            "non_saturating", "hinge": the generator's loss against it.

    Raises:
        ValueError: for another loss.
    """

    name = "teacher_score"

    def __init__(self, network: str = "discriminator", loss: str = "match") -> None:
        check_choice("loss", loss, SCORES)
        self.path, self.loss = network, loss
        self._network: nn.Module | None = None

    def bind(self, teacher: nn.Module) -> None:
        """Find the discriminator.

        Raises:
            TargetError: when there is none.
        """
        self._network = find_module(teacher, self.path, side="teacher")

    def release(self) -> None:
        """Release the discriminator."""
        self._network = None

    def __call__(self, call: LossInputs) -> Tensor:
        """The loss of the student's images."""
        assert self._network is not None
        ours = self._network(tensors_of(call.student)[0])
        if self.loss == "hinge":
            return -ours.mean()
        if self.loss == "non_saturating":
            return functional.softplus(-ours).mean()
        with torch.no_grad():
            theirs = self._network(tensors_of(call.teacher)[0])
        return functional.mse_loss(ours, theirs)
