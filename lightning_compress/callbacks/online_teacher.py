"""OnlineTeacher: a dense teacher that trains beside the student, in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.namespaces import is_lightning_module
from lightning_compress.distillation.teachers import LiveTeacher, load_teacher
from lightning_compress.errors import TargetError
from lightning_compress.modes import own_random_stream

__all__ = ["OnlineTeacher"]


class _TeacherFabric(Fabric):
    """Trainer interface of a LightningModule that trains outside of a Trainer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(accelerator=device.type, devices=1)
        self.optimizers: list[Any] = []
        self.global_step = 0
        self.current_epoch = 0


class OnlineTeacher(LiveTeacher):
    """A teacher that trains by its own training step on each batch, before the student does.

    Ren et al. 2021 (OMGD), https://arxiv.org/abs/2108.06908: a student that follows a growing
    teacher meets an easier sequence of targets. The teacher receives the batches and the noise of
    the student, has optimizers of its own, and one process.

    Args:
        teacher: a LightningModule, a config or a callable that builds one; None: the student's
            own class with its hyperparameters and `changes`.
        changes: to the student's hyperparameters; None: `{"width_multiplier": 1.0}`.
        seed: of the teacher's weights.

    Raises:
        TargetError: for a teacher together with changes.

    >>> OnlineTeacher().changes
    {'width_multiplier': 1.0}
    """

    def __init__(
        self,
        teacher: Any = None,
        *,
        changes: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if teacher is not None and changes is not None:
            raise TargetError("changes are to the student's hyperparameters: give no teacher then")
        self.teacher, self.seed = teacher, seed
        self.changes = dict(changes or {"width_multiplier": 1.0})
        self._model: LightningModule | None = None
        self._fabric: _TeacherFabric | None = None
        self._free: list[nn.Parameter] = []

    def start(self, student: nn.Module) -> nn.Module:
        """Build the teacher.

        Raises:
            TargetError: for several processes, or what is no LightningModule.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise TargetError("OnlineTeacher trains in one process: use devices=1")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = self._build(student)
        if not is_lightning_module(module):
            raise TargetError(
                f"{type(module).__name__} is no LightningModule: it cannot train itself"
            )
        if module is not self._model:  # a given one is frozen since it was started last
            self._free = [one for one in module.parameters() if one.requires_grad]
        self._model, self._fabric = cast(LightningModule, module), None
        return module

    def _build(self, student: nn.Module) -> nn.Module:
        if self.teacher is not None:
            return load_teacher(self.teacher, None, student)
        arguments = dict(getattr(student, "hparams", {}))
        unknown = sorted(set(self.changes) - set(arguments))
        if unknown:
            raise TargetError(
                f"{type(student).__name__} has no hyperparameters {unknown} (save_hyperparameters "
                f"has {sorted(arguments)}): give the teacher itself"
            )
        return type(student)(**{**arguments, **self.changes})

    def on_batch(self, batch: Any, index: int) -> None:
        """Train the teacher on the batch."""
        module, fabric = self._ready()
        for parameter in self._free:
            parameter.requires_grad_(True)
        module.train()
        with torch.enable_grad(), own_random_stream(module):
            loss = module.training_step(batch, index)
            if module.automatic_optimization:
                self._step(fabric, loss)
        fabric.global_step += 1 if module.automatic_optimization else len(fabric.optimizers)
        module.eval().requires_grad_(False)

    @staticmethod
    def _step(fabric: _TeacherFabric, loss: Any) -> None:
        value = loss["loss"] if isinstance(loss, Mapping) else loss
        assert isinstance(value, Tensor)
        for optimizer in fabric.optimizers:
            optimizer.zero_grad()
        fabric.backward(value)
        for optimizer in fabric.optimizers:
            optimizer.step()

    def _ready(self) -> tuple[LightningModule, _TeacherFabric]:
        if self._model is None:
            raise RuntimeError("OnlineTeacher has no model yet: training has not begun")
        if self._fabric is None:
            fabric = _TeacherFabric(self._model.device)
            optimizers = _optimizers(self._model)
            _, *fabric.optimizers = fabric.setup(self._model, *optimizers, move_to_device=False)
            self._fabric = fabric
        return self._model, self._fabric

    def state_dict(self) -> dict[str, Any]:
        """The teacher's optimizers and its clock."""
        _, fabric = self._ready()
        states = [one.optimizer.state_dict() for one in fabric.optimizers]
        return {"optimizers": states, "steps": fabric.global_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        _, fabric = self._ready()
        for optimizer, one in zip(fabric.optimizers, state["optimizers"], strict=True):
            optimizer.optimizer.load_state_dict(one)
        fabric.global_step = state["steps"]


def _optimizers(module: LightningModule) -> list[Optimizer]:
    found = module.configure_optimizers()
    listed = list(found) if isinstance(found, (list, tuple)) else [found]
    if not all(isinstance(one, Optimizer) for one in listed):
        raise TargetError(
            f"{type(module).__name__}.configure_optimizers gives schedulers too, which an online "
            "teacher has no trainer for: give optimizers only"
        )
    return listed  # type: ignore[return-value]
