"""One plane of binary decisions over the waves of a slab: coding it, and getting it back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.logistic import WEIGHT_ONE, fit_weights, probability
from lightning_compress.coding.planes import Plane
from lightning_compress.coding.range_coder import BitDecoder, BitEncoder
from lightning_compress.coding.waves import View

__all__ = ["DecodingPass", "EncodingPass", "Weights"]

_FIT = 1 << 15  # positions that weights are fitted to
_WORTH = 24  # bits that a plane's weights must save to be stored
_SMALLEST = 2  # weights below it, in units of 1 / WEIGHT_ONE, are left out
_FEW = 256  # decisions in a plane that are too few to learn weights from

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]
Weights = dict[int, int]


class EncodingPass:
    """Turns planes into a stream, and fits the weights of each when it first meets it."""

    def __init__(self, view: View) -> None:
        self.weights: dict[str, Weights] = {}
        self.last = False  # whether the slab is the last one
        self.view = view
        self._planes: dict[str, Plane] = {}
        self._coder = BitEncoder()

    def code(
        self, name: str, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None = None, kinds: int = 1
    ) -> Bits:
        """Append one plane of a slab.

        Args:
            name: of the plane.
            at: (N,) positions, wave by wave.
            ends: where each wave ends in `at`.
            bits: (N,) the decisions.
            nodes: (N,) below `kinds`; None: all 0.
            kinds: how many different nodes there can be.

        Returns:
            The bits.
        """
        if not len(at):
            return bits
        plane = self._planes.setdefault(name, Plane(self.view, kinds))
        tables = self._tables(name, len(at))
        base, features = self._learn(plane, tables, at, ends, bits, nodes)
        if name not in self.weights:
            self.weights[name] = _fitted(tables, base, features, bits)
        weights = [self.weights[name].get(table, 0) for table in tables]
        total = np.array(weights, np.int64) @ features if tables else 0
        self._coder.encode(bits, probability(base + total // WEIGHT_ONE))
        return bits

    def _tables(self, name: str, count: int) -> list[int]:
        if name in self.weights:
            return list(self.weights[name])
        return list(range(len(self.view.subsets))) if count >= _FEW else []

    def _learn(
        self, plane: Plane, tables: list[int], at: Ints, ends: Ints, bits: Bits, nodes: Ints | None
    ) -> tuple[Ints, Ints]:
        """The base logits (N,) and the features (tables, N), wave by wave."""
        base = np.empty(len(at), np.int64)
        features = np.empty((len(tables), len(at)), np.int64)
        for part in _parts(ends):
            keys = self.view.keys(at[part], tables)
            own = None if nodes is None else nodes[part]
            base[part] = plane.base(own)
            for row, table in zip(features, tables, strict=True):
                row[part] = plane.feature(table, keys[table])
            if not (self.last and part.stop == len(at)):  # nobody would ask for it
                plane.learn(keys, own, bits[part])
        return base, features

    def finish(self) -> bytes:
        """The stream."""
        return self._coder.finish()


class DecodingPass:
    """Gets the planes of a stream back, given the weights of each."""

    def __init__(self, view: View, weights: dict[str, Weights], data: bytes) -> None:
        self.last = False  # whether the slab is the last one
        self._view = view
        self._weights = weights
        self._planes: dict[str, Plane] = {}
        self._coder = BitDecoder(data)

    def code(
        self, name: str, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None = None, kinds: int = 1
    ) -> Bits:
        """The next plane of a slab: as `EncodingPass.code`, but the bits come from the stream."""
        plane = self._planes.setdefault(name, Plane(self._view, kinds))
        weights = self._weights[name]
        found = np.empty_like(bits)
        for part in _parts(ends):
            keys = self._view.keys(at[part], weights)
            own = None if nodes is None else nodes[part]
            total = np.zeros(part.stop - part.start, np.int64)
            for table, weight in weights.items():
                total += weight * plane.feature(table, keys[table])
            logits = plane.base(own) + total // WEIGHT_ONE
            found[part] = self._coder.decode(probability(logits))
            if not (self.last and part.stop == len(at)):
                plane.learn(keys, own, found[part])
        return found

    def finish(self) -> None:
        """Check that the stream ends here."""
        self._coder.finish()


def _parts(ends: Ints) -> list[slice]:
    """The waves that are not empty."""
    starts = [0, *ends.tolist()[:-1]]
    return [slice(*pair) for pair in zip(starts, ends.tolist(), strict=True) if pair[0] < pair[1]]


def _fitted(tables: list[int], base: Ints, features: Ints, bits: Bits) -> Weights:
    if not tables:
        return {}
    some = slice(None, None, -(-len(bits) // _FIT))
    weights, saved = fit_weights(features[:, some], base[some], bits[some])
    found = dict(zip(tables, weights.tolist(), strict=True))
    worth = saved * len(bits) / len(bits[some]) > _WORTH
    return {t: w for t, w in found.items() if abs(w) >= _SMALLEST} if worth else {}
