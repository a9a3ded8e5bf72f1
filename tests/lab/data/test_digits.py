"""Digits and DigitRows against scikit-learn's own arrays."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from lightning_compress.lab.data import DigitRows, Digits


def ready(cls=Digits, **kwargs):
    data = cls(**kwargs)
    data.setup()
    return data


def all_rows(data):
    splits = (data.train_dataset, data.val_dataset, data.test_dataset)
    x, y = zip(*(split.tensors for split in splits), strict=True)
    return torch.cat(x), torch.cat(y)


def as_set(x, y):
    rows = torch.cat([x.flatten(1), y[:, None].float()], dim=1).numpy()
    return sorted(map(tuple, rows))


def test_every_digit_lies_in_exactly_one_split():
    images, labels = load_digits(return_X_y=True)
    x, y = all_rows(ready())
    expected = as_set(torch.tensor(images).float() / 16, torch.tensor(labels))
    assert as_set(x[..., 4:12, 4:12], y) == expected


def test_shapes_types_and_range():
    data = ready(batch_size=50)
    sizes = [len(s) for s in data.splits]
    assert sizes == [1200, 200, 397]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        x, y = next(iter(loader))
        assert (x.shape, x.dtype) == ((50, 1, 16, 16), torch.float32)
        assert (y.shape, y.dtype) == ((50,), torch.int64)
    x, y = all_rows(data)
    assert (x.min(), x.max()) == (0, 1)
    assert data.dims == {"channels": 1, "image_size": 16, "num_classes": 10}
    assert Digits().dims == data.dims
    assert (data.kind, data.labelled) == ("image", True)


def test_the_frame_is_black():
    x, _ = all_rows(ready())
    middle = x[..., 4:12, 4:12].sum(dtype=torch.float64)
    assert x.sum(dtype=torch.float64) == middle > 0


def test_splits_are_stratified():
    shares = [torch.bincount(s.tensors[1]) / len(s) for s in ready().splits]
    whole = torch.from_numpy(np.bincount(load_digits().target) / 1797)
    for share, split in zip(shares, ready().splits, strict=True):
        assert ((share - whole).abs() * len(split)).max() <= 1.0  # one row off at most


def test_resize_fills_the_frame():
    padded, resized = ready(image_size=8), ready(fit="resize", image_size=20)
    small, _ = padded.train_dataset[:32]
    expected = functional.interpolate(small, (20, 20), mode="bilinear")
    torch.testing.assert_close(resized.train_dataset[:32][0], expected)
    x, _ = all_rows(resized)
    assert x.min() >= 0
    assert x.max() <= 1


def test_rows_are_the_digits_row_by_row_in_the_same_splits():
    digits, rows = ready(image_size=8, seed=3), ready(DigitRows, seed=3)
    for images, sequences in zip(digits.splits, rows.splits, strict=True):
        assert torch.equal(images.tensors[0].squeeze(1), sequences.tensors[0])
        assert torch.equal(images.tensors[1], sequences.tensors[1])
    assert rows.dims == {"steps": 8, "features": 8, "num_classes": 10}
    assert (rows.kind, rows.labelled) == ("sequence", True)


def test_seed_decides_splits_and_order():
    def batches(seed):
        return torch.cat([x for x, _ in ready(seed=seed).train_dataloader()])

    assert torch.equal(batches(5), batches(5))
    assert not torch.equal(batches(5), batches(6))
    assert as_set(*ready(seed=5).test_dataset[:]) != as_set(*ready(seed=6).test_dataset[:])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 7}, "image_size must be >= 8 .* got 7"),
        ({"image_size": 0, "fit": "resize"}, "image_size must be an integer >= 1, got 0"),
        ({"fit": "stretch"}, "fit='stretch'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": "many"}, "batch_size must be an integer >= 1, got 'many'"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"num_workers": -1}, "num_workers must be an integer >= 0, got -1"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Digits(**kwargs)


def test_unknown_argument():
    with pytest.raises(TypeError, match="batchsize"):
        Digits(batchsize=3)
