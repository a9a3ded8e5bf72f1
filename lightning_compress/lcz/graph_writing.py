"""Encoder of ONNX models: each larger tensor is coded, or found among the module's tensors."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lightning_compress.lcz.graph import INTEGERS, NIBBLES, Gap, GraphRecord, reorder_axes
from lightning_compress.lcz.graph_inlining import MIN_BYTES
from lightning_compress.lcz.header import TensorRecord
from lightning_compress.lcz.protobuf import DOUBLES, FLOATS, RAW, OnnxTensor, onnx_tensors
from lightning_compress.lcz.raw_bits import DTYPES
from lightning_compress.lcz.tensors import encode_patterns

__all__ = ["EncodedGraph", "Source", "encoded_graph"]

# ONNX's `data_type` by number; numbers of other types are kept as their bytes.
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64",
    15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn", 19: "float8_e5m2", 21: "uint4",
    22: "int4",
}  # fmt: skip
_ROW_COST = 30  # bytes of the header that a row takes
_PROBE = 512  # elements compared first for each order of axes
_MAX_ORDERS = 2000  # of axes, tried for one pair of tensors
_STRIDES = range(1, 9)  # of a transposed convolution, whose kernel is cut into phases


@dataclass(frozen=True)
class Source:
    """A tensor of the module that the graph may share.

    Args:
        record: its row.
        numbers: gives its integer levels if it has a grid, else None; in its shape.
        words: gives its elements' bit patterns.
    """

    record: TensorRecord
    numbers: Callable[[], NDArray[np.integer] | None]
    words: Callable[[], NDArray[np.unsignedinteger]]


@dataclass
class EncodedGraph:
    """A graph's record, its rows and its payload."""

    record: GraphRecord
    payloads: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the model: its name in the file, its bytes, and its integers or words."""

    name: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    values: NDArray
    nibbles: str = ""

    @property
    def is_integer(self) -> bool:
        return bool(self.nibbles) or self.dtype in INTEGERS


def encoded_graph(
    name: str, data: bytes, codec: str, sources: Mapping[str, Source] | None = None
) -> EncodedGraph:
    """Encode the larger tensors of an ONNX model, and deflate the rest.

    Args:
        name: of the graph.
        data: the model, with its tensors' values inside it (see `inline_tensors`).
        codec: of the symbols, as in `save_compressed`.
        sources: the module's tensors by name, whose numbers need not be stored again.

    Raises:
        ValueError: when the bytes are no ONNX model.
    """
    skeleton, at = bytearray(), 0
    gaps: list[tuple[Gap, TensorRecord]] = []
    payloads: list[bytes] = []
    for tensor in _large_tensors(data):
        found = _find_shared(tensor, sources or {})
        if found is None:
            found, payload = _own_row(tensor, data[tensor.start : tensor.end], codec)
            if found is None:
                continue
            payloads.append(payload)
        gap, record = found
        gaps.append((replace(gap, skip=tensor.start - at), record))
        skeleton += data[at : tensor.start]
        at = tensor.end
    skeleton += data[at:]
    stored = zlib.compress(bytes(skeleton), 9)
    own = [record for gap, record in gaps if not gap.source]
    return EncodedGraph(
        GraphRecord(name, len(stored), len(skeleton), own, gaps), [stored, *payloads]
    )


def _large_tensors(data: bytes) -> Iterator[_Tensor]:
    """The tensors of more than a few bytes, in the order of the model, with names of their own."""
    names: set[str] = set()
    for tensor in onnx_tensors(data):
        if (span := _span(tensor)) is None:
            continue
        name = base = tensor.name or "constant"
        for number in itertools.count(2):
            if name not in names:
                break
            name = f"{base} ({number})"
        names.add(name)
        yield _read(name, tensor, *span, data[slice(*span)])


def _span(tensor: OnnxTensor) -> tuple[int, int] | None:
    fields = list(tensor.values.items())
    if len(fields) != 1 or fields[0][0] not in (RAW, FLOATS, DOUBLES) or len(fields[0][1]) != 1:
        return None
    start, end = fields[0][1][0]
    return (start, end) if end - start >= MIN_BYTES else None


def _read(name: str, tensor: OnnxTensor, start: int, end: int, raw: bytes) -> _Tensor:
    dtype, count = _DTYPES.get(tensor.kind, ""), math.prod(tensor.shape)
    if dtype in NIBBLES and len(raw) == (count + 1) // 2:
        both = np.frombuffer(raw, np.uint8)
        halves = np.stack([both & 15, both >> 4], 1).reshape(-1)
        if not halves[count:].any():
            values = halves[:count].astype(np.int8)
            if dtype == "int4":
                values = ((values ^ 8) - 8).astype(np.int8)
            return _Tensor(name, start, end, "int8", tensor.shape, values, dtype)
    size = DTYPES[dtype].itemsize if dtype in DTYPES else 0
    if not size or len(raw) != count * size or len(tensor.shape) > 32:
        return _Tensor(name, start, end, "uint8", (len(raw),), np.frombuffer(raw, np.uint8))
    kind = f"<u{min(size, 8)}" if dtype not in INTEGERS else np.dtype(dtype).newbyteorder("<")
    return _Tensor(name, start, end, dtype, tensor.shape, np.frombuffer(raw, kind))


def _own_row(
    tensor: _Tensor, raw: bytes, codec: str
) -> tuple[tuple[Gap, TensorRecord] | None, bytes]:
    """The tensor as a row; None where deflating it with the model takes less."""
    words = tensor.values.view(f"<u{tensor.values.itemsize}")
    zeros = int((words == 0).sum())
    row = TensorRecord(tensor.name, tensor.shape, tensor.dtype, zeros=zeros)
    record, payload = encode_patterns(row, words, codec)
    if len(payload) + _ROW_COST >= len(zlib.compress(raw, 9)):
        return None, b""
    return (Gap(0, dtype=tensor.nibbles), record), payload


def _find_shared(tensor: _Tensor, sources: Mapping[str, Source]) -> tuple[Gap, TensorRecord] | None:
    """The module's row with the same numbers, and how to decode the tensor from it; or None."""
    for source in sources.values():
        record = source.record
        if record.elements != math.prod(tensor.shape):
            continue
        gap = _as_levels(tensor, source) if tensor.is_integer else None
        if gap is None and not tensor.nibbles and record.dtype == tensor.dtype:
            words = source.words()
            mine = tensor.values.view(words.dtype)
            if len(words) == record.elements:
                gap = _find_order(mine, tensor.shape, words, record.shape)
        if gap is not None:
            return replace(gap, source=record.name), record
    return None


