"""Decoder of `.lcz` files into tensors, checked against a module or a limit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.channel_record import ChannelRecord
from lightning_compress.lcz.container import Container
from lightning_compress.lcz.header import TensorRecord
from lightning_compress.lcz.module_state import read_activations, shared_memory
from lightning_compress.lcz.opening import OpenFile, check_header, open_file
from lightning_compress.lcz.parallel import parallel_map, with_progress
from lightning_compress.lcz.raw_bits import dtype_name, patterns
from lightning_compress.lcz.tensors import decode_tensor
from lightning_compress.state import ActivationGrids, Grid

__all__ = ["Artifact", "check_fit", "check_shared", "open_artifact", "read_artifact"]


@dataclass(frozen=True)
class Artifact:
    """An open file whose header has been checked."""

    file: OpenFile
    activations: dict[str, ActivationGrids]

    @property
    def records(self) -> list[TensorRecord]:
        """One a tensor of the module."""
        return self.file.records

    @property
    def channels(self) -> ChannelRecord:
        """Channels removed from the module."""
        return self.file.channels

    def decoded(self, workers: int = 1) -> Iterator[tuple[str, Tensor, Grid | None]]:
        """Names, tensors and grids in the order of the file, decoded lazily.

        A tied tensor is the same object as its source.

        Raises:
            ValueError: for no worker.
            CorruptArtifactError: naming the tensor, when its payload does not fit its record.
        """
        kept: dict[str, tuple[Tensor, Grid | None]] = {}
        sources = {record.tied for record in self.records if record.kind == "tied"}
        sizes = [record.elements for record in self.records if record.kind != "tied"]
        decoded = parallel_map(_decode, self.file.payloads(), workers)
        for name, tensor, grid in with_progress(decoded, sizes, "decoding"):
            if name in sources:
                kept[name] = tensor, grid
            yield name, tensor, grid
        for record in self.records:
            if record.kind == "tied":
                tensor, grid = kept[record.tied]
                yield record.name, tensor, grid if record.grid else None


def _decode(job: tuple[TensorRecord, bytes]) -> tuple[str, Tensor, Grid | None]:
    return job[0].name, *decode_tensor(*job)


@contextlib.contextmanager
def open_artifact(path: Path, *, verify: bool) -> Iterator[Artifact]:
    """Open a file and checks its header, and its checksum if `verify` is set.

    Raises:
        CorruptArtifactError: naming the file, here and for what is raised while it is open.
        OSError: when it cannot be read.
    """
    with open_file(path, verify=verify) as file:
        yield _artifact(file)


def read_artifact(container: Container) -> Artifact:
    """Parse and validate a container's header.

    Raises:
        CorruptArtifactError: when something in it is wrong.
    """
    return _artifact(check_header(container))


def _artifact(file: OpenFile) -> Artifact:
    if file.graphs and not file.records:
        raise CorruptArtifactError(
            "holds a graph and no tensors of a module: run it with `onnx_session`, or write "
            "the ONNX file with `onnx_model`"
        )
    return Artifact(file, read_activations(file.activations))


def check_fit(
    records: list[TensorRecord],
    tensors: Mapping[str, Tensor],
    smaller: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Check that names, shapes and dtypes are equal in the file and in the module.

    Args:
        records: of the file.
        tensors: of the module.
        smaller: shapes that tensors of the module will be resized to.

    Raises:
        CorruptArtifactError: naming those that are not.
    """
    stored = {record.name: (record.dtype, record.shape) for record in records}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()} | dict(smaller or {})
    wanted = {name: (dtype_name(t.dtype), shapes[name]) for name, t in tensors.items()}
    both = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    faults = {
        "missing in the file": [repr(name) for name in wanted if name not in stored],
        "unexpected in the file": [repr(name) for name in stored if name not in wanted],
        "mismatched": [
            f"{name!r} is {stored[name]} in the file and {wanted[name]} in the module"
            for name in both
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in faults.items() if names]
    if found:
        raise CorruptArtifactError(f"does not fit the module: {'; '.join(found)}")


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_shared(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors that share memory in the module have equal values in the file.

    Raises:
        CorruptArtifactError: when their values differ.
    """
    for name, source in shared_memory(tensors).items():
        one, other = values[name], values[source]
        if one is not other and not np.array_equal(patterns(one), patterns(other)):
            raise CorruptArtifactError(
                f"{name!r} and {source!r} are one tensor in the module and differ in the file"
            )
