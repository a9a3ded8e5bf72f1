"""Conversion between Flower's records and named tensors, and the fields of messages."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from lightning_compress.federated.updates import UpdateError

__all__ = [
    "FULL", "HELLO", "NOTE", "arrays_key", "note_of", "payload_record", "record_of", "replaced",
    "size_of", "tensors_of_record", "unpacked",
]  # fmt: skip

HELLO = "query.lightning_compress"  # who are you, and which version do you hold?
NOTE = "lightning_compress"  # the ConfigRecord of our own
FULL = "full"  # the name of a payload that holds a whole model
_STYPE = "lightning_compress.lcz"


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as Flower's record of NumPy arrays; bfloat16, which NumPy lacks, as float32."""
    plain = {
        name: one.float() if one.dtype is torch.bfloat16 else one for name, one in tensors.items()
    }
    return ArrayRecord({name: Array(one.detach().cpu().numpy()) for name, one in plain.items()})


def tensors_of_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The named tensors of a record.

    Raises:
        UpdateError: for arrays that are not NumPy's.
    """
    try:
        return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
    except (TypeError, ValueError, EOFError) as error:
        raise UpdateError(f"damaged: no record of NumPy arrays: {error}") from None


def payload_record(payloads: Mapping[str, bytes]) -> ArrayRecord:
    """Payloads as a record of arrays of bytes, which Flower transports as any other."""
    return ArrayRecord(
        {
            name: Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
            for name, data in payloads.items()
        }
    )


def unpacked(record: ArrayRecord) -> dict[str, bytes]:
    """The payloads of a record.

    Raises:
        UpdateError: for a record of other arrays.
    """
    for name, array in record.items():
        if array.stype != _STYPE:
            raise UpdateError(f"foreign: array {name!r} is {array.stype!r}, no .lcz payload")
    return {name: array.data for name, array in record.items()}


def arrays_key(content: RecordDict) -> str:
    """The name of the one record of arrays.

    Raises:
        UpdateError: when there is none, or more.
    """
    keys = list(content.array_records)
    if len(keys) != 1:
        raise UpdateError(f"foreign: {len(keys)} records of arrays where one belongs")
    return keys[0]


def note_of(content: RecordDict) -> ConfigRecord:
    """The package's own record of a message; empty where there is none."""
    return content.config_records.get(NOTE, ConfigRecord())


def replaced(content: RecordDict, arrays: ArrayRecord, note: ConfigRecord | None) -> RecordDict:
    """The same content with other arrays and our own record, or without it."""
    key = arrays_key(content)
    found = RecordDict({name: one for name, one in content.items() if name != NOTE})
    found[key] = arrays
    if note is not None:
        found[NOTE] = note
    return found


def size_of(message: Message) -> int:
    """Bytes of all records of a message, names included; Flower's envelope is not in it."""
    if not message.has_content():
        return len(message.error.reason or "") if message.has_error() else 0
    records = message.content.values()
    kinds = (ArrayRecord, ConfigRecord, MetricRecord)
    return sum(one.count_bytes() for one in records if isinstance(one, kinds) and len(one))
