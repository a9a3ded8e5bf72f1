"""Passes in place of PyTorch's slow kernels: the same results, to the bit."""

import math

import pytest
import torch

from lightning_compress.fast_tensors import (
    all_finite,
    count_non_finite,
    row_bounds,
    zeroed,
)
from lightning_compress.grids import grid_of_range, numbers_of_range

ODD = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e38, 3.0]


def same_bits(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_zeroed_is_masked_fill(dtype, in_place, turned):
    values = torch.tensor(ODD * 8).to(dtype).view(8, 8)
    pruned = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    if turned:
        values, pruned = values.t(), pruned.t().contiguous()
    expected = values.masked_fill(pruned, 0.0)
    given = values.clone(memory_format=torch.preserve_format)
    found = zeroed(given, pruned, in_place=in_place)
    assert same_bits(found.contiguous(), expected.contiguous())
    assert (found is given) == in_place


def test_large_values_are_zeroed_piece_by_piece():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 401, generator=generator)  # no multiple of a piece
    pruned = torch.rand(500, 401, generator=generator) > 0.4
    assert torch.equal(zeroed(values, pruned), values.masked_fill(pruned, 0.0))


def test_zeroed_passes_gradients_through():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    pruned = torch.tensor([True, False])
    zeroed(values, pruned).sum().backward()
    assert values.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted(broken):
    values = torch.linspace(-1, 1, 99)
    assert all_finite(values)
    assert int(count_non_finite(values)) == 0
    values[[3, 50]] = broken
    assert not all_finite(values)
    assert int(count_non_finite(values)) == 2
    assert all_finite(torch.zeros(0))


@pytest.mark.parametrize("shape", [(1, 50), (7, 50), (7, 1)])
def test_bounds_of_rows(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows[0, 0] = math.nan
    low, high = row_bounds(rows)
    want = torch.aminmax(rows, dim=1)
    assert low.shape == high.shape == (shape[0],)
    torch.testing.assert_close(low, want.min, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high, want.max, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_of_a_range_are_those_of_its_grid(bits):
    source = torch.Generator().manual_seed(2)
    scales = 10.0 ** (60 * torch.rand(300, generator=source, dtype=torch.float64) - 45)
    pairs = torch.rand(300, 2, generator=source, dtype=torch.float64) * scales[:, None]
    for low, high in [*(pairs * torch.tensor([-1.0, 1.0])).tolist(), (0.0, 0.0), (-1.0, 0.0)]:
        lows, highs = (torch.tensor([one]).to(torch.float32) for one in (low, high))
        grid = grid_of_range(lows, highs, bits=bits, symmetric=False)
        zero = int(grid.zero_point)
        expected = (float(grid.scale), grid.qmin - zero, grid.qmax - zero)
        assert numbers_of_range(low, high, bits) == expected
    assert expected[2] - expected[1] == 2**bits - 1
