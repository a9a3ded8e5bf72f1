"""Codebook grids against a search over all centres."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.grids import CodebookGrid


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
