"""Information about an artifact: its tensors and graphs with their bytes, from the header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_compress.lcz.graph import GraphRecord
from lightning_compress.lcz.header import TensorRecord
from lightning_compress.lcz.raw_bits import DTYPES
from lightning_compress.terminal import html_table, shape_text

__all__ = ["ArtifactInfo", "GraphInfo", "TensorInfo", "artifact_info"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an artifact.

    Args:
        shape: of the tensor.
        dtype: its name in the module, such as `"float32"`.
        kind: `"grid"`, `"codebook"`, `"mask"` (zeros apart), `"plain"`, or `"tied"`: stored under
            another name, at no cost.
        codec: of the symbols; of values without symbols `"bytes"` or `"planes"` (deflated).
        bits: of a symbol of a grid or in a codebook, else of a stored value.
        nonzero: values that are not 0.
        elements: values in all.
        bytes: its payload in the file.
        bound_bytes: the zero-order entropy of its symbols, plus what is stored beside them (scales,
            zero points, codebook, plain values).
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    codec: str
    bits: int
    nonzero: int
    elements: int
    bytes: int
    bound_bytes: int


_HEADER = ("Tensor", "Shape", "Kind", "Codec", "Bits", "Not 0", "Values", "Bytes", "Bound")


def _rows(tensors: dict[str, TensorInfo]) -> list[tuple[str | int, ...]]:
    return [
        (
            name,
            shape_text(one.shape),
            one.kind,
            one.codec,
            one.bits,
            one.nonzero,
            one.elements,
            one.bytes,
            one.bound_bytes,
        )
        for name, one in tensors.items()
    ]


@dataclass(frozen=True)
class GraphInfo:
    """A runnable graph of an artifact: an ONNX model.

    Args:
        bytes: its payload in the file.
        onnx_bytes: of the ONNX file that it unpacks to.
        per_tensor: its tensors that are stored with it, by name in the graph.
        shared: tensors of the module whose numbers the graph takes, stored once for both.
        twice: those of `per_tensor` that are matrices or kernels, though the file holds the
            module's tensors as well: their numbers are not the module's in another order.
    """

    bytes: int
    onnx_bytes: int
    per_tensor: dict[str, TensorInfo]
    shared: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        title = f"Graph: {self.bytes:,} bytes, its ONNX file {self.onnx_bytes:,}"
        return html_table(title, _HEADER, _rows(self.per_tensor))


@dataclass(frozen=True)
class ArtifactInfo:
    """An `.lcz` file. `header_bytes` and the `bytes` of tensors and graphs add up to `bytes`.

    Args:
        path: of the file.
        bytes: of the whole file.
        header_bytes: prefix, header and checksum: all that is no payload.
        ratio: bytes of the tensors stored plainly in their own dtypes, each tied one once, divided
            by `bytes`; of a file without tensors, bytes of its graphs' ONNX files.
        entropy_bound_bytes: sum of the tensors' `bound_bytes`. Code tables and `header_bytes` are
            not in it. Run lengths may go below it where zeros cluster, since zero-order entropy
            looks at each symbol alone.
        per_tensor: by name, in the order of `state_dict`.
        graphs: the runnable ones, by name; "" where there is one.
    """

    path: Path
    bytes: int
    header_bytes: int
    ratio: float
    entropy_bound_bytes: int
    per_tensor: dict[str, TensorInfo]
    graphs: dict[str, GraphInfo] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        title = f"{self.path.name}: {self.bytes:,} bytes, {self.ratio:.1f} times smaller"
        totals = [
            ("file", self.bytes),
            ("header and checksum", self.header_bytes),
            ("entropy bound of the symbols", self.entropy_bound_bytes),
            *((f"graph {name!r}" if name else "graph", g.bytes) for name, g in self.graphs.items()),
        ]
        tensors = html_table("Tensors", _HEADER, _rows(self.per_tensor))
        folded = f"<details><summary>{len(self.per_tensor)} tensors</summary>{tensors}</details>"
        return html_table(title, ("Part", "Bytes"), totals) + folded


def artifact_info(
    path: Path, records: Sequence[TensorRecord], size: int, graphs: Sequence[GraphRecord] = ()
) -> ArtifactInfo:
    """Sums up the records of a file of `size` bytes."""
    by_name = {record.name: record for record in records}
    tensors = {
        record.name: _tensor_info(record, by_name.get(record.tied, record)) for record in records
    }
    plain = sum(
        record.elements * DTYPES[record.dtype].itemsize
        for record in records
        if record.kind != "tied"
    )
    runnable = {graph.name: _graph_info(graph, has_module=bool(records)) for graph in graphs}
    costs = [one.bytes for one in (*tensors.values(), *runnable.values())]
    stored = [*tensors.values(), *(t for one in runnable.values() for t in one.per_tensor.values())]
    if not records:
        plain = sum(one.onnx_bytes for one in runnable.values())
    return ArtifactInfo(
        path=path,
        bytes=size,
        header_bytes=size - sum(costs),
        ratio=plain / size,
        entropy_bound_bytes=sum(tensor.bound_bytes for tensor in stored),
        per_tensor=tensors,
        graphs=runnable,
    )


def _graph_info(graph: GraphRecord, *, has_module: bool) -> GraphInfo:
    own = {record.name: _tensor_info(record, record) for record in graph.records}
    shared = dict.fromkeys(gap.source for gap, _ in graph.gaps if gap.source)
    weights = (name for name, one in own.items() if sum(size > 1 for size in one.shape) > 1)
    return GraphInfo(
        bytes=graph.payload_bytes,
        onnx_bytes=graph.onnx_bytes,
        per_tensor=own,
        shared=tuple(shared),
        twice=tuple(weights) if has_module else (),
    )


def _tensor_info(record: TensorRecord, source: TensorRecord) -> TensorInfo:
    tied = record.kind == "tied"
    return TensorInfo(
        shape=record.shape,
        dtype=record.dtype,
        kind=record.kind,
        codec="tied" if tied else record.codec or record.packing,
        bits=_bits(source),
        nonzero=source.elements - source.zeros,
        elements=record.elements,
        bytes=record.payload_bytes,
        bound_bytes=0 if tied else record.entropy_bytes + record.aux_bytes,
    )


def _bits(record: TensorRecord) -> int:
    if record.grid:
        first, *others = record.grid
        return first if others else (first - 1).bit_length()
    if record.kind == "codebook":
        return max((record.aux_bytes - 1) // record.word - 1, 1).bit_length()
    return 8 * DTYPES[record.storage].itemsize
