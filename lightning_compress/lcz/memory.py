"""Encoding of named tensors into `.lcz` bytes in memory, and decoding."""

from __future__ import annotations

import io
from collections.abc import Mapping

from torch import Tensor

from lightning_compress.lcz.artifact import MAX_BYTES
from lightning_compress.lcz.container import read_stream
from lightning_compress.lcz.module_state import Contents, check_tensor
from lightning_compress.lcz.read import check_fit, read_artifact
from lightning_compress.lcz.write import Encoding, contents_bytes
from lightning_compress.state import Grid

__all__ = ["tensors_from_bytes", "tensors_to_bytes"]


def tensors_to_bytes(
    tensors: Mapping[str, Tensor], grids: Mapping[str, Grid] | None = None, codec: str = "auto"
) -> bytes:
    """The `.lcz` file of these tensors, as bytes.

    Args:
        tensors: by name.
        grids: of quantized tensors, bit for bit.
        codec: of the symbols, as in `save_compressed`.

    Raises:
        ValueError: for an unknown codec, or tensors that the format cannot hold.
        TypeError: for entries that are no dense tensors.
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    return contents_bytes(Contents(tensors, grids or {}, {}), Encoding(codec))


def tensors_from_bytes(
    data: bytes, like: Mapping[str, Tensor] | None = None, *, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """The tensors that `tensors_to_bytes` encoded, bit for bit.

    Args:
        data: of the file.
        like: tensors whose names, shapes and dtypes must be the file's, before any is decoded.
        max_bytes: refuse tensors that take more than this once decoded.

    Raises:
        CorruptArtifactError: when the bytes are damaged, do not fit `like`, or decode to more.

    >>> import torch
    >>> tensors_from_bytes(tensors_to_bytes({"a": torch.tensor([0.0, 1.5])}))["a"].tolist()
    [0.0, 1.5]
    """
    artifact = read_artifact(read_stream(io.BytesIO(data), verify=True))
    artifact.file.check_size(max_bytes)
    if like is not None:
        check_fit(artifact.records, like)
    return {name: tensor for name, tensor, _ in artifact.decoded()}
