"""Adaptive binary context coder: each symbol as binary decisions with learned probabilities.

Is it 0? Its sign. The exponent of its magnitude, in unary. The bits after the leading one. All
decisions of one kind are a bit plane. The contexts of a position are its row, column, kernel tap
and pairs of them; their counts in earlier scans shift its probability by weights that the encoder
fits and stores. After DeepCABAC (Wiedemann et al. 2020, arXiv:1907.11900), but vectorized over
the positions of a scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import ByteReader, varint
from lightning_compress.lcz.context_fitting import (
    TWO_PASS_LIMIT,
    TwoPassModel,
    fit_plane_weights,
    fit_two_pass,
)
from lightning_compress.lcz.context_model import (
    AdaptiveBitModel,
    View,
    Weights,
    best_view,
    count_dtype,
    probability,
)
from lightning_compress.lcz.huffman import MAX_ALPHABET
from lightning_compress.lcz.range_coder import BitDecoder, BitEncoder

__all__ = [
    "HEAD_BYTES",
    "PlaneDecoder",
    "PlaneEncoder",
    "decode",
    "decode_memory",
    "encode",
    "slab_memory",
]
Ints = NDArray[np.signedinteger[Any]]
Bits = NDArray[np.bool_]
Probabilities = NDArray[np.float64]


class _PlaneCoder:
    """Base of encoder and decoder of bit planes: the adaptive models, updated after each scan.

    Args:
        view: of the tensor.
        weights: of each plane's tables.
    """

    def __init__(self, view: View, weights: dict[str, Weights]) -> None:
        self.last = False  # whether the slab is the last one
        self.view = view
        self.weights = weights
        self._planes: dict[str, AdaptiveBitModel] = {}

    def _code_scans(
        self,
        name: str,
        kinds: int,
        at: Ints,
        ends: Ints,
        nodes: Ints | None,
        coder: Callable[[slice, Probabilities], Bits],
    ) -> None:
        """Code one plane: `coder` gets each scan and its probabilities, and returns its bits."""
        weights = self.weights[name]
        if name not in self._planes:
            self._planes[name] = AdaptiveBitModel(self.view, kinds, weights)
        plane = self._planes[name]
        for part, keys in plane.scans(at, ends):
            own = None if nodes is None else nodes[part]
            bits = coder(part, probability(plane.logits(weights, keys, own)))
            if not (self.last and part.stop == len(at)):  # its counts are not used again
                plane.update(keys, own, bits)
        if self.last:
            del self._planes[name]  # whose counts are a few times larger than the symbols


class PlaneEncoder(_PlaneCoder):
    """Encoder of bit planes; fits the weights of a plane at its first slab."""

    def __init__(self, view: View) -> None:
        super().__init__(view, {})
        self._coder = BitEncoder()
        count = math.prod(view.shape)
        self._two_pass = count <= TWO_PASS_LIMIT and list(view.slabs()) == [(0, count)]

    def code(
        self, name: str, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None = None, kinds: int = 1
    ) -> Bits:
        """Append one plane of a slab.

        Args:
            name: of the plane.
            at: (N,) positions, scan by scan.
            ends: where each scan ends in `at`.
            bits: (N,) the decisions.
            nodes: (N,) below `kinds`; None: all 0.
            kinds: how many different nodes there can be.

        Returns:
            The bits.
        """

        def encode(part: slice, probabilities: Probabilities) -> Bits:
            self._coder.encode(bits[part], probabilities)
            return bits[part]

        if not len(at):
            return bits
        if self._two_pass:
            two_pass = TwoPassModel(self.view, at, ends, bits, nodes, kinds)
            self.weights[name], logits = fit_two_pass(two_pass)
            self._coder.encode(bits, probability(logits))
            return bits
        if name not in self.weights:
            self.weights[name] = fit_plane_weights(
                AdaptiveBitModel(self.view, kinds), at, ends, bits, nodes
            )
        self._code_scans(name, kinds, at, ends, nodes, encode)
        return bits

    def finish(self) -> bytes:
        """The stream."""
        return self._coder.finish()


class PlaneDecoder(_PlaneCoder):
    """Decoder of bit planes, given the weights of each."""

    def __init__(self, view: View, weights: dict[str, Weights], data: bytes) -> None:
        super().__init__(view, weights)
        self._coder = BitDecoder(data)

    def code(
        self, name: str, at: Ints, ends: Ints, bits: Bits, nodes: Ints | None = None, kinds: int = 1
    ) -> Bits:
        """The next plane of a slab: as `PlaneEncoder.code`, but the bits come from the stream."""
        found = np.empty_like(bits)

        def decode(part: slice, probabilities: Probabilities) -> Bits:
            found[part] = self._coder.decode(probabilities, part.stop - part.start)
            return found[part]

        self._code_scans(name, kinds, at, ends, nodes, decode)
        return found

    def finish(self) -> None:
        """Check that the stream ends here."""
        self._coder.finish()


_MAX_EXPONENT = (MAX_ALPHABET // 2).bit_length() - 1
_EXPONENT_OF = np.frexp((np.arange(MAX_ALPHABET) + 1) >> 1)[1].astype(np.int64) - 1  # by symbol
Symbols = NDArray[np.uint16]
HEAD_BYTES = 1 << 8  # no head is longer: two lengths, the exponents, 24 planes of 7 bytes
_SLAB_MEMORY = 160  # bytes a position of a slab, with symbols of the largest alphabet


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
    coding = PlaneEncoder(view)
    for start, stop in view.slabs():
        coding.last = stop == len(symbols)
        _code_slab(coding, *view.scan_order(start, stop), symbols, exponents)
    head = varint(view.b) + varint(view.c) + bytes([exponents])
    return head + _pack_weights(coding, exponents) + coding.finish()


def decode(data: bytes, shape: tuple[int, ...], *, one_axis: bool = False) -> Symbols:
    """The symbols of a stream that `encode` made.

    Args:
        data: the stream.
        shape: of the tensor.
        one_axis: refuse a stream with another view than of one axis, whose memory is that of a
            slab whatever its head says.

    Raises:
        CorruptArtifactError: when the stream is damaged or of another shape.
    """
    count = math.prod(shape)
    if count == 0:
        if data:
            raise CorruptArtifactError("bytes after the end of a context-coded stream")
        return np.zeros(0, np.uint16)
    reader = ByteReader(data)
    head = _Head.read(reader, count)
    view = head.view
    if one_axis and view.a != count:
        raise CorruptArtifactError(f"a plane of {count} symbols seen as {view.shape}")
    symbols = np.zeros(count, np.uint16)
    coding = PlaneDecoder(view, head.weights, reader.rest())
    for start, stop in view.slabs():
        coding.last = stop == len(symbols)
        _code_slab(coding, *view.scan_order(start, stop), symbols, head.exponents)
    coding.finish()
    return symbols


def decode_memory(data: bytes, shape: tuple[int, ...]) -> int:
    """Upper bound of the memory to decode a stream, beside its symbols, in bytes.

    A slab is worked on at a time; the counts of all contexts stay from slab to slab.

    Args:
        data: the stream, or its first `HEAD_BYTES`.
        shape: of the tensor.

    Raises:
        CorruptArtifactError: when the head is damaged or of another shape.

    >>> decode_memory(encode(np.zeros(1000, np.uint16), (1000,)), (1000,)) // 1000
    160
    """
    count = math.prod(shape)
    if count == 0:
        return 0
    head = _Head.read(ByteReader(data), count)
    keys = sum(head.view.sizes[table] for tables in head.weights.values() for table in tables)
    return slab_memory(head.view) + 2 * count_dtype(count).itemsize * keys


def slab_memory(view: View) -> int:
    """Upper bound of the memory to decode the largest slab of a view, in bytes."""
    return _SLAB_MEMORY * view.slab


def _code_slab(
    coding: PlaneEncoder | PlaneDecoder, at: Ints, ends: Ints, symbols: Symbols, exponents: int
) -> None:
    """Code the symbols at the positions `at`; a decoder writes them into `symbols`.

    Every plane's true bits are computed from `symbols` for the encoder; the decoder, for which
    they are still 0, returns the bits that it read instead.
    """
    true = symbols[at]
    bits = coding.code("zero", at, ends, true > 0)
    kept, ends = _set_positions(bits, ends)
    at, true = at[kept], true[kept]
    sign = coding.code("sign", at, ends, true & 1 == 1)
    exponent = _code_exponents(coding, at, ends, _EXPONENT_OF.take(true), exponents)
    size = (true.astype(np.int64) + 1) >> 1
    magnitude = _code_magnitudes(coding, at, ends, size, exponent, exponents)
    symbols[at] = 2 * magnitude - sign


def _code_exponents(
    coding: PlaneEncoder | PlaneDecoder, at: Ints, ends: Ints, true: Ints, most: int
) -> Ints:
    """Code the exponent of each magnitude, in unary."""
    exponent: Ints = np.zeros(len(at), np.int64)
    alive = np.arange(len(at))
    for level in range(most):
        more = coding.code(f"exponent{level}", at, ends, true > level)
        kept, ends = _set_positions(more, ends)
        at, true, alive = at[kept], true[kept], alive[kept]
        exponent[alive] = level + 1
    return exponent


def _code_magnitudes(
    coding: PlaneEncoder | PlaneDecoder,
    at: Ints,
    ends: Ints,
    true: Ints,
    exponent: Ints,
    exponents: int,
) -> Ints:
    """Code the bits of each magnitude after its leading one."""
    magnitude = np.ones(len(at), np.int64)
    alive = np.arange(len(at))
    for level in range(1, exponents + 1):
        kept, ends = _set_positions(exponent >= level, ends)
        at, true, exponent, alive = at[kept], true[kept], exponent[kept], alive[kept]
        known = magnitude[alive]
        bits = true >> exponent - level & 1 == 1
        nodes, kinds = exponent << level | known, (exponents + 1) << level
        bits = coding.code(f"bit{level}", at, ends, bits, nodes, kinds)
        magnitude[alive] = 2 * known + bits
    return magnitude


def _set_positions(bits: Bits, ends: Ints) -> tuple[Ints, Ints]:
    """Indices of the set bits, and where each scan of these ends."""
    kept = np.flatnonzero(bits)
    return kept, kept.searchsorted(ends)


def _plane_names(exponents: int) -> list[str]:
    """Names of the planes, in the order in which their weights are stored."""
    levels = range(exponents)
    bits = [f"bit{level + 1}" for level in levels]
    return ["zero", "sign", *(f"exponent{level}" for level in levels), *bits]


@dataclass(frozen=True)
class _Head:
    """What a stream begins with.

    Args:
        view: of the tensor.
        exponents: number of exponents of magnitudes.
        weights: of each plane's tables.
    """

    view: View
    exponents: int
    weights: dict[str, Weights]

    @classmethod
    def read(cls, reader: ByteReader, count: int) -> _Head:
        """The head of a stream of `count` symbols, at least one.

        Raises:
            CorruptArtifactError: when it is damaged or of another count.
        """
        view = _read_view(reader, count)
        exponents = reader.take(1, "the number of exponents")[0]
        if exponents > _MAX_EXPONENT:
            raise CorruptArtifactError(f"exponents up to {exponents}, above {_MAX_EXPONENT}")
        weights = {name: _read_weights(reader, view) for name in _plane_names(exponents)}
        return cls(view, exponents, weights)


def _pack_weights(coding: PlaneEncoder, exponents: int) -> bytes:
    """For each plane: a bit mask of its contexts, then a byte for each weight."""
    out = bytearray()
    if not coding.view.context_axes:
        return b""
    for name in _plane_names(exponents):
        weights = coding.weights.get(name, {})
        out.append(sum(1 << table for table in weights))
        out += bytes(weight & 0xFF for weight in weights.values())
    return bytes(out)


def _read_weights(reader: ByteReader, view: View) -> Weights:
    if not view.context_axes:
        return {}
    mask = reader.take(1, "the contexts of a plane")[0]
    if mask >> len(view.context_axes):
        raise CorruptArtifactError(f"contexts {mask:#b}, the view has {len(view.context_axes)}")
    tables = [table for table in range(len(view.context_axes)) if mask >> table & 1]
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
