"""Grids against torch's own fake quantization, and what they keep whatever the weights are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.grids import CodebookGrid, channel_axis
from lightning_compress.quantization.ranges import affine_grid, minmax_range


def weights(seed, shape=(6, 4, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_projection_equals_torch_fake_quantize(bits, symmetric, axis):
    weight = weights(bits)
    grid = affine_grid(weight, bits=bits, symmetric=symmetric, axis=axis)
    limits = grid.qmin, grid.qmax
    if axis is None:
        zero = int(grid.zero_point)
        expected = torch.fake_quantize_per_tensor_affine(weight, grid.scale.item(), zero, *limits)
    else:
        expected = torch.fake_quantize_per_channel_affine(
            weight, grid.scale, grid.zero_point, axis, *limits
        )
    # torch multiplies by 1 / scale: a weight half way between two points may go the other way.
    apart = (grid.project(weight) - expected).abs() > 1e-6
    assert apart.float().mean() < 0.002


@given(
    st.integers(0, 10_000),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
def test_zero_stays_zero_and_projecting_twice_changes_nothing(seed, bits, symmetric, axis, unit):
    weight = weights(seed, (5, 4)) * unit
    weight[torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) < 0.5] = 0.0
    grid = affine_grid(weight, bits=bits, symmetric=symmetric, axis=axis)
    once = grid.project(weight)
    assert (once[weight == 0] == 0).all()
    assert torch.equal(grid.project(once), once)
    assert once.unique().numel() <= 2**bits * grid.scale.numel()
    step = grid.scale.max() * 0.501
    inside = (weight - once).abs() <= step
    assert inside.all()  # the range covers every weight: rounding is the only error


def test_ranges_hold_zero_and_equal_a_loop():
    weight = weights(1)
    low, high = minmax_range(weight, axis=1)
    for channel in range(4):
        part = weight[:, channel]
        assert low[channel] == min(part.min(), torch.tensor(0.0))
        assert high[channel] == max(part.max(), torch.tensor(0.0))
    assert minmax_range(weight.abs() + 1)[0] == 0


def test_a_range_of_zero_width_keeps_its_zeros():
    weight = torch.zeros(3, 4)
    weight[0, 0] = 2.0
    grid = affine_grid(weight, bits=4, axis=0)
    assert torch.equal(grid.project(weight), weight)
    assert grid.scale.tolist()[1:] == [1.0, 1.0]


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "8"])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match="valid are integers 2 to 8"):
        affine_grid(torch.ones(2), bits=bits)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        affine_grid(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("kind", [torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d])
def test_the_output_channel_of_a_transposed_convolution_is_axis_one(kind):
    assert channel_axis(kind(3, 5, 2)) == 1
    assert channel_axis(torch.nn.Conv2d(3, 5, 2)) == 0


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(0, 8))
def test_each_weight_goes_to_its_nearest_centre(seed, below, above):
    generator = torch.Generator().manual_seed(seed)
    rises = 0.01 + torch.rand(below + above + 1, generator=generator)
    centres = rises.cumsum(0)
    centres = centres - centres[below]
    grid = CodebookGrid(centres)
    weight = 3 * torch.randn(40, 3, generator=generator)
    symbols = grid.quantize(weight)
    assert symbols.min() >= -below
    assert symbols.max() <= above
    distance = (weight[..., None] - centres).abs()
    chosen = (weight - grid.project(weight)).abs()
    assert torch.allclose(chosen, distance.min(dim=-1).values)
    assert (grid.project(torch.zeros(3)) == 0).all()
    assert torch.equal(grid.project(grid.project(weight)), grid.project(weight))
    assert 2**grid.bits >= centres.numel() > 2 ** (grid.bits - 1) or grid.bits == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_large_weight_is_projected_piece_by_piece_to_the_same_points(symmetric):
    weight = weights(0, (500, 401))  # no multiple of a piece
    grid = affine_grid(weight, bits=5, symmetric=symmetric)
    wanted = grid.dequantize(grid.quantize(weight))
    for laid in (weight, weight.t().contiguous().t()):
        assert torch.equal(grid.project(laid), wanted)


@pytest.mark.parametrize("shape", [(7, 5), (500, 401)])
@pytest.mark.parametrize("kind", ["symmetric", "affine", "codebook"])
def test_symbols_are_counted_as_a_histogram_of_all(shape, kind):
    weight = weights(0, shape)
    grid = affine_grid(weight, bits=5, symmetric=kind == "symmetric")
    if kind == "codebook":
        grid = CodebookGrid(torch.tensor([-1.0, 0.0, 0.3]))
    expected = torch.bincount(grid.quantize(weight).reshape(-1) + 255, minlength=511)
    assert torch.equal(grid.count(weight), expected)


@pytest.mark.parametrize("shape", [(7, 5), (500, 401)])
@pytest.mark.parametrize("axis", [None, 0])
def test_points_match_until_one_is_written(shape, axis):
    weight = weights(0, shape)
    grid = affine_grid(weight, bits=5, axis=axis)
    points = torch.empty_like(weight)
    assert grid.project(weight, out=points) is points
    assert torch.equal(points, grid.dequantize(grid.quantize(weight)))
    assert grid.matches(weight, points)
    points[-1, -1] += 1e-6
    assert not grid.matches(weight, points)
