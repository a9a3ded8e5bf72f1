"""Threshold masks by their definition."""

import pytest
import torch

from lightning_compress.pruning.mask_plan import threshold_mask


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 9.0])
def test_masks_are_what_the_definition_says(threshold):
    weight = torch.randn(30, 20)
    assert torch.equal(threshold_mask(weight, threshold), weight.abs() >= threshold)
    deviation = weight.double().sub(weight.double().mean()).square().mean().sqrt().item()
    expected = weight.abs() >= threshold * deviation
    assert torch.equal(threshold_mask(weight, threshold, relative=True), expected)


def test_the_largest_stay_when_too_few_would():
    weight = torch.tensor([0.1, -0.4, 0.2, 0.3])
    assert threshold_mask(weight, 5.0, min_keep=0.3).tolist() == [False, True, False, True]
    assert not threshold_mask(weight, 5.0).any()


def test_what_is_closed_stays_closed():
    closed = torch.tensor([True, False, False])
    mask = threshold_mask(torch.tensor([5.0, 5.0, 0.1]), 1.0, closed=closed)
    assert mask.tolist() == [False, True, False]


def test_nan_raises():
    with pytest.raises(ValueError, match="NaN"):
        threshold_mask(torch.tensor([1.0, float("nan")]), 0.5)
