"""Partitions of a data set among clients: iid, Dirichlet, or by label."""

from __future__ import annotations

import re

import torch
from torch import Tensor

__all__ = ["partition_rows"]

_DIRICHLET = re.compile(r"dirichlet\(\s*([0-9.eE+-]+)\s*\)")


def partition_rows(
    labels: Tensor, clients: int, how: str = "iid", *, seed: int = 0
) -> list[Tensor]:
    """The rows of each client; every row belongs to exactly one, and each client has some.

    Args:
        labels: (N,) classes.
        clients: how many.
        how: `"iid"` deals the rows out at random; `"dirichlet(0.1)"` splits each class by shares
            drawn from a Dirichlet distribution of that concentration (Hsu et al. 2019,
            https://arxiv.org/abs/1909.06335); `"by_label"` gives each client neighbouring classes.
        seed: of the draw.

    Raises:
        ValueError: for another word, a concentration that is no number above 0, or fewer rows than
            clients.

    >>> parts = partition_rows(torch.arange(100) % 10, 10, "by_label")
    >>> [sorted(set((part % 10).tolist())) for part in parts[:3]]
    [[0], [1], [2]]
    """
    if not 1 <= clients <= len(labels):
        raise ValueError(f"clients={clients!r}: expected 1 to {len(labels)}, the number of rows")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    if how == "iid":
        return [part.sort().values for part in shuffled.tensor_split(clients)]
    if how == "by_label":
        order = shuffled[labels[shuffled].argsort(stable=True)]
        return [part.sort().values for part in order.tensor_split(clients)]
    if match := _DIRICHLET.fullmatch(how):
        concentration = _positive(match[1], how)
        return _dirichlet(labels[shuffled], shuffled, clients, concentration, generator)
    raise ValueError(f"partition={how!r}: valid are 'iid', 'dirichlet(0.1)', 'by_label'")


def _positive(text: str, how: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"partition={how!r}: the concentration must be a number above 0")
    return value


def _dirichlet(
    labels: Tensor, rows: Tensor, clients: int, concentration: float, generator: torch.Generator
) -> list[Tensor]:
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in labels.unique():
        mine = rows[labels == label]
        gammas = torch._standard_gamma(
            torch.full((clients,), concentration, dtype=torch.float64), generator=generator
        )
        shares = gammas / gammas.sum().clamp(min=1e-300)
        ends = (shares.cumsum(0) * len(mine)).round().long()[:-1].clamp(max=len(mine))
        for part, piece in zip(parts, mine.tensor_split(ends), strict=True):
            part.append(piece)
    found = [torch.cat(part) for part in parts]
    for place, part in enumerate(found):  # an empty client takes a row of the largest
        if not len(part):
            largest = max(range(clients), key=lambda one: len(found[one]))
            found[place], found[largest] = found[largest][:1], found[largest][1:]
    return [part.sort().values for part in found]
