"""Likelihood bounds of latent-variable models, and the accuracy of classifiers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's own alias)

from lightning_compress.modes import evaluating

__all__ = ["accuracy", "active_units", "likelihood"]

ACTIVE_VARIANCE = 0.01


def likelihood(
    model: Any,
    x: Tensor,
    *,
    batch_size: int = 256,
    importance_samples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Test likelihood of a variational model, in nats per example.

    The model is an `nn.Module` with `elbo_terms(x, generator=...) -> (nll (N,), kl (N,))` and
    `posterior(x) -> (mu (N, D), logvar (N, D))`; for importance samples also
    `log_weights(x, k, generator=...) -> (k, N)`; for sequences also
    `steps_per_example(x) -> (N,)`. It is run in eval mode and keeps its former mode.

    Args:
        model: the module, see above.
        x: test examples (N, ...), at least two.
        batch_size: most examples, or most example-sample pairs, in one call.
        importance_samples: K of the importance-weighted bound; 0 leaves it out.
        seed: of the posterior samples; no global random stream is read.

    Returns:
        `neg_elbo`, its parts `reconstruction` and `kl`; `active_units` of `latent_dim`
        (variance of the posterior mean over x above 0.01, Burda et al. 2016, arXiv:1509.00519);
        `neg_iwae` (ibid.) with importance samples; `nats_per_step` for
        sequences, and `perplexity` where x are tokens (integers).

    Raises:
        ValueError: for fewer than two examples, values that are not finite, or a wrong shape.
    """
    _check_examples(x, batch_size)
    if importance_samples < 0:
        raise ValueError(f"importance_samples must be 0 or more, got {importance_samples}")
    device = next((p.device for p in model.parameters()), x.device)
    generator = torch.Generator(device=device).manual_seed(seed)
    terms, means = [], []
    with evaluating(model):
        for rows in x.split(batch_size):
            batch = rows.to(device)
            parts = model.elbo_terms(batch, generator=generator)
            terms.append(torch.stack([_per_example(part, len(rows)) for part in parts]))
            means.append(model.posterior(batch)[0].flatten(1).double().cpu())
        nll, kl = torch.cat(terms, dim=1)
        result = {
            "neg_elbo": float((nll + kl).mean()),
            "reconstruction": float(nll.mean()),
            "kl": float(kl.mean()),
            **active_units(torch.cat(means)),
        }
        if importance_samples:
            result["neg_iwae"] = _neg_iwae(model, x, importance_samples, batch_size, generator)
        if hasattr(model, "steps_per_example"):
            steps = float(model.steps_per_example(x.to(device)).sum())
            result |= _per_step(float((nll + kl).sum()) / steps, x)
    return result


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """Accuracy and mean cross-entropy (nats) of a classifier on inputs (N, ...), labels (N,).

    Raises:
        ValueError: when the inputs and labels differ in number, or there are none.

    >>> accuracy(nn.Identity(), torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1]))
    {'accuracy': 0.5, 'cross_entropy': 4.50...}
    """
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"need labels (N,) for inputs (N, ...), got {y.shape} and {x.shape}")
    device = next((p.device for p in model.parameters()), x.device)
    hits, loss = 0, 0.0
    with evaluating(model):
        for inputs, labels in zip(x.split(batch_size), y.long().split(batch_size), strict=True):
            logits, target = model(inputs.to(device)).double(), labels.to(device)
            hits += int((logits.argmax(dim=1) == target).sum())
            loss += float(F.cross_entropy(logits, target, reduction="sum"))
    return {"accuracy": hits / len(x), "cross_entropy": loss / len(x)}


def _check_examples(x: Tensor, batch_size: int) -> None:
    if len(x) < 2:
        raise ValueError(f"at least 2 examples are needed, got shape {tuple(x.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x has values that are not finite")


def _per_example(values: Tensor, count: int, *leading: int) -> Tensor:
    if values.shape != (*leading, count):
        raise ValueError(
            f"the model returned shape {tuple(values.shape)} where {(*leading, count)} was due"
        )
    return values.double().cpu()


def active_units(means: Tensor) -> dict[str, float]:
    """`active_units` of `latent_dim`, by the variance of posterior means (N, D) over examples.

    >>> active_units(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    {'active_units': 1, 'latent_dim': 2}
    """
    active = int((means.var(dim=0) > ACTIVE_VARIANCE).sum())
    return {"active_units": active, "latent_dim": means.shape[1]}


def _neg_iwae(
    model: Any, x: Tensor, samples: int, batch_size: int, generator: torch.Generator
) -> float:
    """Burda et al. 2016, eq. 8; no call decodes more than `batch_size` examples at once."""
    total = 0.0
    for rows in x.split(max(1, batch_size // samples)):
        batch, weights = rows.to(generator.device), []
        for start in range(0, samples, batch_size):
            k = min(batch_size, samples - start)
            drawn = model.log_weights(batch, k, generator=generator)
            weights.append(_per_example(drawn, len(rows), k))
        bound = torch.cat(weights).logsumexp(dim=0) - math.log(samples)
        total -= float(bound.sum())
    return total / len(x)


def _per_step(nats: float, x: Tensor) -> dict[str, float]:
    if x.is_floating_point():  # a density has no perplexity
        return {"nats_per_step": nats}
    perplexity = float(torch.tensor(nats, dtype=torch.float64).exp())  # inf, not OverflowError
    return {"nats_per_step": nats, "perplexity": perplexity}
