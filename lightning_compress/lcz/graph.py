"""Runnable graph of an `.lcz` file: an ONNX model whose tensors are stored as header rows.

The model's own bytes are kept, deflated, without those of its larger tensors; a `Gap` says where
such bytes belong and how they are decoded: a row of the graph's own, or a row of the module whose
integers are the same numbers in another order.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import map_in_chunks, varint
from lightning_compress.lcz.container import Container
from lightning_compress.lcz.decoding import decode_array, decode_levels
from lightning_compress.lcz.header import TensorRecord, optional, read_records
from lightning_compress.lcz.protobuf import DOUBLES, FLOATS, LENGTH, RAW, onnx_tensors
from lightning_compress.lcz.raw_bits import DTYPES, inflate

__all__ = [
    "INTEGERS",
    "NIBBLES",
    "Gap",
    "GraphRecord",
    "assemble_onnx",
    "read_graphs",
    "reorder_axes",
]

NIBBLES = ("int4", "uint4")
# What integers of a row may become, and the numbers that each can hold.
INTEGERS = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    **{name: (np.iinfo(name).min, np.iinfo(name).max) for name in ("int8", "uint8", "int16")},
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}
_EXPANSION = 1040  # bytes that a deflated byte can stand for, and some to spare
_TAGS = [varint(number << 3 | LENGTH) for number in (RAW, FLOATS, DOUBLES)]
_MAX_INT = 1 << 53


@dataclass(frozen=True)
class Gap:
    """Tensor bytes left out of an ONNX model, and how to decode them.

    Args:
        skip: bytes of the model between the last gap and this one.
        source: the module's row that holds the numbers; "": the graph's next own row.
        dtype: what the row's integers (on a grid: its levels) are written as; "": the row's
            elements as they are.
        box: the shape that the source's numbers are seen in; (): as they lie.
        order: of the axes of that box.
        backwards: axes of the ordered box that run backwards.
        signs: an axis of the source's shape, then the indices along it whose numbers change sign.
        times: what integers are multiplied with.
        plus: what is then added.
    """

    skip: int
    source: str = ""
    dtype: str = ""
    box: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    backwards: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()
    times: int = 1
    plus: int = 0

    def length(self, record: TensorRecord) -> int:
        """Bytes in the gap."""
        if self.dtype in NIBBLES:
            return (record.elements + 1) // 2
        size = np.dtype(self.dtype).itemsize if self.dtype else DTYPES[record.dtype].itemsize
        return record.elements * size


_KEYS = {
    "a": "skip", "t": "source", "d": "dtype", "b": "box", "x": "order", "f": "backwards",
    "s": "signs", "m": "times", "o": "plus",
}  # fmt: skip
_TEXTS, _LISTS = "td", "bxfs"


@dataclass(frozen=True)
class GraphRecord:
    """One graph of a file. Its payload is the deflated model, then the payloads of its rows.

    Args:
        name: which graph; "" where there is one.
        stored: bytes of the deflated model.
        plain: bytes of the model without what is left out.
        records: the graph's own rows.
        gaps: in the order of the model, each with the row it is filled from.
        offset: of its payload, behind the module's tensors.
    """

    name: str
    stored: int
    plain: int
    records: list[TensorRecord]
    gaps: list[tuple[Gap, TensorRecord]] = field(default_factory=list)
    offset: int = 0

    @property
    def payload_bytes(self) -> int:
        """Length of its payload."""
        return self.stored + sum(record.payload_bytes for record in self.records)

    @property
    def onnx_bytes(self) -> int:
        """Length of the ONNX file."""
        return self.plain + sum(gap.length(record) for gap, record in self.gaps)

    def rows(self, sources: dict[str, int]) -> Iterator[tuple[Gap, TensorRecord, int]]:
        """The gaps in the order of the model, each with its row and the offset of the payload.

        Args:
            sources: offsets of the payloads of the module's rows, by name.
        """
        offset = self.offset + self.stored
        for gap, record in self.gaps:
            yield gap, record, sources[gap.source] if gap.source else offset
            offset += 0 if gap.source else record.payload_bytes

    def row(self) -> dict[str, Any]:
        """The header's entry, but for its rows."""
        gaps = [
            {
                key: list(value) if isinstance(value, tuple) else value
                for key, name in _KEYS.items()
                if (value := getattr(gap, name)) != _DEFAULTS.get(name)
            }
            for gap, _ in self.gaps
        ]
        return {"n": self.name, "l": self.stored, "p": self.plain, "i": gaps}


