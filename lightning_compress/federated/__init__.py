"""Federated training on Flower, with updates that are compressed both ways.

`UpdateCodec` and the functions of `updates` need neither Flower nor Lightning; all else is imported
when it is first asked for, and needs the extra `federated`. Usage reports of Flower and of Ray are
switched off, unless the environment says otherwise.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from lightning_compress.errors import require

if TYPE_CHECKING:
    from lightning_compress.federated.arrays import load_arrays, model_arrays
    from lightning_compress.federated.client import ClientRound, ProximalTerm, lightning_client
    from lightning_compress.federated.distillation import (
        TeacherSamples,
        distill_outputs,
        distill_samples,
    )
    from lightning_compress.federated.families import DistilledStrategy
    from lightning_compress.federated.messages import record_of, tensors_of_record
    from lightning_compress.federated.mod import CompressedUpdates
    from lightning_compress.federated.partitions import partition_rows
    from lightning_compress.federated.simulation import simulate
    from lightning_compress.federated.strategy import CompressedStrategy
    from lightning_compress.federated.updates import (
        EncodedUpdate,
        UpdateCodec,
        UpdateError,
        add_update,
        decode_update,
        encode_update,
    )

__all__ = [
    "ClientRound",
    "CompressedStrategy",
    "CompressedUpdates",
    "DistilledStrategy",
    "EncodedUpdate",
    "ProximalTerm",
    "TeacherSamples",
    "UpdateCodec",
    "UpdateError",
    "add_update",
    "decode_update",
    "distill_outputs",
    "distill_samples",
    "encode_update",
    "lightning_client",
    "load_arrays",
    "model_arrays",
    "partition_rows",
    "record_of",
    "simulate",
    "tensors_of_record",
]

# Both read the environment when they are imported, and report how they are used unless told not to.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

_HOMES = {
    "arrays": "load_arrays model_arrays",
    "client": "ClientRound ProximalTerm lightning_client",
    "distillation": "TeacherSamples distill_outputs distill_samples",
    "families": "DistilledStrategy",
    "messages": "record_of tensors_of_record",
    "mod": "CompressedUpdates",
    "partitions": "partition_rows",
    "simulation": "simulate",
    "strategy": "CompressedStrategy",
    "updates": "EncodedUpdate UpdateCodec UpdateError add_update decode_update encode_update",
}
_FLOWER = ("client", "families", "messages", "mod", "strategy")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name, or say which extra it needs."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if _HOME_OF[name] in _FLOWER:
            require("flwr", extra="federated")
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
