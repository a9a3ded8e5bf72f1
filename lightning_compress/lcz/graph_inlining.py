"""Inlining of ONNX weights: external and typed tensor data become raw bytes of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_compress.lcz.protobuf import (
    EXTERNAL,
    INT32S,
    INT64S,
    LENGTH,
    LOCATION,
    NESTED,
    RAW,
    UINT64S,
    OnnxTensor,
    external_file,
    fields,
    message,
    onnx_tensors,
    packed,
    read_tensor,
)

__all__ = ["MIN_BYTES", "inline_tensors"]

MIN_BYTES = 64  # bytes: tensors below stay as they are
_INTS = (INT32S, INT64S, UINT64S)
_WORD_BYTES = {6: 4, 12: 4, 13: 8, 7: 8} | dict.fromkeys(
    (4, 5, 10, 16), 2
)  # bytes by data_type; else 1


def inline_tensors(data: bytes, folder: Path | None) -> bytes:
    """A model with its tensors' values in `raw_data`; the same bytes if all of them are there.

    Args:
        data: of an ONNX file.
        folder: of the external weight files; None: there are none.

    Raises:
        ValueError: when the bytes are no ONNX model, or its weights are in a file that is not
            there or outside the folder.
        OSError: when that file cannot be read.
    """
    if sum(map(_needs_inlining, onnx_tensors(data))):  # of all, so that their depth is checked
        return _rebuild(data, "model", 0, len(data), folder)
    return data


def _needs_inlining(tensor: OnnxTensor) -> bool:
    spans = [span for found in tensor.values.values() for span in found]
    long = sum(end - start for start, end in spans) >= MIN_BYTES
    typed = any(number in tensor.values for number in _INTS)
    return bool(tensor.external) or (long and (typed or len(spans) > 1))


def _rebuild(data: bytes, kind: str, start: int, end: int, folder: Path | None) -> bytes:
    out = bytearray()
    for one in fields(data, start, end):
        inner = NESTED[kind].get(one.number) if one.wire == LENGTH else None
        if inner is None:
            out += data[one.start : one.end]
        elif inner == "tensor":
            out += message(one.number, _tensor(data, one.value, one.end, folder))
        else:
            out += message(one.number, _rebuild(data, inner, one.value, one.end, folder))
    return bytes(out)


def _tensor(data: bytes, start: int, end: int, folder: Path | None) -> bytes:
    tensor = read_tensor(data, start, end)
    if not _needs_inlining(tensor):
        return data[start:end]
    raw = _read_external(tensor, folder) if tensor.external else _raw(data, tensor)
    others = (EXTERNAL, LOCATION, *tensor.values)
    kept = [one for one in fields(data, start, end) if one.number not in others]
    return b"".join(data[one.start : one.end] for one in kept) + message(RAW, raw)


def _raw(data: bytes, tensor: OnnxTensor) -> bytes:
    """Typed values as bytes: repeated fields may be split, integers as varints."""
    (number, spans), *others = tensor.values.items()
    if others:
        raise ValueError(f"tensor {tensor.name!r} of the model has values in several fields")
    if number not in _INTS:
        return b"".join(data[start:end] for start, end in spans)
    whole = [value for start, end in spans for value in packed(data, start, end)]
    words = np.array([value & 2**64 - 1 for value in whole], np.uint64)
    return words.astype(f"<u{_WORD_BYTES.get(tensor.kind, 1)}").tobytes()


def _read_external(tensor: OnnxTensor, folder: Path | None) -> bytes:
    path = external_file(tensor, folder)
    try:
        at = int(tensor.external.get("offset", "0"))
        length = int(tensor.external.get("length", "-1"))
    except ValueError:
        raise ValueError(f"tensor {tensor.name!r}: {tensor.external}") from None
    with path.open("rb") as stream:
        stream.seek(at)
        found = stream.read() if length < 0 else stream.read(length)
    if len(found) < length:
        raise ValueError(f"{path} ends before the weights of {tensor.name!r}")
    return found
