"""Data-free distillation on the server: a student learns from the clients' generators.

Latents come from the prior, so no client's rows are needed, and teachers may be of any width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_compress.distillation.losses import bernoulli_kl, mse
from lightning_compress.modes import evaluating

__all__ = ["TeacherSamples", "distill_outputs", "distill_samples"]

Draw = Callable[[Any, Tensor], Tensor]


def draw_images(teacher: Any, z: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] of a teacher with the method `images`."""
    return teacher.images(z)


class TeacherSamples(Dataset[tuple[Tensor, Tensor]]):
    """Data set of batches `(x, zeros)` that the teachers sample from their prior.

    A row is from teacher i with probability `weights[i]`: together they are the mixture of the
    clients' distributions, which is the distribution of all their rows.

    Args:
        teachers: modules with `latent_dim`; frozen, in eval mode while they draw.
        weights: how much each counts, such as its number of rows; None: all alike.
        steps: batches.
        batch_size: rows a batch.
        seed: of latents and choices.
        draw: from a teacher and latents (N, latent_dim) to what the student trains on.

    >>> class Teacher(nn.Module):
    ...     latent_dim = 2
    ...     def images(self, z):
    ...         return z.sigmoid()
    >>> [tuple(x.shape) for x, _ in TeacherSamples([Teacher()], steps=2, batch_size=3)]
    [(3, 2), (3, 2)]
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        steps: int,
        weights: Sequence[float] | None = None,
        batch_size: int = 128,
        seed: int = 0,
        draw: Draw = draw_images,
    ) -> None:
        if not teachers:
            raise ValueError("no teachers: the student would have nothing to learn from")
        self.teachers: list[Any] = list(teachers)
        self.steps, self.batch_size = steps, batch_size
        self.weights = torch.tensor(weights or [1.0] * len(teachers), dtype=torch.float64)
        if len(self.weights) != len(self.teachers) or not (self.weights >= 0).all():
            raise ValueError(f"weights={weights!r}: expected one of at least 0 for each teacher")
        self.seed, self.draw = seed, draw

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.steps:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        x = self._batch(generator)
        return x, torch.zeros(len(x), dtype=torch.int64)

    @torch.no_grad()
    def _batch(self, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(
            self.weights, self.batch_size, replacement=True, generator=generator
        )
        parts = []
        for place, teacher in enumerate(self.teachers):
            count = int((chosen == place).sum())
            if count:
                z = torch.randn(count, int(teacher.latent_dim), generator=generator)
                with evaluating(teacher):
                    parts.append(self.draw(teacher, z.to(_device(teacher))).float().cpu())
        rows = torch.cat(parts)
        return rows[torch.randperm(len(rows), generator=generator)]


def _device(module: Any) -> torch.device:
    first = next(iter(module.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def distill_samples(
    student: LightningModule,
    teachers: Sequence[nn.Module],
    *,
    steps: int = 1000,
    weights: Sequence[float] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    draw: Draw = draw_images,
    **trainer: Any,
) -> LightningModule:
    """Train a student, by its own training step, on samples of the teachers; in place.

    The latents of clients that trained apart mean different things, so their outputs at equal
    latents cannot be averaged; their samples can be mixed. This is what one-shot federation needs
    (one round, then distillation only), for VAEs and GANs alike.

    Args:
        student: a LightningModule that trains on batches `(x, y)`.
        teachers: modules with `latent_dim`, of any width.
        steps: optimizer steps (batches).
        weights: how much each teacher counts; None: all alike.
        batch_size: rows a batch.
        seed: of latents and choices.
        draw: from a teacher and latents to the student's x.
        trainer: arguments of Lightning's `Trainer`.

    Raises:
        ValueError: without teachers, or with weights that do not fit.
    """
    rows = TeacherSamples(
        teachers, steps=steps, weights=weights, batch_size=batch_size, seed=seed, draw=draw
    )
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "devices": 1, "limit_val_batches": 0,
        "num_sanity_val_steps": 0, **trainer,
    }  # fmt: skip
    student.train()
    Trainer(max_epochs=1, **quiet).fit(student, DataLoader(rows, batch_size=None))
    return student


def distill_outputs(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    latent_dim: int,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "bernoulli_kl",
    features: Sequence[str] = (),
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Train a student decoder on the teachers' mean output at equal latents; in place.

    For teachers whose latents mean the same, such as clients that started a round from one global
    model. Lin et al. 2020 (FedDF), https://arxiv.org/abs/2006.07242, with latents for data.

    Args:
        student: latents to outputs.
        teachers: the same, of any width.
        latent_dim: size of z.
        loss: `"bernoulli_kl"` for logits, `"mse"`, or a function of (student, teacher).
        features: paths of submodules, in student and teachers alike, whose outputs are matched too
            (mean squared difference of their maps' energies, so that widths may differ).
        steps: optimizer steps.
        batch_size: latents a step.
        lr: Adam's learning rate.
        seed: of the latents.

    Raises:
        ValueError: without teachers, or for an unknown loss.
    """
    if not teachers:
        raise ValueError("no teachers: the student would have nothing to learn from")
    known = {"bernoulli_kl": bernoulli_kl, "mse": mse}
    if isinstance(loss, str) and loss not in known:
        raise ValueError(f"loss={loss!r}: valid are {tuple(known)}, or a function")
    measure = known[loss] if isinstance(loss, str) else loss
    as_logits = measure is bernoulli_kl
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    was_training = student.training
    student.train()
    for _ in range(steps):
        z = torch.randn(batch_size, latent_dim, generator=generator).to(_device(student))
        target, theirs = _mean_output(teachers, z, features, as_logits=as_logits)
        output, ours = _tapped(student, z, features)
        total = measure(output, target)
        for one, other in zip(ours, theirs, strict=True):
            total = total + functional.mse_loss(_energy(one), other)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    student.train(was_training)
    return student


@torch.no_grad()
def _mean_output(
    teachers: Sequence[nn.Module], z: Tensor, features: Sequence[str], *, as_logits: bool
) -> tuple[Tensor, list[Tensor]]:
    outputs, maps = [], []
    for teacher in teachers:
        with evaluating(teacher):
            output, found = _tapped(teacher, z, features)
        outputs.append(output.sigmoid() if as_logits else output)
        maps.append([_energy(one) for one in found])
    mean = torch.stack(outputs).mean(0)
    if as_logits:
        mean = mean.clamp(1e-6, 1 - 1e-6).logit()
    return mean, [torch.stack(one).mean(0) for one in zip(*maps, strict=True)]


def _tapped(module: nn.Module, z: Tensor, features: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    found: list[Any] = []
    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, out: found.append(out))
        for path in features
    ]
    try:
        return module(z), found
    finally:
        for hook in hooks:
            hook.remove()


def _energy(maps: Tensor) -> Tensor:
    """Mean square over the channels, normalized: comparable between widths (Zagoruyko 2017)."""
    energy = maps.square().mean(1).flatten(1)
    return functional.normalize(energy, dim=1)
