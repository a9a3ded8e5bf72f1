"""Range coder on `constriction`: bits with a probability each, symbols with one table.

A stream is 32-bit words, least significant byte first, without the zero bytes at its end.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import chunks

__all__ = ["BitDecoder", "BitEncoder", "decode_static", "encode_static"]

_STREAM: Any = vars(constriction)["stream"]  # a module that its stubs do not name
RangeEncoder: Any = _STREAM.queue.RangeEncoder
RangeDecoder: Any = _STREAM.queue.RangeDecoder
_BERNOULLI: Any = _STREAM.model.Bernoulli(perfect=False)


class BitEncoder:
    """Range encoder of bits."""

    def __init__(self) -> None:
        self._coder = RangeEncoder()

    def encode(self, bits: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> None:
        """Append (N,) bits, given the (N,) probabilities that they are 1, or the (1,) of all."""
        if len(bits):
            self._coder.encode(bits.astype(np.int32), *_bernoulli(probabilities))

    def finish(self) -> bytes:
        """The whole stream."""
        return _to_bytes(self._coder)


class BitDecoder:
    """Range decoder of bits."""

    def __init__(self, data: bytes) -> None:
        self._coder = _from_bytes(data)

    def decode(self, probabilities: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
        """The next `count` bits, given the same probabilities as the encoder had.

        Raises:
            CorruptArtifactError: when no encoder made the stream.
        """
        if not count:
            return np.zeros(0, np.bool_)
        model = _bernoulli(probabilities)
        arguments = model if len(probabilities) > 1 else (*model, count)
        return _decode_with(self._coder, *arguments).astype(np.bool_)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            CorruptArtifactError: when bytes are.
        """
        if not self._coder.maybe_exhausted():
            raise CorruptArtifactError("bytes after the end of a range-coded stream")


def _bernoulli(probabilities: NDArray[np.float64]) -> tuple[object, ...]:
    """One model for all bits is ten times faster than one each, and gives the same stream."""
    if len(probabilities) > 1:
        return _BERNOULLI, probabilities
    return (_STREAM.model.Bernoulli(float(probabilities[0]), perfect=False),)


def encode_static(symbols: NDArray[np.uint16], frequencies: NDArray[np.int64]) -> bytes:
    """Symbols with one table of frequencies, which add up to a power of two."""
    coder = RangeEncoder()
    coder.encode(symbols.astype(np.int32), _categorical(frequencies))
    return _to_bytes(coder)


def decode_static(data: bytes, frequencies: NDArray[np.int64], count: int) -> NDArray[np.uint16]:
    """The opposite of `encode_static`.

    Raises:
        CorruptArtifactError: when no encoder made the stream, or bytes are left.
    """
    coder, model = _from_bytes(data), _categorical(frequencies)
    symbols = np.empty(count, np.uint16)
    for piece in chunks(count):
        symbols[piece] = _decode_with(coder, model, piece.stop - piece.start)
    if not coder.maybe_exhausted():
        raise CorruptArtifactError("bytes after the end of a range-coded stream")
    return symbols


def _categorical(frequencies: NDArray[np.int64]) -> Any:
    return _STREAM.model.Categorical(frequencies / frequencies.sum(), perfect=False)


def _decode_with(coder: Any, *model: object) -> NDArray[np.int32]:
    try:
        return coder.decode(*model)
    except AssertionError:
        raise CorruptArtifactError("a range-coded stream is damaged") from None


def _to_bytes(coder: Any) -> bytes:
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def _from_bytes(data: bytes) -> Any:
    if data[-1:] == b"\0":
        raise CorruptArtifactError("a range-coded stream ends in a zero byte")
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4")
    return RangeDecoder(words.astype(np.uint32))
