"""Units of every kind of layer, against loops and torch.nn.utils.prune."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_compress.pruning.granularity import Layout, layout_of, make_granularity
from lightning_compress.pruning.masks import layer_unit_masks


def layers():
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(12, 6),
        "conv": nn.Conv2d(4, 6, 3),
        "grouped": nn.Conv2d(8, 6, 3, groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "transposed": nn.ConvTranspose2d(8, 6, 4),
        "grouped_transposed": nn.ConvTranspose2d(8, 6, 3, groups=2),
    }


def mask_of(granularity, weight, layout, sparsity, *, closed=None, signed=False, scores=None):
    scores = weight.detach().abs() if scores is None else scores
    kind = make_granularity(granularity)
    unit = kind.units(scores, layout, closed=closed, signed=signed)
    return unit.spread(layer_unit_masks([unit], sparsity / kind.limit, [0])[0])


def connections(layer):
    """(output, input) of each entry of a weight, by the definition of the layer."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    places = {}
    for first, second in itertools.product(*map(range, weight.shape[:2])):
        if transposed:
            group = first // (weight.shape[0] // groups)
            places[first, second] = (group * weight.shape[1] + second, first)
        else:
            group = first // (weight.shape[0] // groups)
            places[first, second] = (first, group * weight.shape[1] + second)
    return places


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("granularity", ["row", "channel", "filter", "column"])
def test_output_and_input_units_equal_a_loop_over_connections(name, granularity):
    layer = layers()[name]
    side = 1 if granularity == "column" else 0
    norms = {}
    for place, ends in connections(layer).items():
        entry = layer.weight.detach()[place].double().square().sum()
        norms[ends[side]] = norms.get(ends[side], 0) + entry
    gone = sorted(norms, key=norms.get)[: round(0.5 * len(norms))]
    expected = torch.ones_like(layer.weight, dtype=torch.bool)
    for place, ends in connections(layer).items():
        expected[place] = ends[side] not in gone
    layout = layout_of(nn.Sequential(layer), "0.weight")
    assert torch.equal(mask_of(granularity, layer.weight, layout, 0.5), expected)


