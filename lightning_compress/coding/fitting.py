"""Which tables a plane is coded with, and their weights: fitted before anything of it is coded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.foresight import Foresight
from lightning_compress.coding.logistic import WEIGHT_ONE, fit_weights
from lightning_compress.coding.planes import Plane, Weights

__all__ = ["fitted", "fitted_ahead"]

_FIT = 1 << 14  # positions that weights are fitted to
_SHORT = 1 << 18  # positions whose waves are taken two at a time
_WORTH = 24  # bits that a plane's weights must save to be stored
_SMALLEST = 2  # weights below it, in units of 1 / WEIGHT_ONE, are left out
_FEW = 512  # decisions in a plane that are too few to learn weights from

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]


def fitted(plane: Plane, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None) -> Weights:
    """The weights of the tables that are worth it, by table, for one plane of the first slab.

    Args:
        plane: without counts; useless afterwards.
        at: (N,) positions, wave by wave.
        ends: where each wave ends in `at`.
        bits: (N,) the decisions.
        nodes: (N,) of the positions; None: all 0.
    """
    if not plane.view.subsets or len(at) < _FEW:
        return {}
    step = -(-len(at) // _FIT)
    if len(at) <= _SHORT:  # two waves at a time: half the calls, for a byte in ten thousand
        ends = ends[::-2][::-1]
    base, features = _sampled(plane, at, ends, bits, nodes, step)
    return _worth(base, features, bits[::step], len(at))


def fitted_ahead(ahead: Foresight) -> tuple[Weights, Ints]:
    """The same of a plane that is foreseen, and the logits (N,) that they make."""
    count = len(ahead.at)
    if not ahead.view.subsets or count < _FEW:
        return {}, ahead.base
    step = -(-count // _FIT)
    features = ahead.features()
    weights = _worth(ahead.base[::step], features[:, ::step], ahead.bits[::step], count)
    return weights, ahead.base + _mixed(features, weights)


def _worth(base: Ints, features: NDArray[Any], bits: Bits, count: int) -> Weights:
    """Those of the tables that save more than they take, for so many decisions like these."""
    weights, saved = fit_weights(features, base, bits)
    if saved * count / len(bits) <= _WORTH:
        return {}
    return {table: w for table, w in enumerate(weights.tolist()) if abs(w) >= _SMALLEST}


def _sampled(
    plane: Plane, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None, step: int
) -> tuple[Ints, Ints]:
    """The base logits (n,) and features (tables, n) of every `step`-th position.

    All positions count, as they will when the plane is coded; logits are worked out for few.
    """
    count = -(-len(at) // step)
    base = np.empty(count, np.int64)
    features = np.empty((len(plane.view.subsets), count), np.int64)
    for part, keys in plane.waves(at, ends):
        own = None if nodes is None else nodes[part]
        some = slice(-part.start % step, None, step)
        to = slice(-(-part.start // step), -(-part.stop // step))
        base[to] = plane.base(None if own is None else own[some])
        features[:, to] = plane.features(keys[:, some])
        if part.stop < len(at):
            plane.learn(keys, own, bits[part])
    return base, features


def _mixed(features: NDArray[np.float32], weights: Weights) -> Ints:
    """(N,) the weighed sum of the features, exact: see `Foresight.features`."""
    each = np.zeros(len(features), np.float32)
    each[list(weights)] = list(weights.values())
    return (each @ features).astype(np.int64) // WEIGHT_ONE
