"""Reader and writer of PyTorch, Lightning and safetensors checkpoints, without running code."""

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
from lightning_compress.lcz.artifact import read_tensors
from lightning_compress.lcz.module_state import Contents, check_tensor, stored_name
from lightning_compress.lcz.opening import MAX_BYTES
from lightning_compress.lcz.restoring import has_state, state_for_file

__all__ = ["read_checkpoint", "read_contents", "write_checkpoint"]

_NESTED = ("state_dict", "model_state_dict", "model")  # where trainers keep a model's entries
_HEADER = "__metadata__"
_FIRST_BYTES = (b"P", b"\x80")  # of a zip archive, and of a bare pickle, as older versions wrote
_TORCH = (".pt", ".pth", ".ckpt", ".bin")


def read_checkpoint(
    path: Path, key: str | None = None, *, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """The tensors of a PyTorch or Lightning checkpoint, a safetensors file, or an `.lcz` file.

    Args:
        path: of the file; its suffix gives the kind: `.lcz`, `.safetensors`, `.pt`, `.pth`,
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
        raise ValueError(f"{path}: valid suffixes are .lcz, .safetensors, {', '.join(_TORCH)}")
    return _entries(_unpickled(path), key, path)


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        begins = file.read(1)
    if begins not in _FIRST_BYTES:
        raise ValueError(f"{path} is no PyTorch checkpoint: its first bytes differ")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on garbage, the unpickler raises anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read without running code of its own: {why}") from None


def read_contents(path: Path, key: str | None = None) -> Contents:
    """Contents of a checkpoint of any kind, ready to be written to an `.lcz` file.

    Of a Lightning checkpoint these are its tensors with the grids, activation grids and removed
    channels that the compression callbacks left in it, as `save_compressed` has them of the module.

    Args:
        path: of the file, as in `read_checkpoint`.
        key: the entry that holds the tensors, read without compression state; None: the usual ones.

    Raises:
        ValueError: for a suffix or content that is none of these; a pickle that would run code.
        TypeError: for an entry that is no dense tensor.
        OSError: when it cannot be read.
    """
    if path.suffix.lower() not in _TORCH:
        return Contents(read_checkpoint(path, key), {}, {})
    content = _unpickled(path)
    tensors = _entries(content, key, path)
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    known = isinstance(content, Mapping) and has_state(content)
    if key is not None or not known or "state_dict" not in content:
        return Contents(tensors, {}, {})
    state = state_for_file(content)
    tensors = {stored_name(name): tensor for name, tensor in tensors.items()}
    return Contents(tensors, state.grids, state.rounding, state.channels)


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
        raise ValueError(f"{path}: valid suffixes are .safetensors, {', '.join(_TORCH)}")
    write_atomically(path, content, what="the checkpoint")
