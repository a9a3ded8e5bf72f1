"""Base of the DataModules: three fixed splits and their loaders."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

__all__ = [
    "EpochSampler",
    "Kind",
    "LateLoader",
    "LoaderOptions",
    "Split",
    "SplitDataModule",
    "SplitIndices",
    "SplitRows",
    "Splits",
    "TensorSplit",
    "WholeBatches",
    "as_is",
    "check_fractions",
    "check_integer",
    "fraction_split",
    "seeded_permutation",
    "stratified_split",
]


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return `value` when it is an integer in `[minimum, maximum]`.

    Raises:
        ValueError: naming the argument, the value and the range.

    >>> check_integer("batch_size", 0, 1)
    Traceback (most recent call last):
    ValueError: batch_size must be an integer >= 1, got 0
    """
    highest = float("inf") if maximum is None else maximum
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= highest:
        return value
    valid = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise ValueError(f"{name} must be an integer {valid}, got {value!r}")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check that two parts of a data set leave something to train on.

    Raises:
        ValueError: when one is not between 0 and 1, or both together reach 1.

    >>> check_fractions(0.1, 1.5)
    Traceback (most recent call last):
    ValueError: test_fraction must be above 0 and below 1, got 1.5
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"{name} must be above 0 and below 1, got {value!r}")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction + test_fraction must be below 1,"
            f" got {val_fraction} + {test_fraction} = {val_fraction + test_fraction}"
        )


class SplitIndices(NamedTuple):
    """Row numbers of three disjoint splits, int64 of shape (rows,) each."""

    train: Tensor
    val: Tensor
    test: Tensor


def seeded_permutation(n: int, *key: int) -> Tensor:
    """A permutation of `range(n)`, int64 of shape (n,), that depends on `key` alone.

    The key's numbers are hashed together: (seed 0, epoch 1) has nothing in common with
    (seed 1, epoch 0), as it would have with `seed + epoch`.

    >>> bool((seeded_permutation(50, 0, 1) == seeded_permutation(50, 0, 1)).all())
    True
    >>> bool((seeded_permutation(50, 0, 1) == seeded_permutation(50, 1, 0)).all())
    False
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def fraction_split(n: int, val_fraction: float, test_fraction: float, seed: int) -> SplitIndices:
    """Split `n` rows at random; every split gets at least one row.

    Raises:
        ValueError: when `n` is too small for three splits.

    >>> [len(part) for part in fraction_split(50, 0.1, 0.2, seed=0)]
    [35, 5, 10]
    """
    val, test = (max(1, round(n * fraction)) for fraction in (val_fraction, test_fraction))
    if val + test >= n:
        raise ValueError(f"{n} rows are too few for {val} validation and {test} test rows")
    return SplitIndices(*seeded_permutation(n, seed).split([n - val - test, val, test]))


def stratified_split(labels: Tensor, train: int, val: int, seed: int) -> SplitIndices:
    """Split rows so that each split has each class in the same proportion.

    Args:
        labels: class of each row, shape (rows,).
        train: rows to train on.
        val: rows to validate on; all others are test rows.
        seed: equal seeds give equal splits.

    >>> parts = stratified_split(torch.arange(100) % 2, train=60, val=20, seed=0)
    >>> [len(part) for part in parts]
    [60, 20, 20]
    """
    classes = labels.numpy()
    rows = np.arange(len(classes))
    first, rest = train_test_split(rows, train_size=train, stratify=classes, random_state=seed)
    second, third = train_test_split(
        rest, train_size=val, stratify=classes[rest], random_state=seed
    )
    return SplitIndices(*(torch.from_numpy(part) for part in (first, second, third)))


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


class SplitRows(Split):
    """Some rows of another split.

    Args:
        split: of any kind.
        rows: indices into it.
    """

    def __init__(self, split: Split, rows: Tensor) -> None:
        self._split, self._rows = split, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._split[int(self._rows[index])]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The other split's, and the rows."""
        yield from self._split.chunks()
        yield self._rows.contiguous().numpy().data.cast("B")


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


Kind = Literal["image", "sequence", "tokens", "image_pairs", "audio"]
MAX_SEED = 2**32 - 1  # scikit-learn's limit


class LoaderOptions(TypedDict, total=False):
    """The arguments that every DataModule takes besides its own."""

    batch_size: int
    num_workers: int
    seed: int


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: Split
    val: Split
    test: Split


