"""Grids for the entropy coder: nothing clipped, sizes that are steered, and the rate's slope."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from lightning_compress import load_compressed, quantize_weights, save_compressed
from lightning_compress.grids import AffineGrid
from lightning_compress.quantization.entropy import (
    DeadZoneGrid,
    EntropyGrids,
    entropy_bits,
    predicted_bits,
    rate_slopes,
    steer,
)


def sparse(seed, *shape, keep=0.3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * (torch.rand(*shape, generator=generator) < keep)


@given(st.integers(0, 10_000), st.floats(0.05, 3.0), st.integers(2, 8), st.floats(0.5, 0.95))
def test_nothing_is_clipped_and_zeros_stay(seed, relative, bits, dead_zone):
    values = sparse(seed, 20, 9)
    quantizer = EntropyGrids(bits=bits, relative_step=relative, dead_zone=dead_zone)
    quantizer.start(values)
    grid = quantizer.grid(values)
    visible, step = grid.project(values), grid.scale.item()
    assert 2 <= grid.bits <= bits
    assert (visible[values == 0] == 0).all()
    assert (visible - values).abs().max() <= max(dead_zone, 0.5) * step * 1.0001
    assert torch.equal(grid.project(visible), visible)
    nonzero = values[values != 0]
    wanted = relative * nonzero.square().mean().sqrt().item()
    if quantizer.raised:
        assert step > wanted
        assert round(values.abs().max().item() / step) == 2 ** (bits - 1) - 1
    else:
        assert step == pytest.approx(wanted, rel=1e-5)


def test_a_dead_zone_makes_zeros_of_what_it_covers_and_nothing_else():
    values = torch.linspace(-3, 3, 601)
    plain = AffineGrid(torch.ones(1), torch.zeros(1, dtype=torch.int32), 4, True, None)
    wide = DeadZoneGrid(plain.scale, plain.zero_point, 4, True, None, 0.8)
    inside = values.abs() < 0.8
    assert (wide.project(values)[inside] == 0).all()
    assert torch.equal(wide.project(values)[~inside], plain.project(values)[~inside])


def test_bits_equal_scipys_entropy():
    symbols = EntropyGrids(bits=8, relative_step=0.4).grid(sparse(1, 500)).quantize(sparse(1, 500))
    counts = symbols.unique(return_counts=True)[1].numpy()
    assert entropy_bits(symbols) == pytest.approx(500 * entropy(counts, base=2))
    assert entropy_bits(torch.empty(0)) == 0.0


@pytest.mark.parametrize("bits", [0.9, 1.5, 3.0])
def test_one_step_serves_all_weights_and_meets_the_target(bits):
    values = [sparse(1, 40, 50), 7 * sparse(2, 3000)]
    quantizers = [EntropyGrids(bits=8, relative_step=0.5) for _ in values]
    found = steer(quantizers, values, bits * 5000)
    assert found == pytest.approx(bits * 5000, rel=0.02)
    assert found == sum(map(predicted_bits, quantizers, values))
    assert quantizers[0].relative_step == quantizers[1].relative_step


def test_a_target_out_of_reach_gives_the_nearest_step():
    quantizer = EntropyGrids(bits=8, relative_step=0.5)
    assert steer([quantizer], [sparse(1, 500)], 20 * 500) < 10 * 500
    assert quantizer.relative_step == pytest.approx(0.01, rel=0.02)


def test_a_frozen_step_no_longer_follows_the_weights():
    values = sparse(3, 400)
    quantizer = EntropyGrids(bits=8, relative_step=0.5)
    quantizer.freeze(values)
    assert torch.equal(quantizer.grid(0.5 * values).scale, quantizer.grid(values).scale)
    quantizer.thaw()
    assert quantizer.grid(0.5 * values).scale == pytest.approx(
        0.5 * quantizer.grid(values).scale.item()
    )


def test_the_rates_slope_is_a_difference_of_code_lengths():
    symbols = torch.tensor([0] * 60 + [1, -1] * 10 + [2] * 5 + [-3] * 2)
    counts = {0: 60.5, 1: 20.5 / 2, 2: 5.5 / 2, 3: 2.5 / 2}
    total = sum(counts.values())
    length = {size: -math.log2(count / total) for size, count in counts.items()}
    slope = rate_slopes(torch.bincount(symbols + 255, minlength=511))[symbols + 255] / 0.2
    assert (slope[:60] == 0).all()
    assert slope[60].item() == pytest.approx((length[2] - length[0]) / 2 / 0.2, rel=1e-5)
    assert slope[61] == -slope[60]
    assert slope[-1].item() == pytest.approx(-(length[3] - length[2]) / 2 / 0.2, rel=1e-5)


def test_following_the_rate_alone_makes_the_weights_cheaper():
    values = sparse(5, 4000, keep=0.5)
    quantizer = EntropyGrids(bits=8, relative_step=0.5, rate=1.0)
    step = quantizer.grid(values).scale
    quantizer.freeze(values)
    before = predicted_bits(quantizer, values)
    for _ in range(20):
        gradient = torch.zeros_like(values)
        quantizer.gradient(gradient, values)
        values = values - 0.05 * step * gradient * step
    assert predicted_bits(quantizer, values) < 0.9 * before


def test_an_entropy_grid_lives_in_the_file(tmp_path):
    torch.manual_seed(0)
    layer, fresh = torch.nn.Linear(40, 50), torch.nn.Linear(40, 50)
    quantize_weights(layer, scheme="entropy", step=0.8)
    info = save_compressed(layer, tmp_path / "layer.lcz")
    assert info.per_tensor["weight"].kind == "grid"
    load_compressed(tmp_path / "layer.lcz", fresh)
    assert torch.equal(fresh.weight, layer.weight)


def test_a_grid_counts_its_bits_when_asked_and_copies_and_pickles():
    values = torch.linspace(-1, 1, 101)
    grid = EntropyGrids(bits=8, relative_step=0.5).grid(values)
    assert "bits" not in vars(grid)
    shown = grid.project(values)
    others = [copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), grid]
    for one in others:
        assert one.bits == 3  # steps from -3 to 3
        assert torch.equal(one.project(values), shown)
    with pytest.raises(AttributeError, match="'more'"):
        _ = grid.more
