"""LowRank: wide weights become two factors at an event, and train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_compress.callbacks.base import WeightCallback, builds_layers_later, run_progress
from lightning_compress.callbacks.channel_pruning import ChannelPruning
from lightning_compress.channels.low_rank import factorize, match_factors, replace_layer, why_whole
from lightning_compress.errors import TargetError
from lightning_compress.schedules import check_window
from lightning_compress.targets import CoverageTable, Pattern, Target, select
from lightning_compress.terminal import ShownArguments

__all__ = ["LowRank"]


class LowRank(ShownArguments, Callback):
    """Let wide weights become two factors at an event, which train on and ship as two layers.

    Linear layers and convolutions of one group, where two factors hold fewer weights; the others
    stay, with a reason in `coverage`. Optimizers get the factors in the weight's place, without
    its moments. Checkpoints and files hold two layers: a run resumes by itself, another module is
    brought to them by `match_factors`.
    Pruning and quantization beside it quantize and prune the factors.

    Args:
        rank: r of each weight; or, below 1, the part of a weight's energy that its r keeps.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        begin: 0: before training; int: batches; float in (0, 1): fraction of the run.

    Raises:
        ValueError: for values out of range.

    >>> LowRank(rank=16).rank
    16
    """

    def __init__(
        self,
        *,
        rank: float,
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern = (),
        begin: float = 0.0,
    ) -> None:
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if not whole and not (isinstance(rank, float) and 0 < rank < 1):
            raise ValueError(f"rank={rank!r}: give an integer from 1 on, or a part in (0, 1)")
        if begin != 0:
            check_window(0, begin)
        self.rank, self.include, self.exclude, self.begin = rank, include, exclude, begin
        self.coverage = CoverageTable()
        self.done = False
        self._module: int | None = None  # whose factors they are

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the factors before optimizers are made, or find mistakes."""
        if stage != "fit":
            return
        if self._module != id(pl_module):
            self.done, self._module = False, id(pl_module)
            pl_module.register_load_state_dict_pre_hook(_match)
        if self.begin != 0 and any(isinstance(one, ChannelPruning) for one in _others(trainer)):  # pyright: ignore
            raise TargetError(
                f"LowRank(begin={self.begin!r}) beside ChannelPruning: channels are found when "
                "training begins, so let factors be there: begin=0"
            )
        if builds_layers_later(pl_module):
            if self.begin == 0:
                raise TargetError(
                    "LowRank(begin=0): the module makes its layers in configure_model, after "
                    "this callback's setup: give a begin above 0"
                )
        elif self.begin == 0 and not self.done:
            self._factorize(pl_module)
        elif not self.done:
            select(pl_module, self.include, self.exclude)

    def _targets(self, module: LightningModule) -> list[Target]:
        selection = select(module, self.include, self.exclude)
        reasons = {
            one.path: why
            for one in selection.targets
            if (why := why_whole(one.layer, one.name, self.rank))
        }
        self.coverage = CoverageTable(
            replace(row, selected=False, reason=reasons[row.path]) if row.path in reasons else row
            for row in selection.coverage
        )
        found = [one for one in selection.targets if one.path not in reasons]
        if not found:
            raise TargetError(f"LowRank(rank={self.rank!r}): no weight becomes smaller: {reasons}")
        return found

    def _factorize(self, module: LightningModule) -> dict[int, list[nn.Parameter]]:
        """Replace the layers; by id of a former weight: the two that take its place."""
        taken = {}
        for target in self._targets(module):
            factors: Any = factorize(target.layer, self.rank)
            replace_layer(module, target.path.rpartition(".")[0], factors)
            taken[id(target.parameter)] = [factors[0].weight, factors[1].weight]
            shape = tuple(target.parameter.shape)
            rank_zero_info(f"LowRank: {target.path} {shape} has rank {len(factors[0].weight)} now")
        self.done = True
        return taken

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Make the factors when it is time: no graph of this batch is alive any more."""
        if self.done:
            return
        fraction = isinstance(self.begin, float)
        position = run_progress(trainer) if fraction else trainer.fit_loop.total_batch_idx + 1
        if position < self.begin:
            return
        taken = self._factorize(pl_module)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                old = group["params"]
                group["params"] = [one for each in old for one in taken.get(id(each), [each])]
                for each in old:
                    if id(each) in taken:
                        optimizer.state.pop(each, None)
        for other in _others(trainer):
            if isinstance(other, WeightCallback):
                other.look_again_soon()

    def state_dict(self) -> dict[str, Any]:
        """Whether the factors are made."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put it back."""
        self.done = state_dict["done"]


def _others(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a checkpoint is loaded: layers that are two in it become two."""
    own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    match_factors(module, own)
