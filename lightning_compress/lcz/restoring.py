"""Compression state of a Lightning checkpoint: written by callbacks, restored by one call.

A checkpoint keeps it under the key `compression_state`, in tensors and plain types alone, so that
`torch.load(..., weights_only=True)` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.channels.resize import CHANNELS, rebuild_channels
from lightning_compress.errors import TargetError
from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.lcz.module_state import stored_name
from lightning_compress.pruning.masks import pack_mask, unpack_mask
from lightning_compress.quantization.entropy import DeadZoneGrid
from lightning_compress.state import (
    ActivationGrids,
    CompressionState,
    Grid,
    RemovedChannels,
    clear_grid,
    set_activation_grids,
    set_grid,
    set_known_mask,
)
from lightning_compress.targets import clean_path

__all__ = [
    "STATE",
    "attach_state",
    "has_state",
    "pack_state",
    "read_state",
    "restore_compression",
    "state_for_file",
]

Module = TypeVar("Module", bound=nn.Module)

STATE = "compression_state"  # key in a checkpoint: tensors and plain data
_SIDES = ("input", "output")


def pack_state(state: CompressionState) -> dict[str, Any]:
    """A state in tensors and plain types; channels are kept under a key of their own.

    >>> pack_state(CompressionState())["grids"]
    {}
    """
    return {
        "version": 1,
        "masks": {
            stored_name(path): (pack_mask(mask), tuple(mask.shape))
            for path, mask in state.masks.items()
        },
        "grids": {stored_name(path): _pack_grid(grid) for path, grid in state.grids.items()},
        "activations": {
            stored_name(path): {
                side: _pack_grid(grid)
                for side in _SIDES
                if (grid := getattr(pair, side)) is not None
            }
            | ({"dynamic": True} if pair.dynamic else {})
            for path, pair in state.rounding.items()
        },
    }


def _pack_grid(grid: Grid) -> dict[str, Any]:
    entry = {one.name: getattr(grid, one.name) for one in fields(grid)}
    return {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in entry.items()}


def _unpack_grid(entry: Mapping[str, Any]) -> Grid:
    if "centres" in entry:
        return CodebookGrid(**entry)
    return DeadZoneGrid(**entry) if "dead_zone" in entry else AffineGrid(**entry)


def has_state(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds masks, grids or channel shapes, even if empty."""
    return STATE in checkpoint or CHANNELS in checkpoint or any(True for _ in _masks(checkpoint))


def _masks(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Masks in the states of pruning callbacks, and masks that weights carried already."""
    callbacks = checkpoint.get("callbacks") or {}
    for state in (*callbacks.values(), checkpoint.get(STATE, {})):
        if isinstance(state, Mapping) and isinstance(state.get("masks"), Mapping):
            yield from state["masks"].items()


def read_state(checkpoint: Mapping[str, Any]) -> CompressionState:
    """The state that a checkpoint's mapping holds; an empty one where there is none.

    Paths are as `named_parameters` spells them, without `_orig_mod`; those of masks without
    parametrizations either.
    """
    entry = checkpoint.get(STATE, {})
    lost, rows = checkpoint.get(CHANNELS), entry.get("activations", {})
    return CompressionState(
        {path: unpack_mask(packed, shape) for path, (packed, shape) in _masks(checkpoint)},
        {path: _unpack_grid(one) for path, one in entry.get("grids", {}).items()},
        {
            path: ActivationGrids(**{side: _unpack_grid(pair[side]) for side in grids})  # type: ignore[arg-type]
            for path, pair in rows.items()
            if (grids := [side for side in _SIDES if side in pair])
        },
        RemovedChannels() if lost is None else RemovedChannels(**lost),
        frozenset(path for path, pair in rows.items() if pair.get("dynamic")),
    )


def restore_compression(
    module: Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any]
) -> Module:
    """Restore the compression state of a Lightning checkpoint in a module, in place.

    `load_from_checkpoint` and `load_state_dict` load weights alone: masks and grids are state of
    the callbacks. This call loads the weights, resizes layers that lost channels, and attaches
    masks, weight grids and activation grids to the module: for `save_compressed`, `export_onnx`,
    `fake_quantized`, `trainer.test` with the callback listed, and the next `fit`.

    Args:
        module: the LightningModule, fresh or loaded, or one of its submodules.
        checkpoint: a path, or the mapping that `torch.load` gives.

    Returns:
        The module.

    Raises:
        ValueError: for a checkpoint without a compression state, such as one of
            `save_weights_only=True`, or one that cannot be read without running code.
        TargetError: for a module that does not fit.
        OSError: when the file cannot be read.

    >>> from lightning_compress.quantization.ranges import affine_grid
    >>> from lightning_compress.state import has_grid
    >>> trained = nn.Linear(2, 2)
    >>> grids = {"weight": affine_grid(trained.weight, bits=4)}
    >>> checkpoint = {"state_dict": trained.state_dict(), STATE: pack_state(CompressionState(
    ...     grids=grids))}
    >>> fresh = restore_compression(nn.Linear(2, 2), checkpoint)
    >>> has_grid(fresh, "weight"), torch.equal(fresh.weight, trained.weight)
    (True, True)
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else _load_checkpoint(Path(checkpoint))
    where = "the checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    if not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{where} is no Lightning checkpoint: it has no 'state_dict'")
    if not has_state(content):
        raise ValueError(
            f"{where} holds no compression state: it was saved with save_weights_only=True, or in "
            "a run without compression callbacks. Give a full checkpoint"
        )
    inside = _submodule_part(content, _prefix(module, content["state_dict"], where))
    rebuild_channels(module, inside)
    _load_weights(module, inside["state_dict"], where)
    attach_state(module, inside)
    return module


