"""What ChannelPruning needs of a run: sample inputs, and the others that must follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.channel_calls import Calls
from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.distillation.inputs import placed, sample_inputs
from lightning_compress.errors import TargetError
from lightning_compress.pruning.channels import Kept
from lightning_compress.targets import Target, clean_path

__all__ = [
    "Samples",
    "claim_run",
    "place_inputs",
    "report_table",
    "tapped_features",
    "tell_others",
]

_ROWS = 2  # examples that are kept of a batch
_WAYS = (
    "Lightning calls training_step and not the module: say what belongs together by "
    "example_input_array and a forward(), by parts(), or by an attribute deployed that names the "
    "networks that ship"
)


class Samples:
    """Sample inputs of some modules: known, or taken from the first batch.

    Args:
        module: the whole.
        roots: paths of the modules; in place of the whole itself, the networks that are called.
        targets: weights that they hold.
    """

    def __init__(self, module: nn.Module, roots: Sequence[str], targets: Sequence[Target]) -> None:
        self._found: dict[str, tuple[Any, ...]] = {}
        self._handles: list[Any] = []
        self.roots = list(roots)
        self._calls: Calls | None = None
        self.watched = False  # whether the roots are those that were called
        for root in self.roots:
            part = module.get_submodule(root)
            known = sample_inputs(module, clean_path(root), part)
            if known is not None:
                self._found[root] = known
                continue
            if not root:
                others = tuple(f"{one}." for one in roots if one)
                paths = [one.path for one in targets if not one.path.startswith(others)]
                self._calls = Calls(module, paths, keep=_few)
                continue

            def look(_module: nn.Module, args: Any, root: str = root) -> None:
                self._found.setdefault(root, _few(args))

            self._handles.append(part.register_forward_pre_hook(look))

    @property
    def complete(self) -> bool:
        """Whether inputs of all modules are known."""
        return all(root in self._found for root in self.roots)

    def settle(self) -> list[str]:
        """After a step of the optimizer: the networks that were called take the whole's place.

        Returns:
            Targets that none of them holds, by path.

        Raises:
            TargetError: when none was called.
        """
        if self._calls is None:
            return []
        called, missed = self._calls.roots(), self._calls.missed()
        if not called:
            raise TargetError(f"no network was called that holds {missed}. {_WAYS}")
        self._calls.stop()
        self._calls, self.watched = None, True
        self.roots = [*(one for one in self.roots if one), *called]
        self._found |= called
        return missed

    def give(self, module: nn.Module, inputs: Mapping[str, Sequence[Any]]) -> None:
        """Inputs of an earlier part of the run, by path, in place of those of a batch to come."""
        self.stop()
        self._calls, self.roots = None, list(inputs)
        self._found = place_inputs(module, inputs)

    def explain(self, error: TargetError) -> TargetError:
        """An error of the networks that were called, with the ways out."""
        return TargetError(f"{error}. Called were {self.roots}. {_WAYS}")

    def take(self) -> dict[str, tuple[Any, ...]]:
        """The inputs, by path; looking ends."""
        self.stop()
        return {root: self._found[root] for root in self.roots}

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._calls is not None:
            self._calls.stop()

    def __str__(self) -> str:
        return str([root or "the module" for root in self.roots if root not in self._found])


def _few(args: Any) -> Any:
    tensors = [one for one in pytree.tree_leaves(args) if isinstance(one, Tensor)]
    batch = len(tensors[0]) if tensors and tensors[0].dim() else 0

    def cut(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        rows = one[:_ROWS] if one.dim() and len(one) == batch else one
        return rows.detach().clone()

    return pytree.tree_map(cut, args)


def place_inputs(
    module: nn.Module, inputs: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[Any, ...]]:
    """Sample inputs of some modules, by path, brought to where these are."""
    return {path: placed(tuple(one), module.get_submodule(path)) for path, one in inputs.items()}


def claim_run(owner: Any, trainer: Trainer) -> None:
    """Refuse what cannot follow when layers get smaller.

    Raises:
        TargetError: naming it.
    """
    key = owner.state_key
    if trainer.world_size > 1:
        raise TargetError(
            f"{key} works in one process: the wrapper of several (DDP, FSDP) keeps the sizes of "
            "the first step. Prune with one process, and train the smaller model on with several"
        )
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, type(owner)) and one is not owner:
            raise TargetError(
                f"{key} and {one.state_key}: each would remove channels that the other counts; "
                "name all layers in include of one"
            )
        if getattr(one, "rewind", None) is not None:
            raise TargetError(
                f"{key} and {one.state_key}: weights cannot go back to what they were before "
                "channels were removed; leave rewind out"
            )


def tapped_features(trainer: Trainer) -> dict[str, str]:
    """Modules whose outputs a distillation compares through adapters: they keep their sizes."""
    found = {}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, KnowledgeDistillation) and one.session is not None:
            for link in one.session.links:
                for ours, _ in link.pair.features:
                    path = ".".join(filter(None, (link.pair.student, ours)))
                    found[path] = f"a feature that {one.state_key} compares"
    return found


def tell_others(
    owner: Any,
    trainer: Trainer,
    module: LightningModule,
    kept: Kept,
    sized: Mapping[str, int],
) -> None:
    """Let all callbacks follow that hold something of the sizes of the module."""
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        follow = getattr(one, "on_channels_removed", None)
        if follow is not None and one is not owner:
            follow(module, kept, sized)


@rank_zero_only
def report_table(owner: Any) -> None:
    """Print what was asked for, and what each layer got."""
    graph, dense = owner.plan.graph, owner.goal.dense
    wanted = f"{owner.goal.final:.4g} of the {owner.kind} were to stay"
    said = f"{owner.left:.4g} of the {owner.kind} stay" if owner.led else wanted
    table = Table(title=f"Channels: {said}")
    for heading in ("layers", "before", "now", "why not fewer"):
        table.add_column(heading, justify="right" if heading in ("before", "now") else "left")
    for group in graph.groups:
        why = ", ".join(group.reasons) if len(group.free) < len(group.units) else ""
        before = dense.get(group.name, len(group.units))
        table.add_row(", ".join(group.layers), str(before), str(len(group.units)), why)
    Console(soft_wrap=False).print(table)
