"""Which row goes into which split: seeded index sets, no data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["SplitIndices", "fraction_split", "seeded_permutation", "stratified_split"]


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
