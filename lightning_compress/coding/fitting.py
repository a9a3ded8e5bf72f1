"""Which tables a plane is coded with, and their weights: fitted before anything of it is coded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import fit_weights
from lightning_compress.coding.planes import Plane, Weights

__all__ = ["fitted"]

_FIT = 1 << 15  # positions that weights are fitted to
_SHORT = 1 << 18  # positions whose waves are taken two at a time
_WORTH = 24  # bits that a plane's weights must save to be stored
_SMALLEST = 2  # weights below it, in units of 1 / WEIGHT_ONE, are left out
_FEW = 256  # decisions in a plane that are too few to learn weights from

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
    count = len(plane.view.subsets)
    if not count or len(at) < _FEW:
        return {}
    step = -(-len(at) // _FIT)
    if len(at) <= _SHORT:  # two waves at a time: half the calls, for a byte in ten thousand
        ends = ends[::-2][::-1]
    base, features = _sampled(plane, at, ends, bits, nodes, step)
    weights, saved = fit_weights(features, base, bits[::step])
    if saved * len(bits) / len(base) <= _WORTH:
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
