"""The context coder's encoder: what it fits, on what it fits it, and what it takes."""

import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lightning_compress.lcz import context, context_fitting, context_model
from lightning_compress.lcz.context_fitting import TwoPassModel
from lightning_compress.lcz.context_model import WEIGHT_ONE, AdaptiveBitModel, fit_weights


def sparse(shape, seed=0):
    """Symbols at 90 % zeros whose rows and columns have densities of their own."""
    rng = np.random.default_rng(seed)
    logit = np.full(shape, -2.5)
    for axis in range(2):
        along = [1] * len(shape)
        along[axis] = -1
        logit = logit + rng.standard_normal(shape[axis]).reshape(along)
    steps = np.where(rng.random(shape) < 1 / (1 + np.exp(-logit)), rng.integers(1, 15, shape), 0)
    return steps.astype(np.uint16).reshape(-1)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_least_code_length(seed):
    rng = np.random.default_rng(seed)
    features = rng.integers(-800, 800, (4, 6000)) // np.array([[1], [2], [1], [3]])
    offset = rng.integers(-900, 300, 6000)
    nats = np.log(2) / 256
    truth = np.array([0.9, 0.3, 0.0, -0.4])
    bits = rng.random(6000) < 1 / (1 + np.exp(-nats * (offset + truth @ features)))

    def cost(weights):
        logits = nats * (offset + weights @ features)
        return np.logaddexp(0, np.where(bits, -logits, logits)).sum()

    best = minimize(lambda w: cost(w) + w @ w / 2, np.zeros(4), tol=1e-8).x
    weights, saved = fit_weights(features, offset, bits)
    assert np.abs(weights - best * WEIGHT_ONE).max() < 0.51
    expected = (cost(np.zeros(4)) - cost(weights / WEIGHT_ONE)) / np.log(2)
    assert saved == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_nodes", [False, True])
def test_a_sample_has_the_logits_that_all_positions_have(with_nodes):
    shape = (20, 30, 9)
    bits = sparse(shape) > 0
    view = context_model.View(*shape)
    at, ends = view.scan_order(0, len(bits))
    nodes = at % 3 if with_nodes else None

    def plane():
        return AdaptiveBitModel(view, 3 if with_nodes else 1)

    whole = context_fitting._sampled_features(plane(), at, ends, bits[at], nodes, 1)
    assert whole[1].any(axis=1).all()
    for step in (2, 7, 1000):
        some = context_fitting._sampled_features(plane(), at, ends, bits[at], nodes, step)
        assert (some[0] == whole[0][::step]).all()
        assert (some[1] == whole[1][:, ::step]).all()


def test_keys_are_indices_along_the_axes():
    view = context_model.View(8, 6, 4)
    positions = np.random.default_rng(0).permutation(8 * 6 * 4)
    index = np.unravel_index(positions, view.shape)
    assert view.context_axes == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    keys = list(view.keys(positions, range(6)))
    for table, subset in enumerate(view.context_axes):
        lengths = [view.shape[axis] for axis in subset]
        expected = np.ravel_multi_index([index[axis] for axis in subset], lengths)
        assert (keys[table] == expected).all()


@pytest.mark.parametrize("shape", [(36, 50), (50, 36), (50, 30)])
def test_a_view_is_chosen_by_what_its_tables_tell(shape):
    symbols = sparse(shape)
    told = {view.shape: 0.0 for view in context_model.candidate_views(shape)}
    some = symbols > 0
    for lengths in told:
        view = context_model.View(*lengths)
        ones = context_model._ones_by_context(some.reshape(lengths).astype(np.float32))
        for subset in view.context_axes:
            others = tuple(axis for axis in range(3) if axis not in subset)
            assert (ones[subset] == some.reshape(lengths).sum(others)).all()
        told[lengths] = context_model._bits_saved(ones, view)
    assert context_model.best_view(symbols, shape).shape == max(told, key=told.get)


def test_a_matrix_of_channels_times_places_is_seen_as_such():
    rng = np.random.default_rng(0)
    dense = rng.random((1, 25, 1)) ** 4  # the place in a picture of 5 x 5 tells the density
    symbols = (rng.random((40, 25, 30)) < dense).astype(np.uint16).reshape(-1)
    assert context_model.best_view(symbols, (1000, 30)).shape == (40, 25, 30)


def test_tables_at_once_and_one_by_one_give_one_stream(monkeypatch):
    shape = (30, 40, 9)
    symbols = sparse(shape)
    streams = []
    monkeypatch.setattr(context, "TWO_PASS_LIMIT", 0)
    for at_once in (0, 1000, 1 << 30):
        monkeypatch.setattr(context_model, "_BATCH", at_once)
        streams.append(context.encode(symbols, shape))
        assert np.array_equal(context.decode(streams[-1], shape), symbols)
    assert len(set(streams)) == 1


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 17)),
    share=st.floats(0, 1),
    kinds=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_two_pass_model_equals_the_adaptive_model(shape, share, kinds, seed):
    rng = np.random.default_rng(seed)
    view = context_model.View(*shape)
    at, ends = view.scan_order(0, int(np.prod(shape)))
    kept, ends = context._set_positions(rng.random(len(at)) < rng.random(), ends)
    at = at[kept]
    if not len(at):
        return
    bits = rng.random(len(at)) < share * rng.random(shape[0])[at // (shape[1] * shape[2])]
    nodes = rng.integers(0, kinds, len(at)) if kinds > 1 else None
    two_pass = TwoPassModel(view, at, ends, bits, nodes, kinds)
    base, features = context_fitting._sampled_features(
        AdaptiveBitModel(view, kinds), at, ends, bits, nodes, 1
    )
    assert (two_pass.base == base).all()
    assert (two_pass.features() == features).all()


@pytest.mark.parametrize("shape", [(30, 40, 9), (7, 5, 4), (200, 300)])
def test_two_passes_and_scans_give_one_stream(shape, monkeypatch):
    symbols = sparse(shape)
    streams = []
    two_pass = mock.Mock(side_effect=TwoPassModel)
    monkeypatch.setattr(context, "TwoPassModel", two_pass)
    monkeypatch.setattr(context_fitting, "_SHORT", 0)
    for most in (0, 1 << 18):
        monkeypatch.setattr(context, "TWO_PASS_LIMIT", most)
        streams.append(context.encode(symbols, shape))
        assert two_pass.called == (most > 0)
        assert np.array_equal(context.decode(streams[-1], shape), symbols)
    assert streams[0] == streams[1]


def test_sums_of_two_pass_features_are_exact():
    rng = np.random.default_rng(0)
    features = rng.integers(-(1 << 14), 1 << 14, (6, 5000))
    weights = dict(enumerate(rng.integers(-128, 128, 6).tolist()))
    exact = (features * np.array(list(weights.values()))[:, None]).sum(0) // WEIGHT_ONE
    assert (context_fitting._weighted_sum(features.astype(np.float32), weights) == exact).all()


def test_memory_grows_with_the_tensor_and_not_faster():
    peaks = {}
    for rows in (200, 800):
        symbols = sparse((rows, 1000))
        tracemalloc.start()
        context.encode(symbols, (rows, 1000))
        peaks[rows] = tracemalloc.get_traced_memory()[1] / len(symbols)
        tracemalloc.stop()
    assert peaks[800] < 1.1 * peaks[200]
    assert peaks[800] < 64
