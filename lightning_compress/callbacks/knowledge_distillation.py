"""KnowledgeDistillation: adds a teacher's losses to the student's backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.base import builds_layers_later, check_run_ends, run_progress
from lightning_compress.channels.calls import CalledNetworks, few_rows
from lightning_compress.channels.graph import Kept
from lightning_compress.channels.resize import shrink
from lightning_compress.channels.student import initialize_from_teacher
from lightning_compress.distillation.pairs import (
    Pair,
    Weight,
    check_weight,
    in_fractions,
    inner_pair,
    make_pairs,
    weight_at,
)
from lightning_compress.distillation.session import Session
from lightning_compress.distillation.teachers import (
    DENSE,
    EMATeacher,
    LiveTeacher,
    check_stranger,
    load_teacher,
    prepare_teacher,
)
from lightning_compress.errors import TargetError, check_choice
from lightning_compress.targets import clean_path
from lightning_compress.terminal import ShownArguments

__all__ = ["KnowledgeDistillation"]

BALANCES = (None, "gradient_norm")


class KnowledgeDistillation(ShownArguments, Callback):
    """Train the model with a teacher's losses beside its own training step.

    The losses enter the student's backward pass where its output enters: the training step and
    what it logs are unchanged, and the teacher is called only when a gradient reaches the
    student. Logs `distill/<pair>/<loss>`, unweighted. The teacher is frozen, in eval mode, on the
    student's device, and in no checkpoint.

    Under manual optimization a division of the loss by the number of accumulated batches is not
    visible here: divide `weight` too.

    Args:
        teacher: a module (a LightningModule is one); a config with `_target_` or a callable that
            builds one; the path of a checkpoint of the student's own class; `EMATeacher()`;
            "dense" in an experiment of `lightning-compress`.
        checkpoint: a checkpoint, state_dict or `.lcz` file to load into the teacher.
        pairs: paths, (student path, teacher path) or `Pair`s; None: the deployed part.
        losses: of pairs that are given by paths; see `Pair.loss`.
        weight: multiplies the weight of every pair; a number or a schedule such as `Ramp`.
        temperature: of the losses that are given by name and have one.
        balance: None, or "gradient_norm": each term's gradient is scaled to `weight` times the
            norm of the user's own at the student's output.
        initialize: begin with the teacher's most important channels, see
            `initialize_from_teacher`; of equal modules with its weights.
        adapter_lr: learning rate of the adapters' Adam.
        name: prefix of what is logged, and the key of the state.

    Raises:
        ValueError: for values outside their range; the message names the valid ones.

    >>> KnowledgeDistillation(nn.Linear(2, 2), pairs=["generator"], losses="l1").losses
    'l1'
    """

    def __init__(
        self,
        teacher: Any,
        *,
        checkpoint: str | None = None,
        pairs: Sequence[Any] | str | Pair | None = None,
        losses: Any = "mse",
        weight: Weight = 1.0,
        temperature: float = 1.0,
        balance: str | None = None,
        initialize: bool = False,
        adapter_lr: float = 1e-3,
        name: str = "distill",
    ) -> None:
        check_weight("weight", weight)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r} must be above 0")
        check_choice("balance", balance, BALANCES)
        if not adapter_lr > 0:
            raise ValueError(f"adapter_lr={adapter_lr!r} must be above 0")
        self.teacher, self.checkpoint, self.pairs = teacher, checkpoint, pairs
        self.losses, self.weight, self.temperature = losses, weight, temperature
        self.balance, self.initialize, self.adapter_lr = balance, initialize, adapter_lr
        self.name = name
        self.session: Session | None = None
        self._loaded: dict[str, Any] | None = None
        self._module: nn.Module | None = None
        self._warned: set[str] = set()
        self._inner: list[tuple[str, str]] = []  # (pair, what of it is taught), where that is told
        self._calls: dict[str, CalledNetworks] = {}  # by the name of each pair

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return f"{type(self).__name__}[{self.name}]"

    def take_dense(self, model: nn.Module) -> None:
        """Take the dense run of an experiment as the teacher, if `teacher` is "dense"."""
        if isinstance(self.teacher, str) and self.teacher == DENSE:
            self.teacher = model

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check paths, sizes, and that the teacher is not the student, before training."""
        self._loaded = None  # what validate or test may have left here
        if stage == "fit" and not builds_layers_later(pl_module):
            self._session(pl_module, rank=0).remove()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the student's modules and their optimizers."""
        if _is_compiled(pl_module):
            torch.compiler.reset()  # compiled code does not notice new hooks
        self.session = self._session(pl_module, rank=trainer.global_rank)
        if any(in_fractions(weight) for weight in self._weights()):
            check_run_ends(trainer)
        if self.initialize and trainer.ckpt_path is None:
            for paired in self.session.paired_modules:
                if _structure(paired.student) == _structure(paired.teacher):
                    paired.student.load_state_dict(paired.teacher.state_dict())
                else:  # channels to choose
                    initialize_from_teacher(paired.student, paired.teacher)
        self._attach(trainer)
        self._inner = []
        self._watch(pl_module)
        self._warned = set()
        pairs = [
            f"{paired.pair.student!r} from {paired.pair.teacher!r}"
            for paired in self.session.paired_modules
        ]
        rank_zero_info(f"{self.state_key}: {', '.join(pairs)}")

    def _attach(self, trainer: Trainer) -> None:
        assert self.session is not None
        self.session.attach(trainer.optimizers, adapter_lr=self.adapter_lr)
        for parameter in self.session.adapter_parameters() if trainer.world_size > 1 else ():
            with torch.no_grad():
                parameter.copy_(trainer.strategy.broadcast(parameter.detach()))

    def _watch(self, student: LightningModule) -> None:
        """See which networks are called, until each module's optimizer has made a step."""
        assert self.session is not None
        if _is_compiled(student):
            return
        names = {id(one): path for path, one in student.named_modules()}
        for paired in self.session.paired_modules:
            path = names[id(paired.student)]
            inside = [
                ".".join(filter(None, (path, name)))
                for name, _ in paired.student.named_parameters()
            ]
            self._calls[paired.pair.name] = CalledNetworks(
                student, inside, keep=few_rows, within=path
            )

    def _descend(self, trainer: Trainer, student: LightningModule) -> None:
        """Pair what was called inside modules that were used through a method, never called.

        Raises:
            TargetError: where nothing was called inside, or the pair says more than paths.
        """
        assert self.session is not None
        pairs: list[Pair] = []
        steps: list[int] = []
        told: list[tuple[str, str]] = []
        inputs: dict[str, Any] = {}
        for paired, step in zip(self.session.paired_modules, self.session.steps, strict=True):
            pair = paired.pair
            done = self._calls.pop(pair.name, None) if step else None
            roots = {} if done is None else done.roots()
            called = [pair.student] if done is None else [clean_path(one) for one in roots]
            inputs |= dict(zip(called, roots.values(), strict=False))
            if done is not None:
                done.stop()
            inner = [] if pair.student in called else called
            if done is not None and pair.student not in called:
                _check_inner(self.state_key, pair, inner)
                rank_zero_info(
                    f"{self.state_key}: {pair.student or 'the module'!r} itself is never called: "
                    f"{', '.join(inner)} inside it are taught"
                )
            told += [(pair.student, one) for one in inner or [pair.student]]
            pairs += [inner_pair(pair, one) for one in inner] or [pair]
            steps += [step] * max(len(inner), 1)
        if len(pairs) > len(self.session.paired_modules) or told != self._named(told):
            self._pair_anew(trainer, student, pairs, inputs)
            self._inner, self.session.steps = told, steps

    @staticmethod
    def _named(told: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(one, one) for one, _ in told]

    def _stop_watching(self) -> None:
        for calls in self._calls.values():
            calls.stop()
        self._calls = {}

    def _pair_anew(
        self,
        trainer: Trainer,
        student: LightningModule,
        pairs: list[Pair],
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        old = self.session
        assert old is not None
        old.remove()
        self.session = self._make_session(
            pairs, student, old.teacher, live=old.live, rank=trainer.global_rank, inputs=inputs
        )
        self._attach(trainer)

    def _session(self, student: LightningModule, *, rank: int) -> Session:
        given, live = self.teacher, None
        if isinstance(given, LiveTeacher):
            live, teacher = given, given.start(student)
        else:
            if self._module is None:
                self._module = load_teacher(given, self.checkpoint, student)
            teacher = self._module
        pairs = make_pairs(self.pairs, student, teacher, self.losses)
        check_stranger(teacher, student, [pair.student for pair in pairs])
        prepare_teacher(teacher, student)
        return self._make_session(pairs, student, teacher, live=live, rank=rank)

    def _make_session(
        self,
        pairs: list[Pair],
        student: LightningModule,
        teacher: nn.Module,
        *,
        live: LiveTeacher | None,
        rank: int,
        inputs: Mapping[str, Any] | None = None,
    ) -> Session:
        return Session(
            pairs,
            student,
            teacher,
            live=live,
            temperature=self.temperature,
            balance=self.balance is not None,
            rank=rank,
            inputs=inputs,
        )

    @property
    def average(self) -> nn.Module | None:
        """A teacher that is an average of the student, in a fit."""
        known = self.session
        return known.teacher if known and isinstance(known.live, EMATeacher) else None

    def _weights(self) -> list[Weight]:
        assert self.session is not None
        return [self.weight, *(paired.pair.weight for paired in self.session.paired_modules)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state of a checkpoint."""
        if self._loaded is not None and self.session is not None:
            if inner := self._loaded.get("inner"):
                known = {paired.pair.student: paired.pair for paired in self.session.paired_modules}
                pairs = [
                    inner_pair(known[of], one) if of != one else known[of] for of, one in inner
                ]
                self._pair_anew(trainer, pl_module, pairs)
                self._inner = inner
                self._stop_watching()
            self.session.load_state_dict(self._loaded)
        self._loaded = None

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Set the weights of this batch, and let a teacher that trains do so."""
        assert self.session is not None
        fractions = any(in_fractions(weight) for weight in self._weights())
        fraction = run_progress(trainer) if fractions else 0.0
        for index, paired in enumerate(self.session.paired_modules):
            step = self.session.steps[index]
            weights = (self.weight, paired.pair.weight)
            ours, own = (weight_at(one, step=step, fraction=fraction) for one in weights)
            paired.weight = ours * own
        self.session.begin_batch(batch, batch_idx)

    def on_before_backward(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        loss: Tensor,  # noqa: ARG002
    ) -> None:
        """Inject the losses: this backward pass is the training step's own."""
        assert self.session is not None
        automatic = pl_module.automatic_optimization
        batches = trainer.accumulate_grad_batches if automatic else 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.session.begin_backward(scale=scale / batches, share=1 / batches)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keep the losses out of the user's other backward passes."""
        assert self.session is not None
        self.session.end_backward()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the losses: their values are known after the backward pass."""
        assert self.session is not None
        self.session.end_batch()
        for name, value in self.session.read_values().items():
            pl_module.log(f"{self.name}/{name}", value, batch_size=1)
        if self._calls:
            self._descend(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Warn of a pair that has distilled nothing."""
        assert self.session is not None
        for path, reason in self.session.silent():
            if path not in self._warned:
                self._warned.add(path)
                rank_zero_warn(f"{self.state_key}: nothing was distilled into {path!r}: {reason}")

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Mapping[str, int]) -> None:  # noqa: ARG002
        """Let a teacher that is an average of the student follow."""
        if (teacher := self.average) is not None:
            shrink(teacher, kept, sized=sized)

    def state_dict(self) -> dict[str, Any]:
        """Clocks, adapters and their optimizers, a teacher that changes; no frozen teacher."""
        if self.session is None:
            return {}
        state = self.session.state_dict()
        return {**state, "inner": list(self._inner)} if self._inner else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = state_dict or None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Remove the hooks and drop the adapters."""
        self._stop_watching()
        if self.session is not None:
            self.session.remove()
            self.session = None

    def on_exception(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Remove the hooks; the state stays for a checkpoint of what broke."""
        self._stop_watching()
        if self.session is not None:
            self.session.remove()


def _is_compiled(module: nn.Module) -> bool:
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl for one in module.modules())


def _check_inner(key: str, pair: Pair, inner: Sequence[str]) -> None:
    """Check that what was called inside a pair's module can take its place."""
    what = f"{key}: {pair.student or 'the module'!r} itself is never called"
    if not inner:
        raise TargetError(
            f"{what}, nor a layer inside it: nothing can be distilled. Does the training step call "
            "modules themselves, not functions of their weights? Give pairs=[...] with their paths"
        )
    if pair.features or pair.prior or pair.inputs or pair.adapter:
        raise TargetError(
            f"{what}, but {list(inner)} inside it are: name them in pairs=[...], with the "
            "features, prior, inputs or adapters that you have given for it"
        )


def _structure(module: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """Classes of all layers and shapes of all tensors, by path."""
    layers = {path: type(layer) for path, layer in module.named_modules()}
    return layers, {name: tensor.shape for name, tensor in module.state_dict().items()}
