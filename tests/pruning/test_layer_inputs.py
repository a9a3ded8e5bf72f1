"""Layers as matrix products: columns times matrix is what PyTorch computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.pruning.layer_inputs import (
    LayerCall,
    from_matrix,
    gather,
    to_matrix,
    windows,
)

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def product(layer, x, output):
    """The layer's output without bias, from its windows and its matrix alone."""
    spatial = len(layer.kernel_size)
    view = windows(layer, x, output.shape[2:])
    rows = gather(view, spatial, torch.arange(view.shape[: 1 + spatial].numel()))
    split = rows.view(len(rows), layer.groups, -1)
    result = torch.einsum("ngc,grc->ngr", split, to_matrix(layer.weight, layer)).flatten(1)
    return result.view(*view.shape[: 1 + spatial], -1).movedim(-1, 1)


@st.composite
def settings_of_a_layer(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))  # 4 is depthwise
    stride = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, size)) for size in kernel)
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    return dims, groups, stride, dilation, kernel, padding, extra


@settings(max_examples=60, deadline=None)
@given(settings_of_a_layer())
def test_a_transposed_convolution_is_its_matrix(drawn):
    dims, groups, stride, dilation, kernel, padding, extra = drawn
    layer = TRANSPOSED[dims - 1](
        4,
        8,
        kernel,
        stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        dilation=dilation,
        bias=False,
    ).double()
    x = torch.randn(2, 4, *(9 if dims < 3 else 6,) * dims, dtype=torch.double)
    output = layer(x)
    torch.testing.assert_close(product(layer, x, output), output)
    matrix = to_matrix(layer.weight, layer)
    assert torch.equal(from_matrix(matrix, layer, layer.weight.shape), layer.weight)


@settings(max_examples=60, deadline=None)
@given(settings_of_a_layer(), st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
def test_a_convolution_is_its_matrix(drawn, mode):
    dims, groups, stride, dilation, kernel, padding, _ = drawn
    layer = CONVOLUTIONS[dims - 1](
        4,
        8,
        kernel,
        stride,
        padding=padding,
        groups=groups,
        dilation=dilation,
        bias=False,
        padding_mode=mode,
    ).double()
    x = torch.randn(2, 4, *(8,) * dims, dtype=torch.double)
    output = layer(x)
    torch.testing.assert_close(product(layer, x, output), output)
    matrix = to_matrix(layer.weight, layer)
    assert torch.equal(from_matrix(matrix, layer, layer.weight.shape), layer.weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_paddings(padding):
    layer = nn.Conv2d(2, 3, (5, 3), padding=padding, bias=False)
    x = torch.randn(2, 2, 7, 7)
    torch.testing.assert_close(product(layer, x, layer(x)), layer(x))


def test_a_transposed_convolution_asked_for_a_size():
    layer = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1, bias=False)
    x = torch.randn(2, 2, 5, 5)
    output = layer(x, output_size=(11, 10))
    torch.testing.assert_close(product(layer, x, output), output)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2),
        nn.Conv1d(4, 4, 3, groups=4),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_energy_is_the_diagonal_of_the_gram_matrix(layer, batched):
    x = torch.randn(3, 4, *(6,) * len(layer.kernel_size))
    x = x if batched else x[0]
    inputs = LayerCall(layer, (), {"input": x}, layer(x)).inputs("weight")
    gram = inputs.gram(10**9, seed=0)
    torch.testing.assert_close(inputs.energy(), gram.diagonal(dim1=1, dim2=2))


def test_a_sampled_gram_matrix_is_right_on_average_and_leaves_the_random_state():
    layer, x = nn.Conv2d(2, 3, 2), torch.randn(4, 2, 6, 6)
    inputs = LayerCall(layer, (x,), {}, layer(x)).inputs("weight")
    whole = inputs.gram(10**9, seed=0)
    state = torch.get_rng_state()
    mean = torch.stack([inputs.gram(20, seed=seed) for seed in range(2000)]).mean(0)
    assert torch.equal(state, torch.get_rng_state())
    assert (mean - whole).norm() < 0.05 * whole.norm()
    assert torch.equal(inputs.gram(20, seed=1), inputs.gram(20, seed=1))


def test_other_layers_have_no_windows():
    with pytest.raises(TypeError, match="Linear is no convolution"):
        windows(nn.Linear(2, 2), torch.zeros(1, 2))
