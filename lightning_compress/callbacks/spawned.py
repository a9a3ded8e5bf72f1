"""Results of a fit in spawned or forked processes, sent to the process that started them.

Under `ddp_spawn`, `ddp_fork` and `ddp_notebook` callbacks and module of the main process see
nothing of a fit: Lightning hands back weights and logged metrics alone. Its launcher collects more
results where it is extended here: here the module's compression state, and what callbacks report.
"""

from __future__ import annotations

import functools
import io
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_compress.callbacks.namespaces import launcher_classes
from lightning_compress.lcz.restoring import STATE, attach_state, pack_state
from lightning_compress.state import compression_state

__all__ = ["Reports", "bring_results_back", "results_come_back"]

_KEY = "lightning_compress"
_HOOKS = ("get_extra_results", "_recover_results_in_main_process")


@runtime_checkable
class Reports(Protocol):
    """A callback whose results a user reads after the fit."""

    state_key: str

    def fit_results(self) -> dict[str, Any]:
        """Attributes, by name, as they are when the fit has ended."""
        ...


def results_come_back() -> bool:
    """Whether Lightning's launcher has the two methods that are extended here."""
    launchers = launcher_classes()
    return all(callable(getattr(one, name, None)) for one in launchers for name in _HOOKS)


def bring_results_back() -> None:
    """Have the launchers carry results; once a process, from the first callback on."""
    for launcher in launcher_classes() if results_come_back() else ():
        if not hasattr(launcher.get_extra_results, _KEY):
            _extend(launcher)


def _extend(launcher: Any) -> None:
    collect, recover = (getattr(launcher, name) for name in _HOOKS)

    @functools.wraps(collect)
    def collected(self: Any, trainer: Trainer) -> dict[str, Any]:
        extra = collect(self, trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            extra[_KEY] = _results(trainer)
        return extra

    @functools.wraps(recover)
    def recovered(self: Any, worker_output: Any, trainer: Trainer) -> None:
        recover(self, worker_output, trainer)
        if (packed := worker_output.extra.get(_KEY)) is not None:
            found = torch.load(io.BytesIO(packed), weights_only=False)
            attach_state(trainer.lightning_module, found["module"])
            _give(trainer, found["callbacks"])

    setattr(collected, _KEY, True)
    launcher.get_extra_results = collected
    launcher._recover_results_in_main_process = recovered


def _results(trainer: Trainer) -> bytes:
    """As bytes: tensors in shared memory would die with the process."""
    state = {STATE: pack_state(compression_state(trainer.lightning_module))}
    callbacks = {one.state_key: one.fit_results() for one in _reporting(trainer)}
    buffer = io.BytesIO()
    torch.save({"module": state, "callbacks": callbacks}, buffer)
    return buffer.getvalue()


def _reporting(trainer: Trainer) -> list[Reports]:
    return [one for one in trainer.callbacks if isinstance(one, Reports)]  # type: ignore[attr-defined]


def _give(trainer: Trainer, results: dict[str, dict[str, Any]]) -> None:
    for one in _reporting(trainer):
        for name, value in results.get(one.state_key, {}).items():
            setattr(one, name, value)
