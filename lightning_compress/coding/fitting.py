"""Which tables a plane is coded with, and their weights: fitted before anything of it is coded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import fit_weights
from lightning_compress.coding.planes import Plane, Weights, beyond, own_logits, start
from lightning_compress.coding.waves import parts

__all__ = ["fitted"]

_FIT = 1 << 15  # positions that weights are fitted to
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
    tables = range(len(plane.view.subsets))
    count = -(-len(at) // step)
    of_nodes, totals = np.empty((2, 2, count), np.int64)
    of_keys = np.empty((len(tables), 2, count), np.int64)
    for part in parts(ends):
        keys = plane.view.keys(at[part], tables)
        own = None if nodes is None else nodes[part]
        some = slice(-part.start % step, None, step)
        to = slice(-(-part.start // step), -(-part.stop // step))
        of_nodes[:, to] = plane.of_nodes(None if own is None else own[some])
        totals[:, to] = plane.total
        for table in tables:
            of_keys[table, :, to] = plane.of_keys(table, keys[table][some])
        if part.stop < len(at):
            plane.learn(keys, own, bits[part])
    prior = start(totals)
    return own_logits(of_nodes), np.stack([beyond(counts, prior) for counts in of_keys])