_DEFAULTS = {"source": "", "dtype": "", "times": 1, "plus": 0}
_DEFAULTS |= dict.fromkeys(("box", "order", "backwards", "signs"), ())


def read_graphs(
    entry: object, records: list[TensorRecord], payload_bytes: int, size: int
) -> list[GraphRecord]:
    """The graphs of a header, checked by themselves and against the module's rows and the file.

    Args:
        entry: the header's `graphs`, as parsed from JSON.
        records: of the module.
        payload_bytes: what the payloads take in the file.
        size: of the file.

    Raises:
        CorruptArtifactError: naming the graph and what is wrong with it.
    """
    if not isinstance(entry, list):
        raise CorruptArtifactError("the header's graphs are no list")
    offset = sum(record.payload_bytes for record in records)
    sources = {record.name: record for record in records if record.kind != "tied"}
    graphs: list[GraphRecord] = []
    for row in entry:
        graphs.append(_graph(row, sources, offset, size))
        offset += graphs[-1].payload_bytes
    if len({graph.name for graph in graphs}) != len(graphs):
        raise CorruptArtifactError("a graph's name stands in the header twice")
    if offset != payload_bytes:
        raise CorruptArtifactError(f"payloads of {offset} bytes, the file has {payload_bytes}")
    return graphs


def _graph(row: object, sources: dict[str, TensorRecord], offset: int, size: int) -> GraphRecord:
    _check_keys(row, {"n", "l", "p", "i", "tensors"}, {"n", "l", "p", "i", "tensors"}, "graph")
    assert isinstance(row, dict)
    name, stored, plain = row["n"], row["l"], row["p"]
    if not isinstance(name, str) or not _is_integer(stored) or not _is_integer(plain):
        raise CorruptArtifactError(f"the header holds no graph: {str(row)[:80]!r}")
    try:
        if plain > _EXPANSION * (stored + 1):
            raise CorruptArtifactError(f"{plain} bytes cannot come of {stored} deflated ones")
        records = read_records(row["tensors"], None, size)
        if any(record.kind in ("tied", "grid") for record in records):
            raise CorruptArtifactError("a row of its own that is tied, or on a grid")
        gaps = _gaps(row["i"], sources, records)
        if sum(gap.skip for gap, _ in gaps) > plain:
            raise CorruptArtifactError(f"a gap beyond the {plain} bytes of the model")
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"graph {name!r}: {error}") from None
    return GraphRecord(name, stored, plain, records, gaps, offset)


def _check_keys(row: object, needed: set[str], known: set[str], what: str) -> None:
    if not isinstance(row, dict) or not needed <= set(row):
        raise CorruptArtifactError(f"the header holds no {what}: {str(row)[:80]!r}")
    if new := [key for key in row if key not in known and not optional(key)]:
        raise CorruptArtifactError(
            f"unknown key {new[0]!r} of a {what}: a newer version of the package wrote the file"
        )


def _gaps(
    rows: object, sources: dict[str, TensorRecord], records: list[TensorRecord]
) -> list[tuple[Gap, TensorRecord]]:
    if not isinstance(rows, list):
        raise CorruptArtifactError("its gaps are no list")
    own, found = iter(records), []
    for row in rows:
        gap = _gap(row)
        record = sources.get(gap.source) if gap.source else next(own, None)
        if record is None:
            raise CorruptArtifactError(f"no row {gap.source!r} for a gap: {str(row)[:80]!r}")
        if (fault := _gap_fault(gap, record)) is not None:
            raise CorruptArtifactError(f"the gap filled from {record.name!r}: {fault}")
        found.append((gap, record))
    if (left := next(own, None)) is not None:
        raise CorruptArtifactError(f"tensor {left.name!r} fills no gap")
    return found


