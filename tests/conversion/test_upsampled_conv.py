"""Convolutions behind nearest-neighbour upsampling, which multiply before it."""

import numpy as np
import onnx
import pytest
import torch
from exported import run, taps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_compress import compression_state, fake_quantized, quantize_static, quantize_weights
from lightning_compress.conversion.export import export_onnx
from lightning_compress.conversion.integer_weights import Summed
from lightning_compress.conversion.upsampled_conv import enlarged_as_conv
from lightning_compress.quantization.upsampled_conv import summed_taps

KERNELS = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None)  # the first call of torch takes its time
@given(kernel=KERNELS, factor=st.integers(2, 4), groups=st.sampled_from([1, 2]), data=st.data())
def test_it_is_upsampling_and_a_convolution(kernel, factor, groups, data):
    padding = tuple(data.draw(st.integers(0, size - 1)) for size in kernel)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.rand(2, 4, 5, 6, generator=generator)
    weight = torch.rand(6, 4 // groups, *kernel, generator=generator) - 0.5
    bias = torch.rand(6, generator=generator)
    large = functional.interpolate(x, scale_factor=factor)
    expected = functional.conv2d(large, weight, bias, padding=padding, groups=groups)
    rewritten = enlarged_as_conv(weight, factor=factor, padding=padding, groups=groups)
    got = rewritten(x, bias, groups)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@settings(deadline=None)  # the first call of torch takes its time
@given(kernel=KERNELS, factor=st.integers(2, 4), groups=st.sampled_from([1, 3]), data=st.data())
def test_the_kernel_comes_from_the_weight_and_back(kernel, factor, groups, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randint(-31, 32, (6, 2, *kernel), generator=generator, dtype=torch.int32)
    expected = enlarged_as_conv(weight, factor=factor, padding=(0, 0), groups=groups).weight
    layout = Summed(factor, kernel, groups)
    kernel_of_sums = layout.expand(weight.numpy())
    np.testing.assert_array_equal(kernel_of_sums, expected.numpy())
    np.testing.assert_array_equal(layout.weights(kernel_of_sums), weight.numpy())
    signs = np.where(np.arange(len(kernel_of_sums)) % 2, -1, 1).reshape(-1, 1, 1, 1)
    back = layout.weights(4 * np.abs(signs) * kernel_of_sums)
    np.testing.assert_array_equal(back, 4 * weight.numpy())


def test_a_kernel_that_is_no_sum_has_no_weight():
    layout = Summed(2, (3, 3), 1)
    kernel = layout.expand(np.ones((2, 1, 3, 3), np.int32))
    kernel[0, 0, 1, 1] += 1
    assert layout.weights(kernel) is None


@pytest.mark.parametrize("factor", [2, 3])
def test_as_many_weights_add_up_as_pixels_are_repeated(factor):
    sums = summed_taps(torch.ones(1, 1, 5, 5), factor)
    assert sums.max() == factor**2
    assert sums.sum() == 25 * factor**2


def drawer(*, groups=1, factor=2, kernel=3, norm=True):
    """Latents (N, 6) -> pictures, by upsampling and convolving."""
    return nn.Sequential(
        nn.Linear(6, 8 * 9),
        nn.Unflatten(1, (8, 3, 3)),
        nn.ReLU(),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(8, 12, kernel, padding=kernel // 2, groups=groups, bias=not norm),
        nn.BatchNorm2d(12) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(12, 3, 3, padding=1),
        nn.Tanh(),
    )


def settled(module):
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, 6))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.weight[::2] *= -1
    return module.eval()


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "shape", [{}, {"groups": 2}, {"factor": 3}, {"kernel": 5}, {"norm": False}], ids=str
)
def test_without_trained_grids_all_of_them_multiply_before(shape, runtime, tmp_path):
    torch.manual_seed(0)
    module, batches = settled(drawer(**shape)), [torch.randn(32, 6) for _ in range(2)]
    info = export_onnx(
        module, tmp_path / "m.onnx", batches[0], int8=True, calibration=batches, runtime=runtime
    )
    size = -(-(shape.get("kernel", 3) + shape.get("factor", 2) - 1) // shape.get("factor", 2))
    assert taps(info.path) == [(size, size), (2, 2)]
    assert "Resize" not in kinds(info.path)
    assert info.int8_ops["QLinearConv"] == 2
    assert "sums" in info.weights["4.weight"]
    assert "min/max" in info.weights["0.weight"]
    assert info.parity["onnxruntime"].more < 0.003
    dense = export_onnx(module, tmp_path / "dense.onnx", batches[0])
    z = torch.randn(64, 6)
    away = np.abs(run(info.path, (z,))[0] - run(dense.path, (z,))[0])
    assert away.mean() < 0.02
    one = run(info.path, (z[:1],))[0]
    np.testing.assert_allclose(one, run(info.path, (z,))[0][:1], atol=1e-6)


@pytest.mark.parametrize(("bits", "before"), [(8, False), (6, True), (4, True)])
def test_trained_grids_stay_as_they_are(bits, before, tmp_path):
    torch.manual_seed(0)
    module, batches = settled(drawer()), [torch.randn(32, 6) for _ in range(2)]
    quantize_static(module, batches, weight_bits=4)
    quantize_weights(module, bits)  # without a look at what layers read
    weights = {name: one.clone() for name, one in module.named_parameters()}
    info = export_onnx(module, tmp_path / "m.onnx", batches[0], int8=True)
    assert taps(info.path)[0] == ((2, 2) if before else (3, 3))
    assert ("Resize" in kinds(info.path)) is False  # as moves of channels where it stays
    assert all("trained grid" in source for source in info.weights.values())
    for name, one in module.named_parameters():
        assert torch.equal(one, weights[name])
    grid = compression_state(module[-2]).activations[""].output
    z = torch.randn(64, 6)
    with torch.no_grad(), fake_quantized(module):
        expected = module(z).numpy()
    away = np.abs(run(info.path, (z,))[0] - expected) / float(grid.scale)
    assert (away > 1.01).mean() < 0.003
    assert (away < 0.02).mean() > 0.9


def test_the_file_holds_the_weights_and_not_their_sums(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 64, 3, padding=1),
    ).eval()
    sizes = {}
    for bits in (6, 4):
        batches = [torch.rand(4, 64, 4, 4)]
        quantize_static(module, batches, weight_bits=bits)
        info = export_onnx(module, tmp_path / "m.onnx", batches[0], int8=True)
        assert taps(info.path) == [(2, 2), (2, 2)]
        sizes[bits] = info.bytes
    whole = 2 * 64 * 64 * 9
    assert sizes[6] < whole + 12_000
    assert sizes[4] < whole / 2 + 12_000


