"""Sharded parameters (FSDP2's DTensors): each process sees its own part, and counts for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_compress.errors import TargetError

__all__ = ["Shards", "is_sharded", "local_part", "shards_of"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of a plain one.

    >>> local_part(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shards_of(tensor: Tensor) -> Shards | None:
    """How a tensor is spread over processes; None for a plain one.

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
    return Shards(mesh, placements, mesh.get_group())


@dataclass(frozen=True)
class Shards:
    """One way of spreading tensors over the processes of a group, by their first axis."""

    mesh: Any
    placements: tuple[Any, ...]
    group: Any

    def sum(self, counts: Tensor) -> Tensor:
        """Counts of all processes, added up."""
        total = counts.clone()
        distributed.all_reduce(total, group=self.group)
        return total

    def quotas(self, available: Tensor, wanted: int) -> list[int]:
        """How many each local tensor may take, when the first in order take `wanted` together.

        The order is by tensor, then by process: that of the whole tensors laid end to end.

        Args:
            available: int64 (tensors,), what there is to take on this process.
            wanted: in all.
        """
        size, rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        parts = [torch.empty_like(available) for _ in range(size)]
        distributed.all_gather(parts, available, group=self.group)
        table = torch.stack(parts, dim=1)  # (tensors, processes)
        before = table.flatten().cumsum(0).view_as(table) - table
        return (wanted - before).clamp(min=0).minimum(table)[:, rank].tolist()

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor, on every process, of the parts that each holds."""
        from torch.distributed.tensor import DTensor

        as_bytes = part.to(torch.uint8) if part.dtype == torch.bool else part
        sharded = DTensor.from_local(as_bytes, self.mesh, self.placements, run_check=False)
        return sharded.full_tensor().to(part.dtype)

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor that every process has."""
        rows, size = whole.shape[0], distributed.get_world_size(self.group)
        width = -(-rows // size)  # as torch.chunk: the last parts may be smaller or empty
        start = min(distributed.get_rank(self.group) * width, rows)
        return whole[start : min(start + width, rows)]
