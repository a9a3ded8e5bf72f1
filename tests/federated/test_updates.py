"""The bytes of an update: what arrives is what was meant, and nothing else is let in."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lightning_compress.federated.updates import (
    UpdateCodec,
    UpdateError,
    add_update,
    decode_update,
    digest,
    encode_update,
    kept_by_magnitude,
    rate_distortion_steps,
)
from lightning_compress.lcz.memory import tensors_to_bytes


def net(seed=0, width=24):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
    ).state_dict()


def narrow():
    return encode_update(trained(net(width=16)), net(width=16), UpdateCodec()).payload


def halved(old):
    return encode_update(trained(old), old, UpdateCodec.plain("fp16")).payload


def trained(reference, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: one + 0.01 * torch.randn(one.shape, generator=generator)
        if one.is_floating_point()
        else one + 7
        for name, one in reference.items()
    }


CODECS = [
    UpdateCodec(relative_step=1.0),
    UpdateCodec(density=1.0, lmbda=0.3, relative_step=1.0),
    UpdateCodec(density=0.2, scope="layer", relative_step=0.25, bits=4),
    UpdateCodec(others="fp16", rules={"0.*": "eight_bits", "3.bias": "home"}),
    UpdateCodec.plain("fp32"),
    UpdateCodec.plain("fp16"),
]


@pytest.mark.parametrize("codec", CODECS)
def test_the_receiver_decodes_the_very_bits_that_the_sender_counts_on(codec):
    old = net()
    new = trained(old)
    sent = encode_update(new, old, codec)
    decoded = decode_update(sent.payload, old, codec)
    assert decoded.keys() == sent.decoded.keys() == codec.methods(old).keys()
    for name, one in decoded.items():
        assert one.dtype == torch.float32
        assert torch.equal(one.view(torch.int32), sent.decoded[name].view(torch.int32)), name
    assert digest(add_update(old, decoded)) == digest(add_update(old, sent.decoded))


@pytest.mark.parametrize("codec", [one for one in CODECS if one.error_feedback])
def test_what_is_not_sent_is_not_lost(codec):
    """Decoded and residual are the difference; after many rounds all of it has arrived."""
    old = net()
    new = trained(old)
    sent = encode_update(new, old, codec)
    for name in sent.decoded:
        torch.testing.assert_close(sent.decoded[name] + sent.residual[name], new[name] - old[name])
    receiver, residual = old, {}
    for _ in range(60):
        # A client that stands at `new` and meets the same global model each time.
        one = encode_update(new, receiver, codec, residual)
        receiver = add_update(receiver, one.decoded)
    first, last = ((new["0.weight"] - at["0.weight"]).norm() for at in (old, receiver))
    assert last < 0.05 * first


def test_error_feedback_sends_small_steady_differences_in_the_end():
    old = {"w": torch.zeros(10, 10)}
    drift = {"w": torch.full((10, 10), 0.01)}
    drift["w"][0] = 1.0
    codec = UpdateCodec(density=0.1, relative_step=1.0)
    residual, total = {}, torch.zeros(10, 10)
    for _ in range(400):
        sent = encode_update(drift, old, codec, residual)
        residual, total = sent.residual, total + sent.decoded["w"]
    torch.testing.assert_close(total + residual["w"], 400 * drift["w"], rtol=1e-3, atol=1e-3)
    assert (total != 0).all()
    without = encode_update(drift, old, UpdateCodec(density=0.1, error_feedback=False))
    assert without.residual == {}


def test_differences_of_one_size_are_sent():
    old, new = {"w": torch.zeros(4, 4)}, {"w": torch.full((4, 4), 0.1)}
    assert encode_update(new, old, UpdateCodec(density=1.0)).decoded["w"].all()


def test_exactly_so_many_are_kept_and_they_are_the_largest():
    tensors = {"a": torch.ones(7, 3), "b": torch.linspace(-2, 2, 40).reshape(5, 8)}
    kept = kept_by_magnitude(tensors, 0.25)
    flat = np.concatenate([one.numpy().ravel() for one in tensors.values()])
    taken = np.concatenate([one.numpy().ravel() for one in kept.values()])
    assert np.count_nonzero(taken) == math.ceil(0.25 * len(flat))
    assert np.sort(np.abs(taken))[-16:].tolist() == np.sort(np.abs(flat))[-16:].tolist()
    layers = kept_by_magnitude(tensors, 0.25, "layer")
    assert [int(torch.count_nonzero(one)) for one in layers.values()] == [6, 10]


def test_rate_and_distortion_beat_rounding_at_equal_entropy():
    values = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    best = {}
    for name, lmbda in (("rounded", 0.0), ("chosen", 0.25)):
        for step in torch.linspace(0.5, 4, 36).tolist():
            steps = (
                rate_distortion_steps(values / step, lmbda) if lmbda else (values / step).round()
            )
            _, counts = steps.unique(return_counts=True)
            share = counts / counts.sum()
            bits = -(share * share.log2()).sum().item()
            error = (steps * step - values).square().mean().item()
            if abs(bits - 0.8) < 0.1:
                best[name] = min(best.get(name, math.inf), error * 4**bits)
    assert best["chosen"] < 0.97 * best["rounded"]


def test_a_pruned_model_stays_pruned():
    old = net()
    old["0.weight"][:, ::2] = 0
    codec = UpdateCodec(mask=True, density=1.0, relative_step=0.5)
    after = add_update(old, encode_update(trained(old), old, codec).decoded)
    assert (after["0.weight"][:, ::2] == 0).all()
    assert (after["3.weight"] != old["3.weight"]).float().mean() > 0.5


def test_counters_and_what_is_to_stay_at_home_are_not_sent():
    old = net()
    codec = UpdateCodec(rules={"*running_*": "home"})
    sent = encode_update(trained(old), old, codec)
    assert not any("running" in name or "tracked" in name for name in sent.decoded)
    after = add_update(old, sent.decoded)
    assert after.keys() == old.keys()
    assert after["1.num_batches_tracked"] == old["1.num_batches_tracked"]


def test_tied_weights_are_sent_once():
    torch.manual_seed(0)
    one = torch.randn(64, 64)
    apart = {"a": torch.zeros(64, 64), "b": torch.zeros(64, 64)}
    tied = encode_update({"a": one, "b": one.clone()}, apart, UpdateCodec(density=1.0))
    alone = encode_update({"a": one}, {"a": apart["a"]}, UpdateCodec(density=1.0))
    assert len(tied.payload) < 1.1 * len(alone.payload)
    assert torch.equal(*decode_update(tied.payload, apart, UpdateCodec()).values())


def test_the_bytes_are_few():
    """At 5 % of the differences, 50 times fewer than fp32 with everything counted."""
    torch.manual_seed(0)
    old = {"w": torch.zeros(400, 250), "b": torch.zeros(250)}
    new = {"w": torch.randn(400, 250), "b": torch.randn(250)}
    payload = encode_update(new, old, UpdateCodec(density=0.05, relative_step=1.0)).payload
    assert 4 * (400 * 250 + 250) / len(payload) > 50


def test_nothing_changed_is_sent_as_nothing():
    old = net()
    sent = encode_update(old, old, UpdateCodec())
    assert all((one == 0).all() for one in sent.decoded.values())
    assert digest(add_update(old, sent.decoded)) == digest(old)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_refused(data):
    old = net()
    payload = bytearray(encode_update(trained(old), old, UpdateCodec()).payload)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(payload) - 1))
        payload[place] ^= data.draw(st.integers(1, 255))
    else:
        payload = payload[: data.draw(st.integers(0, len(payload) - 1))]
    with pytest.raises(UpdateError, match="damaged"):
        decode_update(bytes(payload), old, UpdateCodec())


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        (lambda old: tensors_to_bytes({"w": torch.zeros(3)}), "foreign"),
        (halved, "foreign"),
        (lambda old: narrow(), "foreign"),
        (lambda old: b"\0" * 10_000_000, "oversized.*10000000"),
        (lambda old: _with(old, float("nan")), "not finite.*'3.bias'"),
        (lambda old: _with(old, float("inf")), "not finite.*'3.bias'"),
        (lambda old: b"", "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_update_of_this_model_is_refused(payload, what):
    old = net()
    with pytest.raises(UpdateError, match=what):
        decode_update(payload(old), old, UpdateCodec())


def _with(old, value):
    sent = dict(encode_update(trained(old), old, UpdateCodec()).decoded)
    sent["3.bias"] = torch.tensor([0.0, value, 0.0, 1.0])
    return tensors_to_bytes(sent)


def test_a_client_that_diverged_says_so_itself():
    old = net()
    new = trained(old)
    new["3.weight"][0, 0] = float("nan")
    with pytest.raises(UpdateError, match=r"not finite: tensor '3.weight'.*diverged"):
        encode_update(new, old, UpdateCodec())


def test_another_model_is_named():
    with pytest.raises(ValueError, match=r"'0.weight' is \(16, 8\), not \(24, 8\)"):
        encode_update(net(width=16), net(), UpdateCodec())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"relative_step": -1.0}, "relative_step=-1.0"),
        ({"relative_step": 2.0}, "relative_step=2.0.*below 2"),
        ({"lmbda": -0.1}, "lmbda=-0.1"),
        ({"bits": 9}, "bits=9.*2 to 8"),
        ({"scope": "all"}, "scope='all'.*global"),
        ({"others": "int8"}, "others='int8'.*eight_bits"),
        ({"rules": {"a.*": "no"}}, r"a\.\*='no'.*home"),
        ({"codec": "zip"}, "codec='zip'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UpdateCodec(**arguments)
