"""Map-style data sets of `(x, y)` items, the order of their rows, and the loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_compress.data.splits import seeded_permutation

__all__ = ["EpochSampler", "LateLoader", "Split", "TensorSplit", "WholeBatches", "as_is"]


class Split(Dataset[tuple[Tensor, Tensor]], ABC):
    """One split of a data set: sized, map-style, and hashable by content."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def chunks(self) -> Iterator[bytes | memoryview]:
        """Everything that decides what a reader of this split sees, for a content hash."""


class TensorSplit(Split):
    """Rows in memory. Bytes (uint8) come out as float32 in [0, 1], a quarter of the memory.

    Args:
        x: images (N, C, H, W), sequences (N, T, F) or tokens (N, T).
        y: labels, int64 of shape (N,).

    >>> split = TensorSplit(torch.tensor([[0], [255]], dtype=torch.uint8), torch.tensor([3, 4]))
    >>> split[1]
    (tensor([1.]), tensor(4))
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows, y has {len(y)}; they must be as many")
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        x = self._x[index]
        return (x.float().div_(255) if x.dtype == torch.uint8 else x), self._y[index]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All rows, as `torch.utils.data.TensorDataset` has them."""
        return self[:]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Type, shape and bytes of both tensors."""
        for tensor in (self._x, self._y):
            yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
            yield tensor.contiguous().numpy().data.cast("B")


class WholeBatches(Dataset[tuple[Tensor, Tensor]]):
    """What a loader reads of a `TensorSplit`: one indexing operation a batch, not one an item.

    A loader calls `__getitems__` with a batch of indices, and wants `as_is` as `collate_fn`.
    It stays an ordinary loader of single items otherwise: Lightning can put a
    `DistributedSampler` into it, which it cannot with `batch_size=None`.
    """

    def __init__(self, split: TensorSplit) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._split[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows of a whole batch."""
        return self._split[torch.as_tensor(indices)]


def as_is(batch: Any) -> Any:
    """Collate nothing: the batch is one already.

    >>> as_is((torch.ones(2), torch.zeros(2)))[0]
    tensor([1., 1.])
    """
    return batch


class EpochSampler(RandomSampler):
    """A random order that depends on (seed, epoch) alone, so that a resumed run repeats it.

    Lightning calls `set_epoch` before each epoch; without it each pass counts as the next epoch.
    As a `RandomSampler` it is known to Lightning as shuffled and replaceable.

    >>> sampler = EpochSampler(range(5), seed=0)
    >>> first, second = list(sampler), list(sampler)
    >>> sampler.set_epoch(0)
    >>> first == list(sampler), first == second, sorted(first)
    (True, False, [0, 1, 2, 3, 4])
    """

    def __init__(self, data_source: Sized, seed: int) -> None:
        super().__init__(data_source)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        yield from seeded_permutation(self.num_samples, self._seed, epoch).tolist()


class LateLoader(DataLoader):
    """A loader that starts to read when the first batch is asked for, not at `iter()`.

    A resumed Lightning run calls `iter()` before it tells the sampler its epoch; worker processes
    that fetch ahead would repeat the first epoch's batches.

    >>> loader = LateLoader([1, 2, 3], batch_size=2)
    >>> [batch.tolist() for batch in loader]
    [[1, 2], [3]]
    """

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield from super().__iter__()
