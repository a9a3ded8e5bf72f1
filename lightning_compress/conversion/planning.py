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
from lightning_compress.conversion.sites import Site, is_move, modules_of, only_use, readers
from lightning_compress.quantization.activations import why_float
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import ActivationGrids, compression_state

__all__ = ["calibrate_sites", "find_float_layers"]

INNER = "weights only: its forward changes what its product reads, or what that gives"


def find_float_layers(plain: nn.Module, sites: list[Site]) -> None:
    """Say at each site why its layer gets no grids, which are those of what the layer reads."""
    reasons: dict[str, str] = {}
    for site in sites:
        layer = plain.get_submodule(site.path)
        why = why_float(layer) or ("" if _is_own(site, layer) else INNER)
        reasons[site.path] = reasons.get(site.path) or why
    for site in sites:
        site.why_float = reasons[site.path]


def _is_own(site: Site, layer: nn.Module) -> bool:
    """Whether what a layer reads and gives is what its product reads and gives."""
    if layer.forward.__module__.startswith("torch.nn."):
        return True
    node = site.node.inputs[0].producer()
    while _is_inside(node, site) and (is_move(node) or node.op_type == "Pad"):
        node = node.inputs[0].producer()
    value = site.output
    while _is_inside(following := only_use(value), site) and _keeps(following):
        value = following.outputs[0]
    changed = any(_is_inside(use.node, site) for use in readers(value))
    return not _is_inside(node, site) and not changed


def _is_inside(node: Any, site: Site) -> bool:
    return node is not None and site.path in modules_of(node)


def _keeps(node: Any) -> bool:
    """Whether a rounding may as well stand behind a node."""
    return is_move(node) or node.op_type == "Relu"


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
        if site.why_float:
            continue
        gives = not is_rounded(plan, planned, points)
        norm = norm_behind(site)
        # A layer that is called twice gives on a grid where one of its calls needs it.
        _, known_to_give = places.get(site.path, (False, False))
        places[site.path] = (site.input_grid is None, known_to_give or (gives and norm is None))
        if gives and norm is not None:
            path = modules_of(norm[0])[-1]
            if isinstance(plain.get_submodule(path), nn.modules.batchnorm._NormBase):
                places[path] = (False, True)
    calibrate(plain, places, calibration, percentile=percentile)


def _with_planned_inputs(sites: list[Site]) -> list[Site]:
    """Copies that have an input grid each; a missing one is equal for all readers of a value."""
    copies = [copy.copy(site) for site in sites]
    values = list(dict.fromkeys(site.node.inputs[0] for site in sites))
    for one in copies:
        if one.input_grid is None and not one.why_float:
            number = torch.tensor([1.0 + values.index(one.node.inputs[0])])
            one.input_grid = AffineGrid(number, torch.tensor([0]), 8, False, None)
    return copies