class SplitDataModule(LightningDataModule, ABC):
    """A data set with fixed train, validation and test splits.

    Batches are `(x, y)`: images float32 (N, C, H, W) in [0, 1], sequences float32 (N, T, F) in
    [0, 1], tokens int64 (N, T); y int64 (N,), zeros where the source has no labels.
    Where `paired` is true, x is the condition of a generator and y its target, of any shape.
    A subclass states `kind` and `dims` and writes `build`.

    Args:
        batch_size: rows a batch, of each process. The training loader drops the last, smaller
            batch if there is a full one.
        num_workers: loader processes; 0 reads in the main process.
        seed: 0 to 2^32 - 1; decides the splits and the order of the training batches.

    Raises:
        ValueError: for an argument out of its range.
    """

    kind: ClassVar[Kind]
    paired: ClassVar[bool] = False
    pretext: ClassVar[str] = "rotation"  # task of the feature network where there are no labels

    def __init__(self, *, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self.seed = check_integer("seed", seed, 0, MAX_SEED)
        self._splits: Splits | None = None
        self._fingerprint: str | None = None

    @property
    @abstractmethod
    def dims(self) -> dict[str, int]:
        """What a model must know to fit this data: see the subclass for the keys."""

    @property
    def labelled(self) -> bool:
        """Whether y carries classes."""
        return not self.paired

    def as_images(self, samples: Tensor) -> Tensor:
        """Rows, or what a model generated, as images (N, C, H, W) in [0, 1] for feature networks.

        Sequences (N, T, F) become (N, 1, T, F); other data are images already.
        """
        return samples.unsqueeze(1) if samples.dim() == 3 else samples

    def sample_files(self, samples: Tensor) -> dict[str, bytes]:  # noqa: ARG002
        """Files of generated samples beside their images, such as `{"0.wav": ...}`, by suffix."""
        return {}

    @abstractmethod
    def build(self) -> Splits:
        """Read the data and split it; called once, by `setup`."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (all stages share it)
        """Read the data, once: later calls keep what is there."""
        if self._splits is None:
            self._splits = self.build()

    @property
    def splits(self) -> Splits:
        """All three splits.

        Raises:
            RuntimeError: before `setup`.
        """
        if self._splits is None:
            raise RuntimeError(f"{type(self).__name__} holds no data yet: call setup() first")
        return self._splits

    def part(self, rows: Tensor, *, seed: int) -> SplitDataModule:
        """The same data with some of its training rows, and another order of their batches.

        Args:
            rows: indices into the training split.
            seed: of the order.
        """
        train = self.splits.train
        if isinstance(train, TensorSplit):
            chosen: Split = TensorSplit(*train[rows])
        else:
            chosen = SplitRows(train, rows)
        part = copy.copy(self)
        part.seed = check_integer("seed", seed, 0, MAX_SEED)
        part._splits, part._fingerprint = self.splits._replace(train=chosen), None
        return part

    @property
    def train_dataset(self) -> Split:
        """The rows to train on."""
        return self.splits.train

    @property
    def val_dataset(self) -> Split:
        """The rows to choose by."""
        return self.splits.val

    @property
    def test_dataset(self) -> Split:
        """The rows to report on."""
        return self.splits.test

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that stand for the training split's content."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for chunk in self.train_dataset.chunks():
                digest.update(chunk)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; equal seed and epoch give an equal order."""
        split = self.train_dataset
        processes = self.trainer.world_size if self.trainer else 1
        full = len(split) // processes >= self.batch_size
        return self._loader(split, EpochSampler(split, self.seed), drop_last=full)

    def val_dataloader(self) -> DataLoader:
        """The validation rows in a fixed order."""
        return self._loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader:
        """The test rows in a fixed order."""
        return self._loader(self.test_dataset)

    def _loader(
        self, split: Split, sampler: EpochSampler | None = None, *, drop_last: bool = False
    ) -> DataLoader:
        in_memory = isinstance(split, TensorSplit)
        return LateLoader(
            WholeBatches(split) if in_memory else split,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=as_is if in_memory else None,
            pin_memory=torch.cuda.is_available(),
            # without one, each pass over a loader draws from the global random stream,
            # and one validation more would change what the model trains on
            generator=torch.Generator().manual_seed(self.seed),
        )
