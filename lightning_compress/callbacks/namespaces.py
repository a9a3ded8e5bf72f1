"""Lightning under both of its names: `lightning.pytorch`, and the older `pytorch_lightning`.

The two packages hold the same classes twice. A module, a Trainer or a callback of the older name is
no instance of the newer one's classes; what counts is told by names of classes and by methods.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, cast

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

__all__ = [
    "averages_weights",
    "in_both_namespaces",
    "is_lightning_module",
    "is_multiprocessing_launcher",
    "launcher_classes",
    "overrides",
]
_AVERAGES = {"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"}
_OLDER = "pytorch_lightning"
_ROOTS = ("lightning", _OLDER)


def _bases(one: Any, *names: str) -> list[type]:
    """Classes of Lightning, of either package, that something is an instance of, by name."""
    return [
        base
        for base in type(one).__mro__
        if base.__name__ in names and base.__module__.partition(".")[0] in _ROOTS
    ]


def is_lightning_module(one: Any) -> bool:
    """Whether something is a LightningModule, whichever package it is from.

    >>> is_lightning_module(object())
    False
    """
    return bool(_bases(one, "LightningModule"))


def overrides(hook: str, module: Any) -> bool:
    """Whether a module has a hook of its own, in place of Lightning's.

    >>> from lightning.pytorch import LightningModule
    >>> overrides("setup", LightningModule())
    False
    """
    own = getattr(module, hook, None)
    if own is None:
        return False
    defaults = [getattr(base, hook, None) for base in _bases(module, "LightningModule")]
    return _function(own) not in defaults


def _function(method: Any) -> Any:
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return getattr(method, "__func__", method)


def averages_weights(callback: Any, *, swa: bool = True) -> bool:
    """Whether a callback averages weights: by name, of either package.

    Args:
        callback: of a Trainer.
        swa: whether StochasticWeightAveraging counts, which holds its average in another way.

    >>> from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
    >>> averages_weights(EMAWeightAveraging()), averages_weights(EarlyStopping("loss"))
    (True, False)
    """
    names = {base.__name__ for base in type(callback).__mro__}
    return bool(names & (_AVERAGES if swa else _AVERAGES - {"StochasticWeightAveraging"}))


def launcher_classes() -> list[Any]:
    """The launchers of processes, of the packages that are imported."""
    older = sys.modules.get(f"{_OLDER}.strategies.launchers.multiprocessing")
    found = [_MultiProcessingLauncher, getattr(older, "_MultiProcessingLauncher", None)]
    return [one for one in found if one is not None]


def is_multiprocessing_launcher(launcher: Any) -> bool:
    """Whether a fit runs in processes that this launcher spawns or forks."""
    return isinstance(launcher, tuple(launcher_classes()))


def in_both_namespaces(written: type) -> type:
    """A class of callbacks that a Trainer of either package knows as its own.

    A Trainer looks for checkpoint and early stopping callbacks by their classes: for
    `ckpt_path="best"`, say. Where the older package is imported, its class of the same name is
    added behind all others.
    """
    older = sys.modules.get(f"{_OLDER}.callbacks")
    if older is None or _OLDER in {_root(base) for base in written.__mro__}:
        return written
    names = {base.__name__ for base in written.__mro__ if _root(base) == "lightning"}
    found = [getattr(older, one) for one in ("ModelCheckpoint", "EarlyStopping") if one in names]
    return _joined(written, *found)


class _Wall:
    """Between the two packages' classes: `super().__init__()` of the newer one ends here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


@cache
def _joined(written: type, *older: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    attributes: dict[str, Any] = {name: getattr(written, name) for name in names}
    return type(written.__name__, (written, _Wall, *older), {**attributes, "_written": written})


def _root(one: type) -> str:
    return one.__module__.partition(".")[0]


class BothNamespaces:
    """Mixin of callbacks that a Trainer of either package finds by their class."""

    _written: type | None = None

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """An instance of the class, with the older package's base where that is imported."""
        return super().__new__(in_both_namespaces(cls))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as the class that is written in a module."""
        made = super().__reduce_ex__(protocol)
        if self._written is None or not isinstance(made, tuple):
            return made
        return (_blank, (self._written,), *made[2:])


def _blank(written: type) -> Any:
    return cast(Any, written).__new__(written)