def _as_levels(tensor: _Tensor, source: Source) -> Gap | None:
    """An integer tensor as a source's levels, times a factor, plus an offset."""
    if (steps := source.numbers()) is None:
        return None
    steps, mine = steps.reshape(-1).astype(np.int32), tensor.values.astype(np.int32)
    low, high = int(steps.min()), int(steps.max())
    most = max(-low, high)
    for times, plus in _scalings(mine, low, high, most):
        wanted, rest = np.divmod(mine - plus, times)
        if rest.any():
            continue
        dtype = tensor.nibbles or tensor.dtype
        gap = _find_order(wanted, tensor.shape, steps, source.record.shape)
        if gap is None:
            gap = _find_sign_flips(wanted, tensor.shape, steps, source.record.shape)
        if gap is not None:
            return replace(gap, dtype=dtype, times=times, plus=plus)
    return None


def _scalings(
    values: NDArray[np.int32], low: int, high: int, most: int
) -> Iterator[tuple[int, int]]:
    """Candidate factors and offsets of levels from `low` to `high`."""
    if most == 0:
        return
    least, largest = int(values.min()), int(values.max())
    tried: set[tuple[int, int]] = set()
    if high > low and (largest - least) % (high - low) == 0 and largest > least:
        times = (largest - least) // (high - low)
        tried.add((times, least - times * low))
    for plus in (0, 128):  # where signs differ, so may the ends
        size = max(largest - plus, plus - least)
        if size > 0 and size % most == 0:
            tried.add((size // most, plus))
    yield from sorted(tried)


def _find_order(
    wanted: NDArray, shape: tuple[int, ...], given: NDArray, box: tuple[int, ...]
) -> Gap | None:
    """The order of axes that turns `given` into `wanted`, both flat."""
    if not _same_numbers(wanted, given):
        return None
    for gap in _orders(shape, box):
        if gap.box and not np.array_equal(_leading(given, gap), wanted[:_PROBE]):
            continue
        if np.array_equal(reorder_axes(given, gap), wanted):
            return gap
    return None


def _leading(values: NDArray, gap: Gap) -> NDArray:
    view = values.reshape(gap.box).transpose(gap.order)
    flips = tuple(slice(None, None, -1 if i in gap.backwards else 1) for i in range(view.ndim))
    return view[flips].flat[:_PROBE]


def _same_numbers(one: NDArray, other: NDArray) -> bool:
    """Whether two arrays may hold the same numbers in any order."""
    if one.dtype.kind == "i":
        low = min(int(one.min()), int(other.min()))
        return np.array_equal(np.bincount(one - low), np.bincount(other - low))
    with np.errstate(over="ignore"):
        sums = [(part.sum(dtype=np.uint64), (part * part).sum(dtype=np.uint64)) for part in
                (one, other)]  # fmt: skip
    return sums[0] == sums[1]


def _orders(shape: tuple[int, ...], box: tuple[int, ...]) -> Iterator[Gap]:
    """Candidate axis orders of conversions: unchanged, permuted, and kernels cut into phases.

    A transposed convolution becomes a convolution whose channels are the phases of its stride, and
    whose taps run backwards.
    """
    yield Gap(0)
    ends = set(itertools.accumulate(shape, lambda one, two: one * two))
    tried: set[tuple[object, ...]] = set()
    for seen, taps in _boxes(shape, box):
        for order in itertools.islice(itertools.permutations(range(len(seen))), _MAX_ORDERS):
            lengths = [seen[axis] for axis in order]
            if not ends <= set(itertools.accumulate(lengths, lambda one, two: one * two)) | {1}:
                continue
            flipped = tuple(index for index, axis in enumerate(order) if axis in taps)
            for backwards in dict.fromkeys([(), flipped]):
                key = (seen, order, backwards)
                if key not in tried:
                    tried.add(key)
                    yield Gap(0, box=seen, order=order, backwards=backwards)


def _boxes(
    shape: tuple[int, ...], box: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], set[int]]]:
    """Candidate shapes of a tensor without axes of length 1, and their tap axes."""
    groups = {1}
    if len(box) > 2 and len(shape) > 1 and shape[1] and box[0] % shape[1] == 0:
        groups.add(box[0] // shape[1])
    kernel = box[2:]
    for group, stride in itertools.product(sorted(groups), _STRIDES):
        if any(size % stride for size in kernel) or (stride > 1 and not kernel):
            continue
        front = [group, box[0] // group, *box[1:2]] if box else []
        phases = [part for size in kernel for part in (size // stride, stride)]
        lengths = [*front, *phases]
        taps = {len(front) + index for index in range(0, len(phases), 2)}
        kept = [axis for axis, size in enumerate(lengths) if size != 1]
        if 0 < len(kept) <= 7:
            seen = tuple(lengths[axis] for axis in kept)
            yield seen, {index for index, axis in enumerate(kept) if axis in taps}


def _find_sign_flips(
    wanted: NDArray, shape: tuple[int, ...], given: NDArray, box: tuple[int, ...]
) -> Gap | None:
    """Axis order where some channels have changed sign, as by a negative scale."""
    sizes, mine = np.abs(given), np.abs(wanted)
    gap = _find_order(mine, shape, sizes, box)
    if gap is None:
        return None
    places = reorder_axes(np.arange(len(given)), gap)
    back = np.empty_like(wanted)
    back[places] = wanted
    back, source = back.reshape(box), given.reshape(box)
    for axis in range(len(box)):
        one, other = (np.moveaxis(part, axis, 0).reshape(box[axis], -1) for part in (back, source))
        turned = (one == -other).all(1) & (one != other).any(1)
        if ((one == other).all(1) | turned).all():
            return replace(gap, signs=(axis, *np.flatnonzero(turned).tolist()))
    return None
