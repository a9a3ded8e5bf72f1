"""Base classes of the models, their protocol for conversion and evaluation, argument checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_compress.channels.resize import rebuild_channels
from lightning_compress.lab.learning_rate import annealed

__all__ = [
    "AdversarialModel",
    "BaseModel",
    "CompressibleModel",
    "ConditionalModel",
    "LatentModel",
    "Parts",
    "check_count",
    "check_range",
    "scaled_width",
]

Kind = Literal["gan", "vae", "recurrent_vae", "classifier", "conditional", "flow"]
Parts = dict[str, tuple[nn.Module, tuple[Tensor, ...]]]

SAMPLE_BATCH = 2  # torch.export treats a sample batch of 1 as a constant


@runtime_checkable
class CompressibleModel(Protocol):
    """The contract that callbacks, conversion and evaluation rely on.

    Generative models that draw from latents also have `latents(n, *, seed) -> (N, L)` and
    either `images(z) -> (N, C, H, W)` in [0, 1] or, for tokens, `sequences(z) -> (N, T)` int64.
    Models with an encoder also have `posterior`, `elbo_terms` and `log_weights`. Generators whose
    input comes from the data are of kind `"conditional"`: see `ConditionalModel`.

    Attributes:
        deployed: paths of the deployed child modules.
        kind: the family of the model.
    """

    deployed: ClassVar[tuple[str, ...]]
    kind: ClassVar[Kind]

    def parts(self) -> Parts:
        """Parts for export: name -> (module, CPU sample inputs of batch 2), the sampler first."""
        ...

    def deployed_module(self) -> nn.Module:
        """The single module whose `state_dict` is deployed."""
        ...


class BaseModel(LightningModule):
    """A LightningModule that knows which of its children are deployed."""

    deployed: ClassVar[tuple[str, ...]]
    kind: ClassVar[Kind]
    data_kinds: ClassVar[tuple[str, ...]] = ("image",)  # kinds of DataModule that feed it
    quality_metric: ClassVar[str | None] = None  # judges a loss of quality; None: its kind's usual

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut the layers to the sizes of a checkpoint with removed channels, before it loads."""
        rebuild_channels(self, checkpoint)

    def deployed_module(self) -> nn.Module:
        """The single module whose `state_dict` is deployed: shared with this model, never copied.

        One deployed path gives that child itself, several an `nn.ModuleDict` that refers to them.
        """
        if len(self.deployed) == 1:
            return self.get_submodule(self.deployed[0])
        holder = nn.ModuleDict({path: self.get_submodule(path) for path in self.deployed})
        holder.training = self.training  # the flag of the holder alone: children keep their own
        return holder

    def _anneal(self, last: float) -> None:
        """After an epoch: the learning rates of a cosine that ends at a fraction of `lr`."""
        epochs = self.trainer.max_epochs or 0
        if epochs > 1:
            rate = self.hparams["lr"] * annealed((self.current_epoch + 1) / epochs, last)
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate


class AdversarialModel(BaseModel):
    """A network that is trained and one that judges it, in turn, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def _in_turn(
        self, optimizer: type[torch.optim.Optimizer], *networks: nn.Module
    ) -> list[torch.optim.Optimizer]:
        """An optimizer for each network, with the hyperparameters `lr` and `betas`."""
        arguments: dict[str, Any] = {"lr": self.hparams["lr"]}
        arguments["betas"] = tuple(self.hparams["betas"])
        return [optimizer(network.parameters(), **arguments) for network in networks]

    def _both_optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer]:
        """In the order of `configure_optimizers`: of what is trained, and of its judge."""
        trained, judge = cast("list[LightningOptimizer]", self.optimizers())
        return trained, judge

    @contextmanager
    def _only(self, optimizer: LightningOptimizer) -> Iterator[None]:
        """Let gradients flow to this optimizer's parameters alone, also when the step fails."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _update(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """One step of a manual optimization."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class ConditionalModel(BaseModel):
    """A generator whose input comes from the data: image to image, spectrogram to waveform.

    Its data are `paired`: batches are (condition, target). On other data the condition is its own
    target, as an autoencoder's. The evaluation runs `outputs` on the conditions of a split and
    reports `distances` to the targets, beside the fidelity of what the DataModule's `as_images`
    makes of both. A subclass sets `quality_metric` to one of the distances, and has an `lr` among
    its hyperparameters.
    """

    kind: ClassVar = "conditional"

    def outputs(self, condition: Tensor) -> Tensor:
        """What the deployed generator makes of conditions, in the targets' shape and range.

        Called in eval mode without gradients.
        """
        raise NotImplementedError

    def distances(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Means of the paired metrics, each a key of `lab.workflow.quality.METRICS`."""
        raise NotImplementedError

    def on_train_epoch_end(self) -> None:
        """Let the learning rates fall by a cosine, to a tenth at the end of the run."""
        self._anneal(0.1)


class LatentModel(BaseModel):
    """A generative model that is driven by a standard normal latent of size `latent_dim`."""

    latent_dim: int

    def latents(self, n: int, *, seed: int) -> Tensor:
        """Draw z, (N, latent_dim), on the CPU: equal for equal seeds on every device."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, self.latent_dim, generator=generator)
        return noise.to(self.device, cast("torch.dtype", self.dtype))

    def sample_latents(self) -> Tensor:
        """Sample inputs for an export, (2, latent_dim), on the CPU."""
        return self.latents(SAMPLE_BATCH, seed=0).cpu()


def check_count(name: str, value: int | None, *, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`.

    Raises:
        ValueError: for None (a size that the data should have given), other types, small numbers.
    """
    if value is None:
        raise ValueError(f"{name} is None: give an integer, or let the app take it from the data")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
    return value


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> float:
    """Return `value` if it lies in [low, high].

    Raises:
        ValueError: when it does not, or is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a number in [{low:g}, {high:g}]")
    return value


def scaled_width(width: int, multiplier: float, *, name: str = "width") -> int:
    """Channels after scaling: a multiple of 8 (others are slow in ONNX Runtime), at least 8.

    >>> scaled_width(64, 0.5), scaled_width(64, 0.3), scaled_width(64, 0.01)
    (32, 16, 8)
    """
    check_count(name, width)
    if not multiplier > 0:
        raise ValueError(f"width_multiplier={multiplier!r}: expected a number above 0")
    return max(8, 8 * round(width * multiplier / 8))
