"""Which activations need a grid before products can multiply whole numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.calibration import calibrate
from lightning_compress.conversion.folding import norm_behind
from lightning_compress.conversion.rounding import is_rounded, output_points
from lightning_compress.conversion.sites import Site, modules_of
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import ActivationGrids, compression_state

__all__ = ["calibrate_sites"]


def calibrate_sites(
    graph: Any,
    plain: nn.Module,
    sites: list[Site],
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    percentile: float,
) -> None:
    """Find grids for what products read, and for what they give where nothing rounds it later."""
    known = compression_state(plain).activations
    for site in sites:
        found = known.get(site.path, ActivationGrids())
        site.input_grid, site.output_grid = found.input, found.output
    points, _ = output_points(graph, known, sites)
    planned = _with_planned_inputs(sites)
    places: dict[str, tuple[bool, bool]] = {}
    for site, plan in zip(sites, planned, strict=True):
        gives = not is_rounded(plan, planned, points)
        norm = norm_behind(site)
        # A layer that is called twice gives on a grid where one of its calls needs it.
        _, known_to_give = places.get(site.path, (False, False))
        places[site.path] = (site.input_grid is None, known_to_give or (gives and norm is None))
        if gives and norm is not None:
            places[modules_of(norm[0])[-1]] = (False, True)
    calibrate(plain, places, calibration, percentile=percentile)


def _with_planned_inputs(sites: list[Site]) -> list[Site]:
    """Copies that have an input grid each; a missing one is equal for all readers of a value."""
    copies = [copy.copy(site) for site in sites]
    values = list(dict.fromkeys(site.node.inputs[0] for site in sites))
    for one in copies:
        if one.input_grid is None:
            number = torch.tensor([1.0 + values.index(one.node.inputs[0])])
            one.input_grid = AffineGrid(number, torch.tensor([0]), 8, False, None)
    return copies
