"""What every DataModule of this package shares: three fixed splits and their loaders."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_compress.data.checks import check_whole
from lightning_compress.data.datasets import (
    EpochSampler,
    LateLoader,
    Split,
    TensorSplit,
    WholeBatches,
    as_is,
)

__all__ = ["Kind", "LoaderOptions", "SplitDataModule", "Splits"]

Kind = Literal["image", "sequence", "tokens"]
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

    def __init__(self, *, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.num_workers = check_whole("num_workers", num_workers, 0)
        self.seed = check_whole("seed", seed, 0, MAX_SEED)
        self._splits: Splits | None = None
        self._fingerprint: str | None = None

    @property
    @abstractmethod
    def dims(self) -> dict[str, int]:
        """What a model must know to fit this data: see the subclass for the keys."""

    @property
    def labelled(self) -> bool:
        """Whether y carries classes."""
        return True

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
