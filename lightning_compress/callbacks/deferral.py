"""Deferred hooks: callbacks wait for the first batch where names do not give the deployed part."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.deployment import deployed_part, is_judge, known_by_name, note_deployed
from lightning_compress.structure import StructureReader

__all__ = ["DEFERRED_HOOKS", "deferred", "load_deployed", "save_deployed", "wait_for_structure"]

_KEY = "lightning_compress_deployed"  # of a checkpoint
_READERS: weakref.WeakKeyDictionary[LightningModule, StructureReader] = weakref.WeakKeyDictionary()
# Hooks of a callback that waits: they do nothing before the structure is known.
DEFERRED_HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)


def wait_for_structure(trainer: Trainer, module: LightningModule) -> StructureReader | None:
    """Structure reader of a module with several optimizers whose names do not settle it.

    All callbacks of one module share it.
    """
    if known_by_name(module):
        return None
    if (reader := _READERS.get(module)) is None:
        reader = StructureReader(module, trainer.optimizers)
        if not reader.useful:
            return None
        _READERS[module] = reader
        rank_zero_info(
            f"the deployed part of {type(module).__name__} is found in the first training batch, "
            "since no name gives it: until then nothing is pruned or quantized"
        )
    return reader


def note_structure(reader: StructureReader, module: LightningModule) -> bool:
    """Note the deployed part after a batch; return whether the search for it is over."""
    if known_by_name(module):
        return True
    if not reader.end():
        return False
    _READERS.pop(module, None)
    parts = reader.deployed()
    note_deployed(module, parts or ("",))
    if parts:
        rank_zero_info(f"by structure, {' and '.join(parts)} is the deployed part")
        return True
    if reader.one_network:
        return True
    names = [path for path, _ in reader.networks if path and not is_judge(path)]
    rank_zero_warn(
        f"all of {type(module).__name__} is taken as the deployed part: neither the names of its "
        f"networks ({', '.join(names)}) nor the dataflow between them show which of them only "
        "train the others. Name those that are deployed in an attribute of the model, "
        "deployed = (...), or give include=[...]"
    )
    return True


def deferred(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of a callback with `include` and `waiting`, that waits for the structure.

    When that is known the callback starts as at the start of a fit, after that batch.
    """
    name = method.__name__

    @functools.wraps(method)
    def hook(self: Any, trainer: Trainer, pl_module: LightningModule, *args: Any) -> Any:
        if name == "on_fit_start" and self.waiting is None and self.include is None:
            self.waiting = wait_for_structure(trainer, pl_module)
        if self.waiting is None:
            return method(self, trainer, pl_module, *args)
        if name == "on_train_batch_start":
            self.waiting.begin(args[0])
        elif name == "on_train_batch_end" and note_structure(self.waiting, pl_module):
            self.waiting = None
            self.on_fit_start(trainer, pl_module)
            self.on_train_start(trainer, pl_module)
            return method(self, trainer, pl_module, *args)
        elif name in ("on_train_end", "on_fit_end"):
            _end(self, pl_module)
        return None

    return hook


def _end(callback: Any, module: LightningModule) -> None:
    reader, callback.waiting = callback.waiting, None
    reader.stop()
    _READERS.pop(module, None)
    rank_zero_warn(
        f"{callback.state_key}: the run ended before all networks of {type(module).__name__} were "
        "called, so that the deployed part is unknown: nothing was compressed. Name those that are "
        "deployed in an attribute of the model, deployed = (...)"
    )


def save_deployed(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Save the deployed part for a resumed run."""
    if known_by_name(module):
        checkpoint[_KEY] = list(deployed_part(module))


def load_deployed(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the deployed part, where the module does not name it itself."""
    if checkpoint.get(_KEY) and not known_by_name(module):
        note_deployed(module, checkpoint[_KEY])
