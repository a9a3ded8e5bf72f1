"""Load a teacher: a module, a config, a checkpoint, an artifact, or the student's average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.channels.resize import rebuild_channels
from lightning_compress.copies import copy_module
from lightning_compress.errors import TargetError
from lightning_compress.lcz.artifact import load_compressed
from lightning_compress.terminal import ShownArguments

__all__ = [
    "DENSE",
    "EMATeacher",
    "LiveTeacher",
    "check_stranger",
    "load_teacher",
    "prepare_teacher",
]

DENSE = "dense"  # the dense run of an experiment, which alone can resolve it
_WAYS = "give a copy (copy.deepcopy), or EMATeacher() for self-distillation"
TeacherSpec = nn.Module | Mapping[str, Any] | Callable[[], nn.Module] | str | Path


class LiveTeacher(ShownArguments):
    """A teacher that changes while the student trains."""

    def start(self, student: nn.Module) -> nn.Module:
        """The teacher to begin with."""
        raise NotImplementedError

    def on_batch(self, batch: Any, index: int) -> None:
        """React to a batch that the student is about to train on."""

    def on_step(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """React to a step of the student's optimizer; (student module, teacher module) pairs."""

    def state_dict(self) -> dict[str, Any]:
        """State of a resumed run besides the teacher's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""


class EMATeacher(LiveTeacher):
    """The student's own exponential moving average as its teacher.

    Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780.

    Args:
        decay: share of the old average kept at each step of the student's optimizer.

    Raises:
        ValueError: for a decay outside [0, 1).

    >>> EMATeacher(0.99).decay
    0.99
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must lie in [0, 1)")
        self.decay = decay

    def start(self, student: nn.Module) -> nn.Module:
        """A copy of the student."""
        return copy_module(student)

    @torch.no_grad()
    def on_step(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Move the average towards the student; buffers are copied."""
        for student, teacher in pairs:
            for mean, value in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(value.detach(), 1 - self.decay)
            for mean, value in zip(teacher.buffers(), student.buffers(), strict=True):
                mean.copy_(value)


def load_teacher(
    teacher: TeacherSpec, checkpoint: str | Path | None, student: nn.Module
) -> nn.Module:
    """Build a teacher and load its weights; nothing in a file is executed.

    Args:
        teacher: a module; a config with `_target_` or a callable that builds one; or the path of
            a checkpoint of the student's own class, whose hyperparameters it holds.
        checkpoint: a Lightning checkpoint, a saved state_dict or an `.lcz` file to load into it.
        student: the model in training.

    Raises:
        TargetError: for what builds no module, files that do not fit, or an unknown teacher.
        FileNotFoundError: without such a file.
    """
    if isinstance(teacher, (str, Path)):
        if teacher == DENSE:
            raise TargetError(
                "teacher='dense' is the dense run of the same experiment, which only "
                "lightning-compress trains: elsewhere give a module, a config or a checkpoint"
            )
        if checkpoint is not None:
            raise TargetError(f"teacher={str(teacher)!r} is a path: leave checkpoint out")
        return _from_hyperparameters(Path(teacher), student)
    module = _build(teacher)
    if checkpoint is not None:
        _load(module, Path(checkpoint))
    return module


def _build(teacher: Any) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, Mapping):
        from hydra.utils import instantiate  # noqa: TID251 (a teacher may be given as a config)

        module = instantiate(dict(teacher), _convert_="all")
    else:
        module = teacher() if callable(teacher) else teacher
    if not isinstance(module, nn.Module):
        raise TargetError(
            f"teacher={teacher!r}: give a module, a config with _target_, a callable that builds "
            "one, or a checkpoint's path"
        )
    return module


def _from_hyperparameters(path: Path, student: nn.Module) -> nn.Module:
    content = _read(path)
    arguments = content.get("hyper_parameters")
    if path.suffix == ".lcz" or arguments is None:
        raise TargetError(
            f"{path} does not say what model it holds: give teacher=<a module, or a config with "
            f"_target_> and checkpoint={str(path)!r}"
        )
    module = type(student)(**dict(arguments))
    _fill(module, content, path)
    return module


def _load(module: nn.Module, path: Path) -> None:
    if path.suffix == ".lcz":
        if not path.is_file():
            raise FileNotFoundError(f"there is no teacher {path}")
        deployed: Any = getattr(module, "deployed_module", None)
        load_compressed(path, module if deployed is None else deployed())
        return
    _fill(module, _read(path), path)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no teacher {path}")
    if path.suffix == ".lcz":
        return {}
    return torch.load(path, map_location="cpu", weights_only=True)


def _fill(module: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    try:
        rebuild_channels(module, content)
        module.load_state_dict(content.get("state_dict", content))
    except RuntimeError as error:
        raise TargetError(f"{path} does not fit {type(module).__name__}: {error}") from error


def check_stranger(teacher: nn.Module, student: nn.Module, pairs: Sequence[str] = ()) -> None:
    """Check that the two share nothing that trains: the teacher is frozen, and does not move.

    Args:
        teacher: of the run.
        student: the model in training.
        pairs: paths of the student's modules that are taught.

    Raises:
        TargetError: naming what they share, and in which pair.
    """
    if teacher is student:
        raise TargetError(f"the teacher is the student: {_WAYS}")
    own = {id(one): (name, one) for name, one in student.named_parameters()}
    shared = [own[id(one)] for one in teacher.parameters() if id(one) in own]
    taught = [
        path for path in pairs if any(not path or name.startswith(f"{path}.") for name, _ in shared)
    ]
    if not taught and not any(one.requires_grad for _, one in shared):
        return  # a part that is frozen on both sides, say
    names = [name for name, _ in shared][:3]
    if len(shared) == len(own):
        raise TargetError(f"the teacher is the student: they share everything; {_WAYS}")
    if taught:
        raise TargetError(
            f"the teacher is the student in the pair {taught[0]!r}: they share {names}; {_WAYS}"
        )
    raise TargetError(
        f"the teacher shares {names} with the student, which trains, while the pairs "
        f"{list(pairs)} teach other modules: freezing the teacher would freeze it too; {_WAYS}"
    )


def prepare_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """Freeze a teacher in eval mode, on the student's device and in its floating-point type."""
    like = next((one for one in student.parameters() if one.is_floating_point()), None)
    if like is not None:
        teacher.to(device=like.device, dtype=like.dtype)
    shared = {one: one.training for one in student.modules()}
    teacher.eval().requires_grad_(False)
    for one in teacher.modules():  # a frozen part of both keeps the student's mode
        one.training = shared.get(one, False)