def _gap(row: object) -> Gap:
    _check_keys(row, {"a"}, set(_KEYS), "gap")
    assert isinstance(row, dict)
    row = {key: value for key, value in row.items() if key in _KEYS}
    for key, value in row.items():
        if key in _TEXTS:
            fits = isinstance(value, str)
        elif key in _LISTS:
            fits = isinstance(value, list) and all(map(_is_integer, value))
            fits = fits and (key == "s" or len(value) <= 32)
        else:
            fits = _is_integer(abs(value) if key == "o" and type(value) is int else value)
        if not fits:
            raise CorruptArtifactError(f"a gap's {_KEYS[key]} is {str(value)[:80]!r}")
    values: dict[str, Any] = {
        _KEYS[key]: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    return Gap(**values)


def _is_integer(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _gap_fault(gap: Gap, record: TensorRecord) -> str | None:
    """What is wrong with a gap whose fields have the right types."""
    if gap.dtype and gap.dtype not in INTEGERS:
        return f"integers of type {gap.dtype!r}"
    if gap.dtype and record.kind != "grid" and record.dtype not in ("int8", "uint8"):
        return f"no integers in a {record.dtype} row"
    if not gap.dtype and (gap.times, gap.plus, gap.signs) != (1, 0, ()):
        return "arithmetic on elements that are no integers"
    if max(gap.times, abs(gap.plus)) > 1 << 31:
        return f"integers times {gap.times} plus {gap.plus}"
    return _order_fault(gap, record) or _signs_fault(gap.signs, record.shape)


def _order_fault(gap: Gap, record: TensorRecord) -> str | None:
    axes = range(len(gap.box))
    if gap.box and math.prod(gap.box) != record.elements:
        return f"{record.elements} elements seen as {list(gap.box)}"
    if sorted(gap.order) != list(axes) or not set(gap.backwards) <= set(axes):
        return f"axes {list(gap.order)} of {len(gap.box)}, backwards {list(gap.backwards)}"
    return None


def _signs_fault(signs: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    if signs and not (signs[0] < len(shape) and max(signs[1:], default=0) < shape[signs[0]]):
        return f"signs {str(list(signs))[:80]} of {list(shape)}"
    return None


def reorder_axes(values: NDArray, gap: Gap) -> NDArray:
    """(N,) the source's numbers in the axis order of the gap."""
    if not gap.box:
        return values.reshape(-1)
    view = values.reshape(gap.box).transpose(gap.order)
    flips = tuple(slice(None, None, -1 if i in gap.backwards else 1) for i in range(view.ndim))
    return view[flips].reshape(-1)


def assemble_onnx(graph: GraphRecord, container: Container, sources: dict[str, int]) -> bytes:
    """The ONNX model of a graph, to the byte as it was packed.

    Args:
        graph: of the file.
        container: the file.
        sources: offsets of the payloads of the module's rows, by name.

    Raises:
        CorruptArtifactError: naming the graph, when its rows do not fit the model.
    """
    try:
        model = inflate(container.read(graph.offset, graph.stored), graph.plain)
        out = io.BytesIO()
        for chunk in _model_chunks(graph, container, sources, model):
            out.write(chunk)
        data = out.getvalue()
        for _ in onnx_tensors(data):
            pass
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"graph {graph.name!r}: {error}") from None
    except ValueError as error:
        raise CorruptArtifactError(f"graph {graph.name!r}: {error}") from None
    return data


def _model_chunks(
    graph: GraphRecord, container: Container, sources: dict[str, int], model: bytes
) -> Iterator[bytes]:
    at = 0
    for gap, record, start in graph.rows(sources):
        yield model[at : at + gap.skip]
        at += gap.skip
        length = gap.length(record)
        if not model[max(at - 12, 0) : at].endswith(tuple(tag + varint(length) for tag in _TAGS)):
            raise CorruptArtifactError(
                f"{length} bytes of {record.name!r} are not what the model has there"
            )
        yield _gap_bytes(gap, record, container.read(start, record.payload_bytes))
    yield model[at:]


def _gap_bytes(gap: Gap, record: TensorRecord, payload: bytes) -> bytes:
    """The bytes of a gap."""
    if not gap.dtype:
        return reorder_axes(decode_array(record, payload), gap).tobytes()
    if record.kind == "grid":
        values, _ = decode_levels(record, payload)
    else:
        values = decode_array(record, payload)
    if gap.signs:
        values = values.astype(np.int16, copy=False)  # levels are, others have eight bits
        along = np.moveaxis(values, gap.signs[0], 0)
        along[list(gap.signs[1:])] *= -1
    low, high = INTEGERS[gap.dtype]

    def integers(piece: NDArray[np.integer]) -> NDArray[np.int64]:
        found = piece.astype(np.int64) * gap.times + gap.plus
        if not (found.min() >= low and found.max() <= high):
            raise CorruptArtifactError(f"{record.name!r} holds integers that are no {gap.dtype}")
        return found

    dtype = np.dtype("int8" if gap.dtype in NIBBLES else gap.dtype).newbyteorder("<")
    flat = map_in_chunks(integers, reorder_axes(values, gap), dtype)
    if gap.dtype not in NIBBLES:
        return flat.tobytes()
    nibbles = np.zeros((len(flat) + 1) // 2 * 2, np.uint8)
    nibbles[: len(flat)] = flat.view(np.uint8) & np.uint8(15)
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()
