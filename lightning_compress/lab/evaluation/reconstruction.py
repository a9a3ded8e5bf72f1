"""Autoencoders: how near reconstructions are to their originals, how much of a code is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.lab.evaluation.likelihood import active_units
from lightning_compress.modes import evaluating

__all__ = ["code_usage", "codebook_usage", "perceptual_distance"]
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU)


def perceptual_distance(
    made: Tensor, real: Tensor, feature: nn.Module, *, batch_size: int = 256
) -> float:
    """Mean distance of pairs of images in the feature maps of `feature`, as LPIPS without weights.

    Each position's features are scaled to unit length; squared differences are averaged over
    positions, then summed over layers: those of all activations with maps (Zhang et al. 2018,
    https://arxiv.org/abs/1801.03924, equation 1 with w = 1). A network without such layers, as a
    file may hold, is compared at its output.

    Args:
        made: images (N, C, H, W).
        real: images (N, C, H, W).
        feature: such as `FeatureExtractor.module`; numbers of different ones are never compared.
        batch_size: pairs in one call.

    Raises:
        ValueError: for images of different shapes.
    """
    if made.shape != real.shape:
        raise ValueError(
            f"pairs of images are needed, got {tuple(made.shape)}, {tuple(real.shape)}"
        )
    device = next((p.device for p in feature.parameters()), made.device)
    total = 0.0
    with evaluating(feature):
        for ours, theirs in zip(made.split(batch_size), real.split(batch_size), strict=True):
            maps = (_unit_maps(feature, one.to(device)) for one in (ours, theirs))
            for a, b in zip(*maps, strict=True):
                total += float((a - b).square().sum(1).flatten().double().mean()) * len(a)
    return total / len(made)


def _unit_maps(feature: nn.Module, x: Tensor) -> list[Tensor]:
    """(N, C, ...) of each layer, of unit length over C."""
    found: list[Tensor] = []

    def take(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.dim() == 4:
            found.append(output.clone())  # a later layer may work in place

    layers = [layer for layer in feature.modules() if isinstance(layer, _ACTIVATIONS)]
    handles = [layer.register_forward_hook(take) for layer in layers]
    try:
        output = feature(x)
    finally:
        for handle in handles:
            handle.remove()
    return [functional.normalize(one, dim=1) for one in found or [output]]


def code_usage(model: Any, x: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """How much of its code an autoencoder uses on examples; empty for other models.

    A model with `posterior(x) -> (mu, logvar)` has active units, one with `num_codes` and
    `code(x) -> indices` the usage of its codebook.

    Args:
        model: a module, run in eval mode.
        x: examples (N, ...).
        batch_size: examples in one call.
    """
    discrete = hasattr(model, "num_codes")
    if not (discrete or hasattr(model, "posterior")):
        return {}
    with evaluating(model):
        batches = (rows.to(model.device) for rows in x.split(batch_size))
        read = (model.code(one) if discrete else model.posterior(one)[0] for one in batches)
        codes = torch.cat([one.cpu() for one in read])
    if discrete:
        return codebook_usage(codes, model.num_codes)
    return active_units(codes.flatten(1).double())


def codebook_usage(indices: Tensor, num_codes: int) -> dict[str, float]:
    """Usage of a codebook by indices of any shape.

    Returns:
        `code_perplexity`, exp of the indices' entropy: as many codes, used alike, would carry as
        much; and `codes_used`, the fraction that is used at all.

    >>> codebook_usage(torch.tensor([0, 0, 1, 1]), 8)
    {'code_perplexity': 2.0, 'codes_used': 0.25}
    """
    counts = torch.bincount(indices.flatten(), minlength=num_codes).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return {"code_perplexity": float(entropy.exp()), "codes_used": len(shares) / num_codes}