def _load_checkpoint(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on garbage, the unpickler raises anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read without running code of its own ({why}): if you trust it, give "
            "torch.load(path, weights_only=False) in place of the path"
        ) from None
    return content if isinstance(content, Mapping) else {}


def _prefix(module: nn.Module, state: Mapping[str, Any], where: str) -> str:
    """Where the module's entries are in a checkpoint: at the top, or below one submodule."""
    own = {stored_name(key): value for key, value in module.state_dict().items()}
    stored = {stored_name(key): value for key, value in state.items()}
    if set(own) <= set(stored) or not own:
        return ""
    first = min(own)
    ends = sorted(key.removesuffix(first) for key in stored if key.endswith(f".{first}"))
    found = [one for one in ends if {one + key for key in own} <= set(stored)]
    fits = [
        one
        for one in found
        if all(stored[one + key].shape == value.shape for key, value in own.items())
    ]
    found = fits or found  # without removed channels the shapes decide
    if len(found) > 1:
        raise TargetError(
            f"{where} has the module's entries in {[one.rstrip('.') for one in found]}: restore "
            "the whole LightningModule"
        )
    return found[0] if found else ""


def _submodule_part(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a checkpoint of one submodule, under the submodule's own paths."""
    if not prefix:
        return dict(checkpoint)

    def cut(paths: Mapping[str, Any]) -> dict[str, Any]:
        names = ((stored_name(path), one) for path, one in paths.items())
        inner = {path.removeprefix(prefix): one for path, one in names if path.startswith(prefix)}
        return inner | ({"": paths[prefix[:-1]]} if prefix[:-1] in paths else {})

    entry = checkpoint.get(STATE, {})
    found: dict[str, Any] = {
        "state_dict": cut(checkpoint["state_dict"]),
        STATE: {name: cut(entry.get(name, {})) for name in ("grids", "activations")}
        | {"masks": cut(dict(_masks(checkpoint)))},
    }
    if (lost := checkpoint.get(CHANNELS)) is not None:
        found[CHANNELS] = {name: cut(lost[name]) for name in ("shapes", "sizes", "kept")}
    return found


def _load_weights(module: nn.Module, state: Mapping[str, Any], where: str) -> None:
    keys = {stored_name(key): key for key in module.state_dict()}
    given = {keys.get(stored_name(key), key): value for key, value in state.items()}
    try:
        module.load_state_dict(given, strict=getattr(module, "strict_loading", True))
    except RuntimeError as error:
        raise TargetError(f"{where} does not fit the module: {error}") from error


def attach_state(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Attach the masks and grids of a checkpoint to a module that holds its weights.

    Raises:
        TargetError: for a grid or a mask of a weight that the module does not have.
    """
    state = read_state(checkpoint)
    places: dict[str, tuple[nn.Module, str, Tensor]] = {}
    layers: dict[str, nn.Module] = {}
    for prefix, layer in module.named_modules():
        layers[stored_name(prefix)] = layer
        set_activation_grids(layer, None)
        for name, parameter in layer.named_parameters(recurse=False):
            clear_grid(layer, name)
            set_known_mask(layer, name, None)
            path = stored_name(f"{prefix}.{name}" if prefix else name)
            places[path] = places[clean_path(path)] = (layer, name, parameter)
    if missing := sorted({*state.grids, *state.masks} - set(places)):
        raise TargetError(f"the checkpoint compresses {missing[:3]}, which the module lacks")
    for path, grid in state.grids.items():
        layer, name, _ = places[path]
        set_grid(layer, name, grid)
    for path, mask in state.masks.items():
        layer, name, parameter = places[path]
        if mask.shape == parameter.shape:
            set_known_mask(layer, name, mask)
    for path, pair in state.rounding.items():
        if path not in layers:
            raise TargetError(f"the checkpoint has activation grids of {path!r}, no such layer")
        set_activation_grids(layers[path], pair)


def state_for_file(checkpoint: Mapping[str, Any]) -> CompressionState:
    """Grids and channels as an `.lcz` file takes them: axes counted from the front."""
    state, tensors = read_state(checkpoint), checkpoint["state_dict"]
    dims = {stored_name(key): tensor.dim() for key, tensor in tensors.items()}
    grids = {
        path: grid
        if isinstance(grid, CodebookGrid) or grid.axis is None
        else replace(grid, axis=grid.axis % dims[path])
        for path, grid in state.grids.items()
        if path in dims
    }
    return replace(state, masks={}, grids=grids)