@pytest.mark.parametrize(("name", "dim"), [("linear", 0), ("conv", 0), ("transposed", 1)])
def test_channels_equal_torch_ln_structured(name, dim):
    layer = layers()[name]
    layout = layout_of(nn.Sequential(layer), "0.weight")
    ours = mask_of("channel", layer.weight, layout, 0.5)
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=dim)
    assert torch.equal(ours, layer.weight_mask.bool())


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("size", [(2, 2), (4, 5), (1, 3), (100, 100)])
def test_blocks_equal_a_loop_over_the_matrix(name, size):
    layer = layers()[name]
    layout = layout_of(nn.Sequential(layer), "0.weight")
    matrix = layout.canonical(layer.weight.detach())
    shape = matrix.shape
    matrix = matrix.reshape(shape[0] * shape[1], -1)
    blocks = [
        (slice(top, top + size[0]), slice(left, left + size[1]))
        for top in range(0, matrix.shape[0], size[0])
        for left in range(0, matrix.shape[1], size[1])
    ]
    order = sorted(blocks, key=lambda block: matrix[block].double().square().sum())
    expected = torch.ones_like(matrix, dtype=torch.bool)
    sizes = [matrix[block].numel() for block in order]
    if len(set(sizes)) == 1:
        count = round(0.4 * len(blocks))
    else:  # those at the edges are smaller: weights are counted
        wanted = round(0.4 * matrix.numel())
        count = min(range(len(sizes) + 1), key=lambda count: abs(sum(sizes[:count]) - wanted))
    for block in order[:count]:
        expected[block] = False
    got = mask_of(("block", size), layer.weight, layout, 0.4)
    assert torch.equal(layout.canonical(got).reshape(matrix.shape), expected)


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2", "2:3"])
def test_n_of_m_equals_brute_force_along_the_inputs(name, pattern):
    layer = layers()[name]
    n, m = map(int, pattern.split(":"))
    weight = layer.weight.detach()
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    inputs = weight.shape[axis]
    groups = getattr(layer, "groups", 1) if axis == 0 else 1  # a group's own inputs
    expected = torch.ones_like(weight, dtype=torch.bool)
    lines = torch.ones_like(weight.select(axis, 0)).nonzero().tolist()
    for line in lines:
        for group in range(groups):
            own = range(group * inputs // groups, (group + 1) * inputs // groups)
            for start in range(0, len(own) - m + 1, m):
                places = []
                for at in own[start : start + m]:
                    place = list(line)
                    place.insert(axis, at)
                    places.append(tuple(place))
                places.sort(key=lambda place: float(weight[place].abs()))
                for place in places[: m - n]:
                    expected[place] = False
    layout = layout_of(nn.Sequential(layer), "0.weight")
    assert torch.equal(mask_of(pattern, weight, layout, 1 - n / m), expected)


@given(st.floats(0, 1), st.integers(0, 1000), st.sampled_from([(2, 4), (1, 4), (4, 8)]))
@settings(deadline=None)
def test_on_the_way_n_of_m_prunes_the_lowest_of_what_goes_at_last(part, seed, pattern):
    n, m = pattern
    limit = 1 - n / m
    scores = torch.randint(0, 9, (6, 19), generator=torch.Generator().manual_seed(seed)).float()
    layout = Layout()
    final = mask_of(f"{n}:{m}", scores, layout, limit)
    early = mask_of(f"{n}:{m}", scores, layout, part * limit)
    goes = ~final
    assert not (~early & final).any()
    assert int((~early).sum()) == round(part * int(goes.sum()))
    if (~early).any() and (early & goes).any():
        assert scores[~early].max() <= scores[early & goes].min()
    kept = early[:, : 19 // m * m].reshape(6, -1, m).sum(-1)
    assert (kept >= n).all()
    # What is closed stays closed, whatever it would score now.
    other = torch.rand(6, 19, generator=torch.Generator().manual_seed(seed + 1))
    later = mask_of(f"{n}:{m}", other, layout, limit, closed=~early, scores=other)
    assert not (later & ~early).any()
    assert (later[:, : 19 // m * m].reshape(6, -1, m).sum(-1) == n).all()


@given(
    st.sampled_from(["row", "column", "channel", ("block", (2, 3)), "unstructured"]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_the_number_of_units_is_exact_and_closed_ones_go_first(granularity, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (6, 4, 3, 3), generator=generator).float()
    layout, kind = Layout(), make_granularity(granularity)
    unit = kind.units(scores, layout, closed=None, signed=False)
    mask = unit.spread(layer_unit_masks([unit], sparsity, [0])[0])
    again = kind.units(torch.rand_like(scores), layout, closed=~mask, signed=False)
    assert int(again.closed.sum()) == round(sparsity * unit.capacity)
    wider = again.spread(layer_unit_masks([again], min(1.0, sparsity + 0.2), [0])[0])
    assert not (wider & ~mask).any()


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.LSTM, 4), (nn.RNN, 1)])
def test_a_recurrent_channel_is_a_unit_with_all_its_gates(kind, gates):
    module = nn.ModuleDict({"cell": kind(5, 4, bidirectional=True)})
    layout = layout_of(module, "cell.weight_ih_l0_reverse")
    assert layout.gates == gates
    weight = module["cell"].weight_ih_l0_reverse
    mask = mask_of("channel", weight, layout, 0.5)
    by_gate = mask.view(gates, 4, 5)
    norms = weight.detach().view(gates, 4, 5).square().sum((0, 2))
    for unit in range(4):
        assert by_gate[:, unit].all() == (norms[unit] > norms.median())
        assert by_gate[:, unit].any() == by_gate[:, unit].all()


def test_scores_that_may_be_negative_are_summed():
    scores = torch.tensor([[-3.0, -3.0], [1.0, 1.0], [2.0, 0.5]])
    weight = torch.ones(3, 2)
    mask = mask_of("row", weight, Layout(), 1 / 3, signed=True, scores=scores)
    assert mask.all(1).tolist() == [False, True, True]
    mask = mask_of("row", weight, Layout(), 1 / 3, signed=False, scores=scores)
    assert mask.all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_of_tiny_and_huge_scores_still_sort(size):
    scores = torch.tensor([[3.0, 3], [1, 1], [2, 2]]) * size
    assert mask_of("row", scores, Layout(), 1 / 3).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_layouts_see_through_parametrizations(wrap):
    module = nn.Sequential(wrap(nn.ConvTranspose2d(4, 6, 3, groups=2)))
    paths = [name for name, one in module.named_parameters() if one.shape == (4, 3, 3, 3)]
    assert layout_of(module, paths[0]) == Layout(transposed=True, groups=2)


def test_what_n_of_m_leaves_dense_is_named():
    shapes = {"a": torch.Size([3, 6]), "b": torch.Size([8, 3, 3, 3]), "c": torch.Size([2, 8])}
    layouts = {"a": Layout(), "b": Layout(transposed=True), "c": Layout()}
    (note,) = make_granularity("2:4").rest(shapes, layouts)
    assert "a (2 of 6 inputs)" in note
    assert "b" not in note.split("dense:")[1]
    assert make_granularity("row").rest(shapes, layouts) == []


@pytest.mark.parametrize(
    "given", ["dust", "4:2", "0:4", "4:4", ("block", 3), ("block", (0, 4)), ("row", (1, 1)), 7]
)
def test_unknown_granularities_are_named(given):
    with pytest.raises(ValueError, match="granularity="):
        make_granularity(given)
