"""Losses for recurrent decoders that are fed the true tokens (teacher forcing)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["step_kl"]


def step_kl(
    student: Tensor, teacher: Tensor, *, keep: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL in nats of each step's next-token classes, summed over steps, averaged over sequences.

    Kim and Rush 2016, word-level distillation, https://arxiv.org/abs/1606.07947; times T^2.

    Args:
        student: logits (N, T, V).
        teacher: logits (N, T, V).
        keep: (N, T), True for the steps that count; None: all.
        temperature: T, above 0.

    >>> import torch
    >>> step_kl(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)).item()
    0.0
    """
    targets = (teacher / temperature).log_softmax(-1)
    ours = (student / temperature).log_softmax(-1)
    steps = (targets.exp() * (targets - ours)).sum(-1)
    if keep is not None:
        steps = steps.masked_fill(~keep, 0.0)
    return temperature**2 * steps.sum(1).mean()
