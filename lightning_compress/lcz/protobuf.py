"""Protobuf reader for the tensors and metadata of an ONNX model, without onnx.

The fields are those of onnx.proto (IR version 3 to 13); a message is a run of `tag value`, where
the tag holds the field's number and how its value is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lightning_compress.lcz.bits import varint

__all__ = [
    "Field",
    "OnnxTensor",
    "external_file",
    "fields",
    "message",
    "model_options",
    "onnx_tensors",
]

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_MAX_DEPTH = 100  # of messages in each other; protobuf's own limit

# Which fields of a message hold messages that may hold tensors.
NESTED = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
}
_GRAPH, _METADATA = 7, 14  # of a model
DIMS, KIND, FLOATS, INT32S, INT64S, NAME, RAW, DOUBLES, UINT64S, EXTERNAL, LOCATION = (
    1, 2, 4, 5, 7, 8, 9, 10, 11, 13, 14,
)  # fmt: skip


class Field(NamedTuple):
    """A field of a message: its number, how it is written, and where; a varint's value too."""

    number: int
    wire: int
    start: int  # of the tag
    value: int  # begins here
    end: int
    whole: int = 0


@dataclass
class OnnxTensor:
    """A tensor in an ONNX model.

    Args:
        name: of an initializer; a constant may have none.
        kind: its `data_type`.
        shape: its `dims`.
        values: field number -> where its bytes lie, (start, end), of the fields with values.
        external: entries that say which other file holds the values.
    """

    name: str = ""
    kind: int = 0
    shape: tuple[int, ...] = ()
    values: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in `data[start:end]`.

    Raises:
        ValueError: when the bytes are no message.

    >>> [(one.number, one.whole) for one in fields(bytes([0x08, 0x96, 0x01]))]
    [(1, 150)]
    """
    at, end = start, len(data) if end is None else end
    while at < end:
        tag, value = _varint(data, at, end)
        number, wire, whole = tag >> 3, tag & 7, 0
        if wire == VARINT:
            whole, after = _varint(data, value, end)
        elif wire == LENGTH:
            length, value = _varint(data, value, end)
            after = value + length
        elif wire in _FIXED:
            after = value + _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if after > end or not number:
            raise ValueError(f"field {number} at byte {at} does not end within its message")
        yield Field(number, wire, at, value, after, whole)
        at = after


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number at byte {at} has no end")


def message(number: int, content: bytes) -> bytes:
    """A field whose value is a message or bytes."""
    return varint(number << 3 | LENGTH) + varint(len(content)) + content


def onnx_tensors(data: bytes) -> Iterator[OnnxTensor]:
    """The tensors of a model: initializers and constants, of subgraphs and functions too.

    Raises:
        ValueError: when the bytes are no ONNX model.
    """
    try:
        if not any(one.number == _GRAPH and one.wire == LENGTH for one in fields(data)):
            raise ValueError("it has no graph")
        yield from _tensors(data, "model", 0, len(data), 0)
    except ValueError as error:
        raise ValueError(f"no ONNX model: {error}") from None


def _tensors(data: bytes, kind: str, start: int, end: int, depth: int) -> Iterator[OnnxTensor]:
    if kind == "tensor":
        yield read_tensor(data, start, end)
        return
    if depth > _MAX_DEPTH:
        raise ValueError("messages are nested too deep")
    for one in fields(data, start, end):
        inner = NESTED[kind].get(one.number)
        if inner is not None and one.wire == LENGTH:
            yield from _tensors(data, inner, one.value, one.end, depth + 1)


def read_tensor(data: bytes, start: int, end: int) -> OnnxTensor:
    """The tensor in `data[start:end]`.

    Raises:
        ValueError: when the bytes are no message.
    """
    found = OnnxTensor()
    dims: list[int] = []
    for one in fields(data, start, end):
        if one.number == DIMS:
            dims += [one.whole] if one.wire == VARINT else packed(data, one.value, one.end)
        elif one.number == KIND:
            found.kind = one.whole
        elif one.number == NAME:
            found.name = _text(data, one)
        elif one.number == EXTERNAL and one.wire == LENGTH:
            found.external |= dict([_entry(data, one)])
        elif one.number in (FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S):
            found.values.setdefault(one.number, []).append((one.value, one.end))
    found.shape = tuple(dims)
    return found


def external_file(tensor: OnnxTensor, folder: Path | None) -> Path:
    """The file with a tensor's external values, in the folder of the model.

    Args:
        tensor: with external values.
        folder: of the model; None: it is one file.

    Raises:
        ValueError: when it would not be in that folder, or is no regular file.
    """
    place = tensor.external.get("location", "")
    if folder is None:
        raise ValueError(
            f"the weights of the model lie in another file ({place!r}): give the path of the "
            "model, beside which that file lies"
        )
    path = folder / place
    if not place or "\0" in place or folder.resolve() not in path.resolve().parents:
        raise ValueError(f"the weights of {tensor.name!r} lie outside the model's folder: {place}")
    if path.exists() and not path.is_file():  # to open a pipe would wait
        raise ValueError(f"the weights of {tensor.name!r}: {place} is no regular file")
    return path


def packed(data: bytes, start: int, end: int) -> list[int]:
    """The varints in `data[start:end]`.

    Raises:
        ValueError: when the last one is cut off.
    """
    found = []
    while start < end:
        value, start = _varint(data, start, end)
        found.append(value)
    return found


def _text(data: bytes, one: Field) -> str:
    return data[one.value : one.end].decode(errors="replace")


def _entry(data: bytes, one: Field) -> tuple[str, str]:
    """A StringStringEntryProto: a key and its value."""
    texts = {part.number: _text(data, part) for part in fields(data, one.value, one.end)}
    return texts.get(1, ""), texts.get(2, "")


def model_options(data: bytes) -> dict[str, str]:
    """The metadata of an ONNX model.

    Raises:
        ValueError: when the bytes are no ONNX model.
    """
    try:
        entries = [one for one in fields(data) if one.number == _METADATA and one.wire == LENGTH]
        return dict(_entry(data, one) for one in entries)
    except ValueError as error:
        raise ValueError(f"no ONNX model: {error}") from None
