"""Sharded parameters (FSDP2's DTensors): local parts, reductions over processes, full tensors.

Code that calls `Shards` or `UNSHARDED` works on both: each call that communicates must be made by
all processes of the group alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn

from lightning_compress.errors import TargetError

__all__ = [
    "UNSHARDED",
    "Partition",
    "Shards",
    "Unsharded",
    "full_tensor",
    "is_sharded",
    "local_part",
    "shards_of",
    "to_shards",
]  # fmt: skip


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of a plain one.

    >>> local_part(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor; of a sharded one all processes must call alike.

    >>> full_tensor(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def to_shards(module: nn.Module) -> None:
    """Reshard weights that a forward pass has gathered (FSDP2).

    What is written into a module's parameters while they are gathered is lost, and what is written
    into the shards is not seen.
    """
    for one in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(one).__mro__):
            one.reshard()  # type: ignore[operator]


def shards_of(tensor: Tensor) -> Shards | None:
    """How a tensor is partitioned over processes; None for a plain one.

    Raises:
        TargetError: for a tensor that is not split along its first axis over one set of
            processes, as FSDP2 does.
    """
    if not is_sharded(tensor):
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements = tuple(tensor.placements)  # type: ignore[attr-defined]
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise TargetError(
            f"a parameter with placements {placements} cannot be compressed: valid is one "
            "Shard(0), as FSDP2's fully_shard makes it"
        )
    return Shards(mesh, placements, mesh.get_group(), tensor.shape[0])


@dataclass(frozen=True)
class Shards:
    """Partition of a tensor over the processes of a group, by its first axis.

    Args:
        mesh: of the processes.
        placements: of the tensor on it.
        group: the same processes.
        rows: length of the whole tensor's first axis.
    """

    mesh: Any
    placements: tuple[Any, ...]
    group: Any
    rows: int

    @property
    def bounds(self) -> tuple[int, int]:
        """The first row that this process holds, and the one after the last."""
        size, rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        width = -(-self.rows // size)  # as torch.chunk: the last parts may be smaller or empty
        start = min(rank * width, self.rows)
        return start, min(start + width, self.rows)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """The smallest of all processes' values, none of them NaN."""
        return self._reduced(values, distributed.ReduceOp.MIN)

    def all_gather(self, values: Tensor) -> Tensor:
        """Values of each process, (processes, ...)."""
        sent = values.to(self.mesh.device_type).contiguous()
        parts = [torch.empty_like(sent) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, sent, group=self.group)
        return torch.stack(parts).to(values.device)

    def widen(self, values: Tensor, axis: int | None) -> Tensor:
        """Values (..., size of the axis here) among 0 for what other processes hold of the axis."""
        if axis != 0:
            return values
        start, stop = self.bounds
        return torch.nn.functional.pad(values, (start, self.rows - stop))

    def narrow(self, values: Tensor, axis: int | None) -> Tensor:
        """What this process needs of values (..., size of the whole axis)."""
        return values if axis != 0 else values[..., slice(*self.bounds)]

    def numel(self, part: Tensor) -> int:
        """Elements of the whole tensor."""
        return self.rows * part.shape[1:].numel()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        sent = values.to(self.mesh.device_type, copy=True)  # the group may know no other device
        distributed.all_reduce(sent, how, group=self.group)
        return sent.to(values.device)

    def quotas(self, available: Tensor, wanted: int) -> list[int]:
        """How many each local tensor may take, when the first in order take `wanted` together.

        The order is by tensor, then by process: that of the whole tensors laid end to end.

        Args:
            available: int64 (tensors,), what there is to take on this process.
            wanted: in all.
        """
        table = self.all_gather(available).T  # (tensors, processes)
        before = table.flatten().cumsum(0).view_as(table) - table
        rank = distributed.get_rank(self.group)
        return (wanted - before).clamp(min=0).minimum(table)[:, rank].tolist()

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor, on every process, of the parts that each holds."""
        as_bytes = part.to(torch.uint8) if part.dtype == torch.bool else part
        return full_tensor(self.joined(as_bytes)).to(part.dtype)

    def joined(self, part: Tensor) -> Tensor:
        """A sharded tensor of the parts that each process holds, without a message."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size([self.rows, *part.shape[1:]])  # parts may differ in size
        return DTensor.from_local(
            part.contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor that every process has."""
        return whole[slice(*self.bounds)]


class Unsharded:
    """The same for a tensor that every process holds in full: no communication."""

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The values, (1, ...)."""
        return values[None]

    def widen(self, values: Tensor, axis: int | None) -> Tensor:  # noqa: ARG002
        """The values."""
        return values

    def narrow(self, values: Tensor, axis: int | None) -> Tensor:  # noqa: ARG002
        """The values."""
        return values

    def numel(self, part: Tensor) -> int:
        """Elements of the tensor."""
        return part.numel()

    def whole(self, part: Tensor) -> Tensor:
        """The tensor."""
        return part

    def part(self, whole: Tensor) -> Tensor:
        """The tensor."""
        return whole


UNSHARDED = Unsharded()
Partition: TypeAlias = Shards | Unsharded
