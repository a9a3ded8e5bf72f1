"""Decoder without torch: tensors as NumPy arrays, ONNX models, and file information."""

from __future__ import annotations

import os
from pathlib import Path

from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.decoding import decode_array
from lightning_compress.lcz.graph import GraphRecord, assemble_onnx
from lightning_compress.lcz.info import ArtifactInfo, artifact_info
from lightning_compress.lcz.opening import MAX_BYTES, OpenFile, open_file

__all__ = ["MAX_ONNX_BYTES", "inspect_compressed", "onnx_model", "read_arrays"]

MAX_ONNX_BYTES = 1 << 31  # a protobuf message ends there


def inspect_compressed(path: str | os.PathLike[str]) -> ArtifactInfo:
    """Information about a file, from its header alone.

    The header is checked against its CRC-32, by itself, and against the length of the file; the
    payloads are neither read nor checked.

    Raises:
        CorruptArtifactError: when the file is damaged or no `.lcz` file.
        OSError: when it cannot be read.
    """
    target = Path(path)
    with open_file(target, verify=False) as artifact:
        return artifact_info(target, artifact.records, artifact.container.size, artifact.graphs)


def read_arrays(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, NDArray]:
    """The tensors of a file by name, as NumPy arrays: nothing of torch is needed or imported.

    Elements of bfloat16 and of the float8 dtypes, which NumPy does not have, come as their bit
    patterns (uint16, uint8); `inspect_compressed(path).per_tensor[name].dtype` names them.

    Args:
        path: of the file.
        max_bytes: refuse a file whose tensors take more than this: a small file can hold a huge
            tensor of zeros.

    Raises:
        CorruptArtifactError: when the file is damaged, or above `max_bytes`.
        OSError: when it cannot be read.
    """
    with open_file(Path(path), verify=True) as artifact:
        artifact.check_size(max_bytes)
        found = {record.name: decode_array(record, data) for record, data in artifact.payloads()}
        return {record.name: found[record.tied or record.name] for record in artifact.records}


def onnx_model(
    path: str | os.PathLike[str], graph: str | None = None, *, max_bytes: int = MAX_ONNX_BYTES
) -> bytes:
    """The runnable graph of a file: the ONNX model, to the byte as it was packed.

    Neither torch nor onnx is needed. `onnx_session` opens it at once.

    Args:
        path: of the file.
        graph: its name; None: the only one of the file.
        max_bytes: refuse a larger model, and one whose tensors take more memory to decode.

    Raises:
        CorruptArtifactError: when the file is damaged, or its model above `max_bytes`.
        ValueError: when the file holds no graph, none of this name, or several and none is named.
        OSError: when it cannot be read.
    """
    with open_file(Path(path), verify=True) as artifact:
        chosen = _select_graph(artifact, Path(path), graph)
        if chosen.onnx_bytes > max_bytes:
            raise CorruptArtifactError(
                f"an ONNX model of {chosen.onnx_bytes} bytes, above max_bytes={max_bytes}"
            )
        # The default is what a message may hold; what decoding may take is another matter.
        most = MAX_BYTES if max_bytes >= MAX_ONNX_BYTES else max_bytes
        artifact.check_graph_size(chosen, most)
        return assemble_onnx(chosen, artifact.container, artifact.offsets())


def _select_graph(artifact: OpenFile, path: Path, graph: str | None) -> GraphRecord:
    known = {one.name: one for one in artifact.graphs}
    if not known:
        raise ValueError(
            f"{path} holds no graph, only tensors: `load_compressed` puts them into a module; "
            "`save_compressed(module, path, graph=...)` or `pack model.onnx` stores a graph"
        )
    names = ", ".join(map(repr, known))
    if graph is None and len(known) > 1:
        raise ValueError(f"{path} holds {len(known)} graphs: say which, of {names}")
    if graph is not None and graph not in known:
        raise ValueError(f"{path}: no graph {graph!r}; there is {names}")
    return next(iter(known.values())) if graph is None else known[graph]
