"""How much a unit is worth: what its entries are worth, in all layers that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_compress.pruning.channel_budget import Scores
from lightning_compress.pruning.channels import ChannelGraph

__all__ = ["ABSOLUTE", "even_out", "norm_scales", "sum_over_units"]

# Criteria whose scores are changes of the loss: they can be compared between layers as they are.
ABSOLUTE = ("taylor", "fisher", "obs")


@torch.no_grad()
def sum_over_units(
    graph: ChannelGraph, values: Mapping[str, Tensor], roles: Sequence[str] = ("out", "in")
) -> Scores:
    """Sum of what the entries of each unit are worth.

    Group L2 (DepGraph, Fang et al. 2023, arXiv:2301.12900) is the root of such a sum of squares.

    Args:
        graph: of the module.
        values: a number for each entry of a tensor, by path.
        roles: of the axes that count.
    """
    total = np.zeros(graph.count)
    for (path, dim), units in graph.axes.items():
        if graph.roles[path, dim] not in roles or path not in values:
            continue
        along = values[path].detach().double().cpu().movedim(dim, 0).flatten(1).sum(1)
        np.add.at(total, units, along.numpy())
    return total


@torch.no_grad()
def norm_scales(graph: ChannelGraph, scales: Mapping[str, Tensor], fallback: Scores) -> Scores:
    """Absolute scales of the norms behind each unit: Network Slimming, arXiv:1708.06519.

    Args:
        graph: of the module.
        scales: weights of norm layers, by path.
        fallback: for groups without any.
    """
    found, seen = np.zeros(graph.count), np.zeros(graph.count, dtype=bool)
    for (path, dim), units in graph.axes.items():
        if dim == 0 and path in scales:
            np.add.at(found, units, scales[path].detach().double().abs().cpu().numpy())
            seen[units] = True
    scores = even_out(graph, fallback)
    for group in graph.groups:
        if seen[group.units].all():
            scores[group.units] = found[group.units]
    return even_out(graph, scores)


def even_out(graph: ChannelGraph, scores: Scores) -> Scores:
    """Scores over the mean of their group, so that groups of different scale can be compared."""
    scores = scores.copy()
    for group in graph.groups:
        mean = scores[group.units].mean()
        if mean > 0:
            scores[group.units] /= mean
    return scores
