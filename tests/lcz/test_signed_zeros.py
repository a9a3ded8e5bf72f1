"""Zeros of both signs: what `weight * mask` leaves costs nothing."""

import pytest
import torch
from torch import nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.lcz.raw_bits import DTYPES, without_negative_zeros
from lightning_compress.quantization.post_training import quantize_weights


def pruned(*, signed):
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    with torch.no_grad():
        mask = (torch.rand(64, 128) > 0.9).float()
        layer.weight.copy_(layer.weight * mask if signed else (layer.weight * mask) + 0.0)
    return layer


@pytest.mark.parametrize("bits", [None, 4])
def test_a_file_of_signed_zeros_is_as_small_as_one_without(tmp_path, bits):
    sizes = []
    for signed in (True, False):
        layer = pruned(signed=signed)
        if bits:
            quantize_weights(layer, bits)
            if signed:  # as a mask made after quantization leaves them
                with torch.no_grad():
                    layer.weight.copy_(torch.where(layer.weight == 0, -0.0, layer.weight))
        sizes.append(save_compressed(layer, tmp_path / f"{signed}.lcz").bytes)
        found = load_compressed(tmp_path / f"{signed}.lcz", nn.Linear(128, 64))
        assert torch.equal(found.weight, layer.weight)
        assert not (found.weight[found.weight == 0]).signbit().any()
    assert sizes[0] == sizes[1]


def test_signed_zeros_stay_where_they_are_asked_for(tmp_path):
    layer = pruned(signed=True)
    assert layer.weight.signbit().any()
    small = save_compressed(layer, tmp_path / "a.lcz").bytes
    large = save_compressed(layer, tmp_path / "b.lcz", signed_zeros=True).bytes
    found = load_compressed(tmp_path / "b.lcz", nn.Linear(128, 64))
    assert torch.equal(found.weight.signbit(), layer.weight.signbit())
    assert large > 1.1 * small


@pytest.mark.parametrize("name", [one for one in DTYPES if DTYPES[one].is_signed])
def test_nothing_but_the_sign_of_zeros_changes(name):
    values = torch.tensor([0.0, -1.0, 2.0, -3.0]).to(getattr(torch, name))
    if values.is_floating_point() or values.is_complex():
        values = torch.cat([values, (-torch.zeros(2)).to(getattr(torch, name))])
    found = without_negative_zeros(values)
    assert found.dtype == values.dtype
    wide = torch.complex128 if values.is_complex() else torch.float64
    assert torch.equal(found.to(wide), values.to(wide))
