"""Strategy for clients of different widths and one-shot federation, by distillation."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from lightning_compress.federated.arrays import load_arrays, model_arrays
from lightning_compress.federated.messages import record_of
from lightning_compress.federated.strategy import CompressedStrategy, OrderedGrid

__all__ = ["DistilledStrategy"]

Distill = Callable[[Any, Sequence[nn.Module], Sequence[float]], Any]


class DistilledStrategy(Strategy):
    """A strategy whose global model is a student of the clients' models, not their average.

    Clients of one family have one architecture; within a family updates are compressed, checked
    and aggregated by its own `CompressedStrategy`, so that its clients go on from its average.
    With one round it is one-shot federation.

    Args:
        families: a strategy for each family, by name.
        modules: makes a family's module, by name; with the weights that its clients start from.
        student: makes the server's module, of any width.
        distill: trains the student from teachers and their weights (numbers of examples), in
            place: such as `distill_samples`.
        family_of: the family of a client's name; None: there is one family only.

    Raises:
        ValueError: when the names of families and modules differ.
    """

    def __init__(
        self,
        families: Mapping[str, CompressedStrategy],
        modules: Mapping[str, Callable[[], nn.Module]],
        *,
        student: Callable[[], nn.Module],
        distill: Distill,
        family_of: Callable[[str], str] | None = None,
    ) -> None:
        if families.keys() != modules.keys() or not families:
            raise ValueError(f"families {sorted(families)} and modules {sorted(modules)} differ")
        self.families, self.modules = dict(families), dict(modules)
        self.student, self.distill, self.family_of = student, distill, family_of
        self.names: dict[int, str] = {}
        for name, family in self.families.items():
            family.begin(model_arrays(self.modules[name]()))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The families' ledgers, added up round by round."""
        rows = []
        for parts in zip(*(family.rounds for family in self.families.values()), strict=True):
            refused = {name: why for part in parts for name, why in part["refused"].items()}
            sums = {key: sum(part[key] for part in parts) for key in ("up", "down", "clients")}
            rows.append({"round": parts[0]["round"], **sums, "refused": refused})
        return rows

    def summary(self) -> None:
        """Log the families' settings."""
        for family in self.families.values():
            family.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """All families' messages."""
        found: list[Message] = []
        names = self._meet(grid, server_round)
        for name, family in self.families.items():
            members = _Members(grid, names, self._member(name))
            found.extend(family.configure_train(server_round, arrays, config, members))
        return found

    def _meet(self, grid: Grid, number: int) -> dict[int, str]:
        """Exchange node names once for all families."""
        first, *others = self.families.values()
        first.meet(grid, number)
        for family in others:
            family.names, family.held = first.names, first.held
        return first.names

    def _member(self, family: str) -> Callable[[str], bool]:
        return lambda name: self.family_of is None or self.family_of(name) == family

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let each family aggregate its own, then distil all clients' models into the student."""
        replies, teachers, weights, metrics = list(replies), [], [], None
        for name, family in self.families.items():
            member, names = self._member(name), family.names
            own = [
                reply
                for reply in replies
                if member(names.get(node := reply.metadata.src_node_id, str(node)))
            ]
            _, found = family.aggregate_train(server_round, own)
            metrics = found if metrics is None else metrics
            for weight, model in family.models:
                teachers.append(_module(self.modules[name](), model))
                weights.append(weight)
        if not teachers:
            return None, metrics
        student = self.student()
        self.distill(student, teachers, weights)
        return record_of(model_arrays(student)), metrics

    def configure_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,  # noqa: ARG002
    ) -> Iterable[Message]:
        """Nothing: the student may fit no client; the server evaluates it."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],  # noqa: ARG002
    ) -> MetricRecord | None:
        """Nothing: no evaluation was configured."""
        return None


def _module(module: nn.Module, arrays: Mapping[str, Tensor]) -> nn.Module:
    load_arrays(module, arrays)
    return module.eval().requires_grad_(False)


class _Members(OrderedGrid):
    """A grid with the nodes of one family."""

    def __init__(self, grid: Grid, names: Mapping[int, str], member: Callable[[str], bool]) -> None:
        super().__init__(grid, names)
        self._member = member

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if self._member(self._names.get(node, ""))]
