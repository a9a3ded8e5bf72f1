"""One plane of binary decisions over the waves of a slab: coding it, and getting it back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.fitting import fitted, fitted_ahead
from lightning_compress.coding.foresight import AT_ONCE, Foresight
from lightning_compress.coding.logistic import probability
from lightning_compress.coding.planes import Plane, Weights
from lightning_compress.coding.range_coder import BitDecoder, BitEncoder
from lightning_compress.coding.waves import View

__all__ = ["DecodingPass", "EncodingPass"]

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]
Chances = NDArray[np.float64]


class _Pass:
    """What both directions do with a plane: know its counts, ask a coder, count.

    Args:
        view: of the tensor.
        weights: of each plane's tables.
    """

    def __init__(self, view: View, weights: dict[str, Weights]) -> None:
        self.last = False  # whether the slab is the last one
        self.view = view
        self.weights = weights
        self._planes: dict[str, Plane] = {}

    def _walk(
        self,
        name: str,
        kinds: int,
        at: Ints,
        ends: Ints,
        nodes: Ints | None,
        coder: Callable[[slice, Chances], Bits],
    ) -> None:
        """Calls `coder`, which gives the bits, with each wave and its probabilities of a one."""
        weights = self.weights[name]
        if name not in self._planes:
            self._planes[name] = Plane(self.view, kinds, weights)
        plane = self._planes[name]
        for part, keys in plane.waves(at, ends):
            own = None if nodes is None else nodes[part]
            bits = coder(part, probability(plane.logits(weights, keys, own)))
            if not (self.last and part.stop == len(at)):  # nobody would ask for it
                plane.learn(keys, own, bits)


class EncodingPass(_Pass):
    """Turns planes into a stream, and fits the weights of each when it first meets it."""

    def __init__(self, view: View) -> None:
        super().__init__(view, {})
        self._coder = BitEncoder()
        count = math.prod(view.shape)
        self._ahead = count <= AT_ONCE and list(view.slabs()) == [(0, count)]

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

        def encode(part: slice, chances: Chances) -> Bits:
            self._coder.encode(bits[part], chances)
            return bits[part]

        if not len(at):
            return bits
        if self._ahead:
            ahead = Foresight(self.view, at, ends, bits, nodes, kinds)
            self.weights[name], logits = fitted_ahead(ahead)
            self._coder.encode(bits, probability(logits))
            return bits
        if name not in self.weights:
            self.weights[name] = fitted(Plane(self.view, kinds), at, ends, bits, nodes)
        self._walk(name, kinds, at, ends, nodes, encode)
        return bits

    def finish(self) -> bytes:
        """The stream."""
        return self._coder.finish()


class DecodingPass(_Pass):
    """Gets the planes of a stream back, given the weights of each."""

    def __init__(self, view: View, weights: dict[str, Weights], data: bytes) -> None:
        super().__init__(view, weights)
        self._coder = BitDecoder(data)

    def code(
        self, name: str, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None = None, kinds: int = 1
    ) -> Bits:
        """The next plane of a slab: as `EncodingPass.code`, but the bits come from the stream."""
        found = np.empty_like(bits)

        def decode(part: slice, chances: Chances) -> Bits:
            found[part] = self._coder.decode(chances, part.stop - part.start)
            return found[part]

        self._walk(name, kinds, at, ends, nodes, decode)
        return found

    def finish(self) -> None:
        """Check that the stream ends here."""
        self._coder.finish()
