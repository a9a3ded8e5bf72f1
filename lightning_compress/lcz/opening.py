"""Opening of `.lcz` files and validation of their headers, without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.channel_record import KEY as CHANNELS
from lightning_compress.lcz.channel_record import ChannelRecord, read_channels
from lightning_compress.lcz.container import Container, read_container
from lightning_compress.lcz.decoding import MOST_HEAD_BYTES, decode_memory
from lightning_compress.lcz.graph import GraphRecord, read_graphs
from lightning_compress.lcz.header import TensorRecord, optional, read_records
from lightning_compress.lcz.layer_grids import LayerGrid, read_layer_grids
from lightning_compress.lcz.raw_bits import DTYPES

__all__ = ["MAX_BYTES", "OpenFile", "check_header", "open_file"]

_MAX_LAYERS = 1 << 15
_FREE_MEMORY = 1 << 26  # bytes to decode with that any process has
MAX_BYTES = 1 << 34  # of the tensors of a file that is read without a module to compare with


@dataclass(frozen=True)
class OpenFile:
    """An open file whose header has been checked.

    Args:
        container: prefix, header and payloads.
        records: one a tensor of the module, in the order of their payloads.
        activations: grids of layers' inputs and outputs, by path and side.
        channels: removed from the module.
        graphs: ONNX models, whose payloads follow.
    """

    container: Container
    records: list[TensorRecord]
    activations: dict[str, dict[str, LayerGrid | bool]]
    channels: ChannelRecord
    graphs: list[GraphRecord] = field(default_factory=list)

    def payloads(self) -> Iterator[tuple[TensorRecord, bytes]]:
        """The records that have a payload, each with it, in the order of the file."""
        offset = 0
        for record in self.records:
            if record.kind != "tied":
                yield record, self.container.read(offset, record.payload_bytes)
                offset += record.payload_bytes

    def check_size(self, most: int, workers: int = 1) -> None:
        """Reject a file whose tensors, and the memory to decode them, would take over `most` bytes.

        Args:
            most: bytes.
            workers: threads; each decodes a tensor of its own.

        Raises:
            CorruptArtifactError: when they would.
        """
        offsets = self.offsets()
        stored = [(one, offsets[one.name]) for one in self.records if one.kind != "tied"]
        plain = sum(one.extent * DTYPES[one.dtype].itemsize for one in self.records)
        self._check_memory(plain, stored, most, workers)

    def check_graph_size(self, graph: GraphRecord, most: int) -> None:
        """The same for the model of one graph, and its rows.

        Raises:
            CorruptArtifactError: when they would.
        """
        stored = [(record, offset) for _, record, offset in graph.rows(self.offsets())]
        self._check_memory(graph.onnx_bytes, stored, most)

    def _check_memory(
        self, plain: int, stored: list[tuple[TensorRecord, int]], most: int, workers: int = 1
    ) -> None:
        if plain > most:
            raise CorruptArtifactError(f"{plain} bytes of tensors, above max_bytes={most}")
        works = sorted((self._decode_memory(*one) for one in stored), reverse=True)
        work = sum(works[:workers])
        if plain + max(work - _FREE_MEMORY, 0) > most:
            raise CorruptArtifactError(
                f"{plain} bytes of tensors and {work} bytes to decode them, above max_bytes={most}"
            )

    def _decode_memory(self, record: TensorRecord, offset: int) -> int:
        head = self.container.read(
            offset + record.aux_bytes, min(record.symbol_bytes, MOST_HEAD_BYTES)
        )
        return decode_memory(record, head)

    def offsets(self) -> dict[str, int]:
        """Where the payloads of the module's tensors begin, by name."""
        found, offset = {}, 0
        for record in self.records:
            found[record.name] = offset
            offset += record.payload_bytes
        return found


@contextlib.contextmanager
def open_file(path: Path, *, verify: bool) -> Iterator[OpenFile]:
    """Open a file and checks its header, and its checksum if `verify` is set.

    Raises:
        CorruptArtifactError: naming the file, here and for what is raised while it is open.
        OSError: when it cannot be read.
    """
    try:
        with read_container(path, verify=verify) as container:
            yield check_header(container)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{path}: {error}") from error


def check_header(container: Container) -> OpenFile:
    """Parse and validate a container's header.

    Raises:
        CorruptArtifactError: when something in it is wrong.
    """
    header = container.header
    extra = (key for key in header if key not in ("tensors", "activations", "graphs"))
    if not all(map(optional, extra)):
        raise CorruptArtifactError(f"unknown keys in the header: {str(list(header))[:80]}")
    size, payload_bytes = container.size, container.payload_bytes
    own = None if "graphs" in header else payload_bytes
    records = read_records(header.get("tensors"), own, size)
    return OpenFile(
        container,
        records,
        read_layer_grids(_bounded(header.get("activations", {}))),
        read_channels(header.get(CHANNELS)),
        read_graphs(header.get("graphs", []), records, payload_bytes, size),
    )


def _bounded(entry: object) -> object:
    """Limit the number of layers with activation grids, which are decoded before other checks."""
    if isinstance(entry, dict) and len(entry) > _MAX_LAYERS:
        raise CorruptArtifactError(f"activations of {len(entry)} layers, above {_MAX_LAYERS}")
    return entry
