import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lightning_compress.conversion.conv_rewrites import conv_in_blocks, transposed_as_conv

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(deadline=None)  # the first call of a convolution takes its time
@given(kernel=SIZES, stride=st.integers(1, 4), groups=st.sampled_from([1, 2, 4]), data=st.data())
def test_a_transposed_convolution_is_a_convolution_moved_apart(kernel, stride, groups, data):
    padding = tuple(data.draw(st.integers(0, side - 1)) for side in kernel)
    extra = tuple(data.draw(st.integers(0, stride - 1)) for _ in kernel)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.rand(2, 4, 7, 8, generator=generator)
    weight = torch.rand(4, 3, *kernel, generator=generator) - 0.5
    bias = torch.rand(3 * groups, generator=generator)
    settings = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups}
    expected = functional.conv_transpose2d(x, weight, bias, **settings)
    got = transposed_as_conv(weight, **settings)(x, bias, groups)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@settings(deadline=None)
@given(axes=st.integers(1, 3), groups=st.sampled_from([1, 2]), data=st.data())
def test_a_transposed_convolution_over_any_axes_with_a_stride_each(axes, groups, data):
    kernel, stride = (tuple(data.draw(st.integers(1, 4)) for _ in range(axes)) for _ in "ks")
    padding = tuple(data.draw(st.integers(0, side - 1)) for side in kernel)
    extra = tuple(data.draw(st.integers(0, step - 1)) for step in stride)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.rand(2, 4, *range(5, 5 + axes), generator=generator)
    weight = torch.rand(4, 3, *kernel, generator=generator) - 0.5
    settings = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups}
    transposed = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )
    expected = transposed[axes - 1](x, weight, **settings)
    got = transposed_as_conv(weight, **settings)(x, groups=groups)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [4, 16])
def test_a_convolution_makes_runs_of_samples(block):
    x, weight, bias = torch.rand(2, 3, 32), torch.rand(2, 3, 7) - 0.5, torch.rand(2)
    rewritten = conv_in_blocks(weight, padding=(3,), block=(block,))
    expected = functional.conv1d(x, weight, bias, padding=3)
    torch.testing.assert_close(rewritten(x, bias), expected, atol=1e-5, rtol=0)


def test_whole_numbers_stay_whole():
    weight = torch.randint(-127, 128, (2, 3, 3, 3), dtype=torch.int32)
    rewritten = transposed_as_conv(weight, stride=2, padding=(1, 1), output_padding=(1, 1))
    assert rewritten.weight.dtype == torch.int32
    assert rewritten.weight.shape == (12, 2, 2, 2)  # the 3 x 3 kernel is filled up to 4 x 4
    assert rewritten.weight.abs().sum() == weight.abs().sum()


@given(
    kernel=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    outputs=st.integers(1, 4),
    half=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    data=st.data(),
)
def test_a_convolution_makes_blocks_of_pixels(kernel, outputs, half, data):
    padding = tuple(data.draw(st.integers(0, side - 1)) for side in kernel)
    sides = [2 * h + k - 1 - 2 * p for h, k, p in zip(half, kernel, padding, strict=True)]
    if min(sides) < 1:
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.rand(2, 3, *sides, generator=generator)
    weight = torch.rand(outputs, 3, *kernel, generator=generator) - 0.5
    bias = torch.rand(outputs, generator=generator)
    rewritten = conv_in_blocks(weight, padding=padding)
    expected = functional.conv2d(x, weight, bias, padding=padding)
    torch.testing.assert_close(rewritten(x, bias), expected, atol=1e-5, rtol=0)
