"""Adaptive context models: each symbol as binary decisions, each with a learnt probability.

Is it 0? Its sign. The exponent of its magnitude, in unary. The bits after the leading one. All
decisions of one kind are a plane; what earlier waves hold of a position's row, column and kernel
place, and of pairs of them, shifts the probability by weights that the encoder fits and stores. In
the manner of DeepCABAC (Wiedemann et al. 2020, arXiv:1907.11900), by whole waves of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import ByteReader, varint
from lightning_compress.lcz.context_fitting import AT_ONCE, Foresight, fitted, fitted_ahead
from lightning_compress.lcz.context_model import Plane, View, Weights, best_view, probability
from lightning_compress.lcz.huffman import MAX_ALPHABET
from lightning_compress.lcz.range_coder import BitDecoder, BitEncoder

__all__ = [
    "DecodingPass",
    "EncodingPass",
    "decode",
    "encode",
]
Ints = NDArray[np.signedinteger[Any]]
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
        if self.last:
            del self._planes[name]  # whose counts are a few times larger than the symbols


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


_MAX_EXPONENT = (MAX_ALPHABET // 2).bit_length() - 1
_EXPONENT_OF = np.frexp((np.arange(MAX_ALPHABET) + 1) >> 1)[1].astype(np.int64) - 1  # by symbol
Symbols = NDArray[np.uint16]


def encode(symbols: Symbols, shape: tuple[int, ...]) -> bytes:
    """A stream of (N,) symbols below `MAX_ALPHABET` of a tensor; nothing at all for N = 0.

    Args:
        symbols: 0 for zero, 2m - 1 and 2m for the two signs of magnitude m.
        shape: of the tensor, N elements.

    >>> decode(encode(np.array([3, 3, 0], np.uint16), (3,)), (3,))
    array([3, 3, 0], dtype=uint16)
    """
    if not len(symbols):
        return b""
    view = best_view(symbols, shape)
    exponents = ((int(symbols.max()) + 1) >> 1 | 1).bit_length() - 1
    coding = EncodingPass(view)
    for start, stop in view.slabs():
        coding.last = stop == len(symbols)
        _code_slab(coding, *view.waves(start, stop), symbols, exponents)
    head = varint(view.b) + varint(view.c) + bytes([exponents])
    return head + _pack_weights(coding, exponents) + coding.finish()


def decode(data: bytes, shape: tuple[int, ...]) -> Symbols:
    """The symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the stream is damaged or of another shape.
    """
    count = math.prod(shape)
    symbols = np.zeros(count, np.uint16)
    reader = ByteReader(data)
    if count == 0:
        if data:
            raise CorruptArtifactError("bytes after the end of a context-coded stream")
        return symbols
    view = _read_view(reader, count)
    exponents = reader.take(1, "the number of exponents")[0]
    if exponents > _MAX_EXPONENT:
        raise CorruptArtifactError(f"exponents up to {exponents}, above {_MAX_EXPONENT}")
    weights = {name: _read_weights(reader, view) for name in _names(exponents)}
    coding = DecodingPass(view, weights, reader.rest())
    for start, stop in view.slabs():
        coding.last = stop == len(symbols)
        _code_slab(coding, *view.waves(start, stop), symbols, exponents)
    coding.finish()
    return symbols


def _code_slab(
    coding: EncodingPass | DecodingPass, at: Ints, ends: Ints, symbols: Symbols, exponents: int
) -> None:
    """Codes what `symbols` has at the positions `at`; a decoder puts it there.

    Every plane's true bits are worked out from `symbols` for the encoder; the decoder, for which
    they are still 0, gives back the bits that it read instead.
    """
    true = symbols[at]
    bits = coding.code("zero", at, ends, true > 0)
    kept, ends = _kept(bits, ends)
    at, true = at[kept], true[kept]
    sign = coding.code("sign", at, ends, true & 1 == 1)
    exponent = _code_exponents(coding, at, ends, _EXPONENT_OF.take(true), exponents)
    size = (true.astype(np.int64) + 1) >> 1
    magnitude = _code_magnitudes(coding, at, ends, size, exponent, exponents)
    symbols[at] = 2 * magnitude - sign


def _code_exponents(
    coding: EncodingPass | DecodingPass, at: Ints, ends: Ints, true: Ints, most: int
) -> Ints:
    """The exponent of each magnitude, in unary: is it above 0, is it above 1."""
    exponent: Ints = np.zeros(len(at), np.int64)
    alive = np.arange(len(at))
    for level in range(most):
        more = coding.code(f"exponent{level}", at, ends, true > level)
        kept, ends = _kept(more, ends)
        at, true, alive = at[kept], true[kept], alive[kept]
        exponent[alive] = level + 1
    return exponent


def _code_magnitudes(
    coding: EncodingPass | DecodingPass,
    at: Ints,
    ends: Ints,
    true: Ints,
    exponent: Ints,
    exponents: int,
) -> Ints:
    """Each magnitude, from the bit after its leading one to its last."""
    magnitude = np.ones(len(at), np.int64)
    alive = np.arange(len(at))
    for level in range(1, exponents + 1):
        kept, ends = _kept(exponent >= level, ends)
        at, true, exponent, alive = at[kept], true[kept], exponent[kept], alive[kept]
        known = magnitude[alive]
        bits = true >> exponent - level & 1 == 1
        nodes, kinds = exponent << level | known, (exponents + 1) << level
        bits = coding.code(f"bit{level}", at, ends, bits, nodes, kinds)
        magnitude[alive] = 2 * known + bits
    return magnitude


def _kept(bits: Bits, ends: Ints) -> tuple[Ints, Ints]:
    """The places where `bits`, which go wave by wave, are set, and where waves of these end."""
    kept = np.flatnonzero(bits)
    return kept, kept.searchsorted(ends)


def _names(exponents: int) -> list[str]:
    """The planes, in the order in which their weights are stored."""
    levels = range(exponents)
    bits = [f"bit{level + 1}" for level in levels]
    return ["zero", "sign", *(f"exponent{level}" for level in levels), *bits]


def _pack_weights(coding: EncodingPass, exponents: int) -> bytes:
    """For each plane: which tables it uses, a bit each, then their weights, a byte each."""
    out = bytearray()
    if not coding.view.subsets:
        return b""
    for name in _names(exponents):
        weights = coding.weights.get(name, {})
        out.append(sum(1 << table for table in weights))
        out += bytes(weight & 0xFF for weight in weights.values())
    return bytes(out)


def _read_weights(reader: ByteReader, view: View) -> Weights:
    if not view.subsets:
        return {}
    mask = reader.take(1, "the tables of a plane")[0]
    if mask >> len(view.subsets):
        raise CorruptArtifactError(f"tables {mask:#b}, of {len(view.subsets)} there are")
    tables = [table for table in range(len(view.subsets)) if mask >> table & 1]
    stored = reader.take(len(tables), "the weights of a plane")
    return {
        table: weight - 256 * (weight > 127) for table, weight in zip(tables, stored, strict=True)
    }


def _read_view(reader: ByteReader, count: int) -> View:
    second = reader.varint(limit=count, what="the second length of a view")
    third = reader.varint(limit=count, what="the third length of a view")
    if second * third == 0 or count % (second * third):
        raise CorruptArtifactError(f"{count} symbols in rows of {second} x {third}")
    return View(count // (second * third), second, third)
