"""Masks against sorting by hand, to the exact count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.pruning import masks as masks_module
from lightning_compress.pruning.masks import global_masks, pack_mask, unpack_mask

scores_lists = st.lists(
    st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, 1.0, float("inf"), -float("inf")]),
            st.floats(width=32, allow_nan=False),
        ),
        max_size=30,
    ),
    min_size=1,
    max_size=4,
).filter(lambda lists: any(lists))


@given(scores_lists, st.floats(0, 1))
def test_global_masks_equal_a_stable_sort(lists, sparsity):
    scores = [torch.tensor(values, dtype=torch.float32) for values in lists]
    got = torch.cat(global_masks(scores, sparsity))
    flat = torch.cat(scores).numpy() + 0.0
    expected = np.ones(flat.size, dtype=bool)
    expected[np.argsort(flat, kind="stable")[: round(sparsity * flat.size)]] = False
    assert got.numpy().tolist() == expected.tolist()


def test_chunks_join_without_a_seam(monkeypatch):
    scores = [torch.randint(0, 5, (37,)).float(), torch.randint(0, 5, (3, 11)).float()]
    whole = global_masks(scores, 0.6)
    monkeypatch.setattr(masks_module, "_CHUNK", 7)
    for one, other in zip(whole, global_masks(scores, 0.6), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_ties_and_zero_layers_give_the_exact_count(sparsity):
    scores = [torch.zeros(100, 10), torch.ones(10, 7)]
    pruned = sum(int((~mask).sum()) for mask in global_masks(scores, sparsity))
    assert pruned == round(sparsity * 1070)
    for score in scores:
        (mask,) = global_masks([score], sparsity)
        assert int((~mask).sum()) == round(sparsity * score.numel())


def test_matches_torch_prune_global_unstructured():
    from torch.nn.utils import prune

    layers = [torch.nn.Linear(13, 17), torch.nn.Conv2d(3, 5, 3)]
    ours = global_masks([layer.weight.detach().abs() for layer in layers], 0.37)
    parameters = [(layer, "weight") for layer in layers]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.37)
    for layer, mask in zip(layers, ours, strict=True):
        assert torch.equal(layer.weight_mask.bool(), mask)


def test_non_contiguous_and_half_precision_scores():
    score = torch.randn(8, 6).t()
    expected = global_masks([score.contiguous()], 0.5)[0]
    assert torch.equal(global_masks([score], 0.5)[0], expected)
    assert int((~global_masks([score.bfloat16()], 0.5)[0]).sum()) == 24


def test_nan_scores_and_bad_sparsity_raise():
    with pytest.raises(ValueError, match="NaN"):
        global_masks([torch.tensor([1.0, float("nan")])], 0.5)
    with pytest.raises(ValueError, match=r"sparsity=1\.5"):
        global_masks([torch.ones(2)], 1.5)


@given(st.lists(st.booleans(), max_size=40))
def test_packed_masks_match_numpy_and_return(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool)).tolist()
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_packed_mask_of_the_wrong_size_raises():
    with pytest.raises(ValueError, match="2 bytes cannot hold"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (3,))