class Skipping(nn.Module):
    """The enlarged picture is added again behind the convolution that reads it."""

    def __init__(self, *, shared: bool):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.last = None if shared else nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        large = functional.interpolate(x, scale_factor=2)
        last = self.first if self.last is None else self.last
        return last(functional.relu(self.first(large)) + large)


@pytest.mark.parametrize("shared", [False, True])
def test_other_readers_and_shared_weights_lose_nothing(shared, tmp_path):
    torch.manual_seed(0)
    module, batches = Skipping(shared=shared).eval(), [torch.rand(8, 4, 5, 5) for _ in range(2)]
    info = export_onnx(module, tmp_path / "m.onnx", batches[0], int8=True, calibration=batches)
    assert "Resize" in kinds(info.path)
    if shared:
        assert "min/max" in info.weights["first.weight"]
    dense = export_onnx(module, tmp_path / "dense.onnx", batches[0])
    x = batches[0]
    assert np.abs(run(info.path, (x,))[0] - run(dense.path, (x,))[0]).max() < 0.05


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 1)],  # as many multiplications
        [nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1, stride=2)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=2, dilation=2)],
        [nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(3, 4, 3, padding=1)],
        [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 4, 3, padding=1)],
        [nn.Upsample(size=(7, 7)), nn.Conv2d(3, 4, 3, padding=1)],  # not a whole factor
    ],
    ids=str,
)
def test_where_it_would_not_save_or_not_be_exact_it_stays(layers, tmp_path):
    torch.manual_seed(0)
    module, batches = nn.Sequential(*layers).eval(), [torch.rand(8, 3, 4, 4)]
    info = export_onnx(module, tmp_path / "m.onnx", batches[0], int8=True, calibration=batches)
    assert {source.split(",")[0] for source in info.weights.values()} == {"min/max range"}
    dense = export_onnx(module, tmp_path / "dense.onnx", batches[0])
    assert np.abs(run(info.path, (batches[0],))[0] - run(dense.path, (batches[0],))[0]).max() < 0.05
