"""Symbol codecs by name: small integers to bytes and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.entropy import entropy_of_counts
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import context, huffman
from lightning_compress.lcz.bits import (
    ByteReader,
    chunks,
    count_values,
    pack_fixed,
    unpack_fixed,
    varint,
)
from lightning_compress.lcz.huffman import MAX_ALPHABET
from lightning_compress.lcz.range_coder import decode_static, encode_static

__all__ = [
    "CHOICES",
    "CODECS",
    "ESCAPE",
    "Codec",
    "check_codec",
    "decode_arithmetic",
    "decode_relative_index",
    "decode_symbols",
    "encode_arithmetic",
    "encode_relative_index",
    "encode_symbols",
    "entropy_bits",
    "join_runs",
    "max_runs",
    "split_runs",
]
_TOTAL = 1 << 16  # what the frequencies of a table add up to
Symbols = NDArray[np.uint16]


def encode_arithmetic(symbols: Symbols) -> bytes:
    """Static arithmetic code: alphabet size and frequencies, then the range-coded symbols.

    >>> decode_arithmetic(encode_arithmetic(np.array([3, 3, 0], np.uint16)), 3)
    array([3, 3, 0], dtype=uint16)
    """
    if not len(symbols):
        return b""
    counts = count_values(symbols)
    frequencies = _frequencies(counts)
    table = b"".join(varint(frequency) for frequency in frequencies.tolist())
    head = varint(len(counts)) + table
    return head if frequencies.max() == _TOTAL else head + encode_static(symbols, frequencies)


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts scaled to a sum of `_TOTAL`, at least 1 for every symbol that occurs."""
    shares = np.maximum(counts * _TOTAL // counts.sum(), counts > 0)
    while (excess := int(shares.sum()) - _TOTAL) > 0:  # many symbols of share 1
        largest = int(shares.argmax())
        shares[largest] -= min(excess, max(int(shares[largest]) // 2, 1))
    shares[shares.argmax()] -= excess
    return shares


def decode_arithmetic(data: bytes, count: int) -> Symbols:
    """The `count` symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the table or the stream is damaged.
    """
    if count == 0:
        if data:
            raise CorruptArtifactError("bytes after the end of an arithmetic stream")
        return np.zeros(0, np.uint16)
    reader = ByteReader(data)
    size = reader.varint(limit=MAX_ALPHABET, what="the alphabet of an arithmetic code")
    table = [reader.varint(limit=_TOTAL, what="a frequency") for _ in range(size)]
    if sum(table) != _TOTAL or not table[-1]:
        raise CorruptArtifactError(f"frequencies add up to {sum(table)}, not {_TOTAL}")
    if table[-1] == _TOTAL:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of an arithmetic stream")
        return np.full(count, size - 1, np.uint16)
    return decode_static(reader.rest(), np.array(table), count)


_WIDTHS = (5, 8)  # bits of a distance: the paper's for fully connected and convolutional layers


def encode_relative_index(symbols: Symbols) -> bytes:
    """Relative-index code of Deep Compression: the smaller stream of the paper's two widths.

    >>> data = encode_relative_index(np.array([0] * 40 + [3, 0], np.uint16))
    >>> decode_relative_index(data, 42)[39:]
    array([0, 3, 0], dtype=uint16)
    """
    return min((_encode_distances(symbols, width) for width in _WIDTHS), key=len)


def _encode_distances(symbols: Symbols, width: int) -> bytes:
    places = np.flatnonzero(symbols)
    if not len(places):
        return varint(0)
    distances = np.diff(places, prepend=-1)  # 1 to 2^width; stored less 1
    fillers, rest = np.divmod(distances - 1, 1 << width)
    last = np.cumsum(fillers + 1) - 1
    steps = np.full(last[-1] + 1, (1 << width) - 1, np.uint16)
    values = np.zeros(len(steps), np.uint16)
    steps[last], values[last] = rest, symbols[places]
    coded = huffman.encode(steps)
    head = varint(len(steps)) + bytes([width]) + varint(len(coded))
    return head + coded + huffman.encode(values)


def decode_relative_index(data: bytes, count: int) -> Symbols:
    """The `count` symbols of a stream that `encode` made.

    Raises:
        CorruptArtifactError: when the streams are damaged or lead past the end.
    """
    reader = ByteReader(data)
    length = reader.varint(limit=count, what="the count of distances")
    if length == 0:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of a relative-index stream")
        return np.zeros(count, np.uint16)
    width = reader.take(1, "the width of distances")[0]
    if width not in _WIDTHS:
        raise CorruptArtifactError(f"distances of {width} bits")
    coded = reader.take(reader.varint(limit=len(data), what="a stream's length"), "distances")
    steps, values = huffman.decode_streams([(coded, length), (reader.rest(), length)])
    if steps.max() >> width:
        raise CorruptArtifactError(f"a distance of {steps.max() + 1} in {width} bits")
    return _place_values(steps, np.ones(length, np.bool_), values, count)


def _place_values(
    gaps: Symbols, closing: NDArray[np.bool_], values: Symbols, count: int
) -> Symbols:
    """`count` symbols: gaps of zeros, a value of its own after each that is `closing`.

    Raises:
        CorruptArtifactError: when a value would lie past the end.
    """
    out, place, placed = np.zeros(count, np.uint16), -1, 0
    for piece in chunks(len(gaps)):
        ends = closing[piece]
        places = place + np.cumsum(gaps[piece] + ends, dtype=np.int64)
        place = int(places[-1])
        if place >= count:
            raise CorruptArtifactError(f"a run of zeros leads to {place}, past the end at {count}")
        places = places[ends]
        out[places] = values[placed : placed + len(places)]
        placed += len(places)
    return out


ESCAPE = 255  # this run symbol means: 255 zeros, and no value after them


def split_runs(symbols: Symbols) -> tuple[Symbols, Symbols]:
    """Runs of zeros before each value, and the values that are not zero.

    Zeros after the last value are left out: the count of symbols implies them.

    Returns:
        (R,) run symbols up to `ESCAPE` and (V,) values, R >= V.

    >>> runs, values = split_runs(np.array([0, 0, 7, 5, 0], np.uint16))
    >>> runs.tolist(), values.tolist()
    ([2, 0], [7, 5])
    """
    places = np.flatnonzero(symbols)
    gaps = np.diff(places, prepend=-1) - 1
    escapes, remainder = np.divmod(gaps, ESCAPE)
    last = np.cumsum(escapes + 1) - 1  # where each gap's closing run symbol goes
    runs = np.full(last[-1] + 1 if len(last) else 0, ESCAPE, np.uint16)
    runs[last] = remainder
    return runs, symbols[places]


def max_runs(values: int, count: int) -> int:
    """The most run symbols that `values` non-zero symbols among `count` can take."""
    return values + count // ESCAPE


def join_runs(runs: Symbols, values: Symbols, count: int) -> Symbols:
    """The opposite of `split_runs`, for `count` symbols.

    Raises:
        CorruptArtifactError: when runs and values do not belong together or lead past the end.

    >>> join_runs(np.array([2, 0], np.uint16), np.array([7, 5], np.uint16), 5)
    array([0, 0, 7, 5, 0], dtype=uint16)
    """
    closing = runs != ESCAPE
    if int(closing.sum()) != len(values) or not closing[-1:].all():
        raise CorruptArtifactError("the zero runs do not fit the non-zero values")
    if len(runs) and runs.max() > ESCAPE:
        raise CorruptArtifactError(f"a zero run of {runs.max()}, above {ESCAPE}")
    return _place_values(runs, closing, values, count)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """Codec of N symbols below `MAX_ALPHABET` of a tensor of known shape.

    Args:
        encode: (N,) symbols and the shape to bytes.
        decode: bytes and the shape to symbols.
        fast: number of symbols from which it encodes 10 million a second and decodes 25 million,
            on one thread; None: it never does.
        benchmark_only: for benchmarks only; "auto" never uses it.
    """

    encode: Callable[[Symbols, Shape], bytes]
    decode: Callable[[bytes, Shape], Symbols]
    fast: int | None = None
    benchmark_only: bool = False


def _without_shape(
    encode: Callable[[Symbols], bytes],
    decode: Callable[[bytes, int], Symbols],
    *,
    fast: int | None = None,
    benchmark_only: bool = False,
) -> Codec:
    """A codec that ignores the shape."""
    return Codec(
        lambda symbols, _: encode(symbols),
        lambda data, shape: decode(data, math.prod(shape)),
        fast,
        benchmark_only,
    )


def _encode_raw(symbols: Symbols) -> bytes:
    width = int(symbols.max(initial=0)).bit_length()
    return bytes([width]) + pack_fixed(symbols, width)


def _decode_raw(data: bytes, count: int) -> Symbols:
    reader = ByteReader(data)
    width = reader.varint(limit=(MAX_ALPHABET - 1).bit_length(), what="the width of raw symbols")
    return unpack_fixed(reader.rest(), width, count)


def _encode_runs(symbols: Symbols) -> bytes:
    runs, values = split_runs(symbols)
    if not len(values):
        return varint(0)
    coded = huffman.encode(runs)
    head = varint(len(values)) + varint(len(runs)) + varint(len(coded))
    return head + coded + huffman.encode(values - 1)


def _decode_runs(data: bytes, count: int) -> Symbols:
    reader = ByteReader(data)
    kept = reader.varint(limit=count, what="the count of non-zero symbols")
    if kept == 0:
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of a run-length stream")
        return np.zeros(count, np.uint16)
    length = reader.varint(limit=max_runs(kept, count), what="the count of zero runs")
    coded = reader.take(reader.varint(limit=len(data), what="a stream's length"), "zero runs")
    runs, values = huffman.decode_streams([(coded, length), (reader.rest(), kept)])
    values += np.uint16(1)
    return join_runs(runs, values, count)


# A codec is one row; of equal sizes the earlier row is used.
CODECS = {
    "raw": _without_shape(_encode_raw, _decode_raw, fast=0),
    "arithmetic": _without_shape(encode_arithmetic, decode_arithmetic, fast=0),
    "rle_huffman": _without_shape(_encode_runs, _decode_runs, fast=1 << 18),
    "huffman": _without_shape(huffman.encode, huffman.decode),
    "context": Codec(context.encode, context.decode),
    "relative_index": _without_shape(
        encode_relative_index, decode_relative_index, benchmark_only=True
    ),
}

# Valid names, and the codecs whose smallest result each of them uses.
CHOICES = {
    "auto": tuple(name for name, codec in CODECS.items() if not codec.benchmark_only),
    "fast": tuple(name for name, codec in CODECS.items() if codec.fast is not None),
    **{name: (name,) for name in CODECS},
}


def check_codec(codec: str) -> None:
    """Check the name of a codec.

    Raises:
        ValueError: naming the valid ones.
    """
    if codec not in CHOICES:
        raise ValueError(f"codec={codec!r}: valid are {', '.join(map(repr, CHOICES))}")


def encode_symbols(
    symbols: NDArray[np.integer], codec: str = "auto", shape: Shape | None = None
) -> tuple[str, bytes]:
    """Bytes of (N,) symbols, and the name of the codec used.

    Args:
        symbols: integers from 0 to `MAX_ALPHABET - 1`; 0 is assumed to be the most frequent.
        codec: a name in `CHOICES`; "auto" gives the smallest result, "fast" the smallest of those
            codecs that are fast for so many.
        shape: of the tensor of these symbols, in its order; None: one axis.

    Raises:
        ValueError: for an unknown codec, or a symbol out of range.

    >>> name, data = encode_symbols(np.array([0] * 997 + [3, 1, 2]))
    >>> decode_symbols(name, data, (1000,), limit=4)[-3:].tolist()
    [3, 1, 2]
    """
    check_codec(codec)
    if len(symbols) and not (symbols.min() >= 0 and symbols.max() < MAX_ALPHABET):
        raise ValueError(f"symbols {symbols.min()} to {symbols.max()}, not 0 to {MAX_ALPHABET - 1}")
    narrow = symbols.astype(np.uint16, copy=False)
    shape = (len(symbols),) if shape is None else shape
    names = CHOICES[codec]
    if codec == "fast":
        names = [name for name in names if len(narrow) >= (CODECS[name].fast or 0)]
    results = ((name, CODECS[name].encode(narrow, shape)) for name in names)
    return min(results, key=lambda result: len(result[1]))


def decode_symbols(codec: str, data: bytes, shape: Shape, *, limit: int) -> Symbols:
    """The symbols of a tensor of this shape that `encode_symbols` made into `data`.

    Memory grows with the shape, whatever the data say: the caller bounds it.

    Raises:
        CorruptArtifactError: when the data are damaged, or hold a symbol of `limit` or above.
    """
    symbols = CODECS[codec].decode(data, shape)
    if symbols.max(initial=0) >= limit:
        raise CorruptArtifactError(f"symbol {symbols.max()}, not below {limit}")
    return symbols


def entropy_bits(symbols: NDArray[np.integer]) -> float:
    """Zero-order entropy of (N,) symbols times N, in bits.

    >>> entropy_bits(np.array([0, 1, 2, 3]))
    8.0
    """
    return entropy_of_counts(count_values(symbols))
