"""Tensors of checkpoints that others wrote, without the model's code and without running any."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_compress.files import write_atomically
from lightning_compress.lcz.artifact import MAX_BYTES, read_tensors

__all__ = ["read_checkpoint", "write_checkpoint"]

_NESTED = ("state_dict", "model_state_dict", "model")  # where trainers keep a model's entries
_HEADER = "__metadata__"
_TORCH = (".pt", ".pth", ".ckpt", ".bin")


def read_checkpoint(
    path: Path, key: str | None = None, *, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """The tensors of a PyTorch or Lightning checkpoint, a safetensors file, or an `.lcz` file.

    Args:
        path: of the file; what it is, its suffix says: `.lcz`, `.safetensors`, `.pt`, `.pth`,
            `.ckpt`, `.bin`.
        key: in a PyTorch checkpoint, the entry that holds the tensors; None: the usual ones.
        max_bytes: of the tensors of an `.lcz` file.

    Raises:
        ValueError: for a suffix or content that is none of these; a pickle that would run code.
        OSError: when it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".lcz":
        return read_tensors(path, max_bytes=max_bytes)
    if suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
    if suffix not in _TORCH:
        raise ValueError(f"{path}: valid are .lcz, .safetensors, {', '.join(_TORCH)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on junk, the unpickler stumbles over anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read without running code of its own: {why}") from None
    return _entries(content, key, path)


def _entries(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        keys = [key] if key is not None else [name for name in _NESTED if name in content]
        if key is not None and key not in content:
            raise ValueError(f"{path}: no {key!r}; there are {', '.join(map(repr, content))}")
        nested = next((content[name] for name in keys if isinstance(content[name], Mapping)), None)
        content = content if nested is None else nested
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no named tensors")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, no tensor; try --key")
    return dict(content)


def write_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a `state_dict` or a safetensors file, as the path's suffix says.

    Raises:
        ValueError: for another suffix, or tensors that safetensors cannot hold.
        OSError: naming the path, when it cannot be written.
    """
    if path.suffix.lower() == ".safetensors":
        if _HEADER in tensors:
            raise ValueError(
                f"{path}: safetensors cannot hold a tensor named {_HEADER!r}, which is its own "
                f"header's key: choose a path in {', '.join(_TORCH)}"
            )
        try:
            content = save({name: tensor.clone() for name, tensor in tensors.items()})
        except (KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path}: safetensors cannot hold these tensors: {error}") from None
    elif path.suffix.lower() in _TORCH:
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        content = buffer.getvalue()
    else:
        raise ValueError(f"{path}: valid are .safetensors, {', '.join(_TORCH)}")
    write_atomically(path, content, what="the checkpoint")
