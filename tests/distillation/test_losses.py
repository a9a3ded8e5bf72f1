"""Each loss against an independent reference, and the properties that all must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, rel_entr, softmax
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from lightning_compress.distillation import losses
from lightning_compress.distillation.losses import step_kl


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 4, 4)])
def test_mse_and_l1_are_means_over_all_elements(shape):
    ours, theirs = draw(*shape), draw(*shape, seed=1)
    difference = ours.numpy() - theirs.numpy()
    assert losses.mse(ours, theirs).item() == pytest.approx(np.mean(difference**2))
    assert losses.l1(ours, theirs).item() == pytest.approx(np.mean(np.abs(difference)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_and_cross_entropy_with_temperature(temperature):
    ours, theirs = draw(5, 7), draw(5, 7, seed=1)
    p, q = (softmax(x.numpy() / temperature, axis=1) for x in (theirs, ours))
    kl = temperature**2 * rel_entr(p, q).sum(1).mean()
    cross = temperature**2 * -(p * np.log(q)).sum(1).mean()
    assert losses.kl_divergence(ours, theirs, temperature=temperature).item() == pytest.approx(kl)
    assert losses.cross_entropy(ours, theirs, temperature=temperature).item() == pytest.approx(
        cross
    )


def test_kl_and_cross_entropy_have_one_gradient():
    ours, theirs = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    both = (losses.kl_divergence, losses.cross_entropy)
    grads = [torch.autograd.grad(f(ours, theirs, temperature=3.0), ours)[0] for f in both]
    torch.testing.assert_close(*grads)


def test_the_square_of_the_temperature_keeps_the_gradient_near_that_of_matched_logits():
    # Hinton et al., equation 4: for high T and zero-mean logits it is (student - teacher) / N.
    ours, theirs = draw(1, 7, scale=0.1), draw(1, 7, seed=1, scale=0.1)
    ours = (ours - ours.mean()).requires_grad_()
    loss = losses.kl_divergence(ours, theirs - theirs.mean(), temperature=100.0)
    (gradient,) = torch.autograd.grad(loss, ours)
    expected = (ours.detach() - theirs + theirs.mean()) / 7
    torch.testing.assert_close(gradient, expected, rtol=0.01, atol=1e-5)


def test_classes_may_lie_along_another_axis():
    ours, theirs = draw(2, 5, 3, 3), draw(2, 5, 3, 3, seed=1)
    rows = (x.movedim(1, -1).reshape(-1, 5) for x in (ours, theirs))
    expected = losses.kl_divergence(*rows)
    torch.testing.assert_close(losses.kl_divergence(ours, theirs, dim=1), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_bernoulli_kl_sums_over_pixels(temperature):
    ours, theirs = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    sides = [Bernoulli(logits=x / temperature) for x in (theirs, ours)]
    expected = temperature**2 * kl_divergence(*sides).flatten(1).sum(1).mean()
    found = losses.bernoulli_kl(ours, theirs, temperature=temperature)
    torch.testing.assert_close(found, expected)


def test_bernoulli_kl_stays_finite_at_large_logits():
    ours = torch.tensor([[90.0, -90.0]], requires_grad=True)
    loss = losses.bernoulli_kl(ours, -ours.detach())
    loss.backward()
    assert loss.item() == pytest.approx(180.0)
    expected = expit([90, -90]) - expit([-90, 90])
    np.testing.assert_allclose(ours.grad[0].numpy(), expected, atol=1e-6)


def test_gaussian_kl_is_that_of_the_teacher_from_the_student():
    ours, theirs = ((draw(4, 3, seed=s), draw(4, 3, seed=s + 1, scale=0.5)) for s in (0, 2))
    sides = [Normal(mu, (0.5 * logvar).exp()) for mu, logvar in (theirs, ours)]
    expected = kl_divergence(*sides).sum(1).mean()
    torch.testing.assert_close(losses.gaussian_kl(ours, theirs), expected)


def test_step_kl_counts_the_steps_that_are_kept():
    ours, theirs = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    steps = kl_divergence(Categorical(logits=theirs), Categorical(logits=ours))
    expected = (steps[0, 0] + steps[0, 1] + steps[1, 0]) / 2
    torch.testing.assert_close(step_kl(ours, theirs, keep=keep), expected)
    torch.testing.assert_close(step_kl(ours, theirs), steps.sum(1).mean())


def attention_by_loops(features):
    maps = []
    for example in features.numpy():
        flat = (example**2).mean(0).reshape(-1)
        maps.append(flat / math.sqrt((flat**2).sum()))
    return np.stack(maps)


def test_attention_transfer():
    ours, theirs = draw(3, 2, 4, 5), draw(3, 6, 4, 5, seed=1)
    expected = np.mean((attention_by_loops(ours) - attention_by_loops(theirs)) ** 2)
    assert losses.attention_transfer(ours, theirs).item() == pytest.approx(expected)


def test_similarity_preserving():
    ours, theirs = draw(4, 2, 3), draw(4, 5, seed=1)
    matrices = []
    for features in (ours, theirs):
        rows = features.numpy().reshape(4, -1)
        gram = np.array([[float(a @ b) for b in rows] for a in rows])
        matrices.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = np.linalg.norm(matrices[0] - matrices[1], "fro") ** 2 / 16
    assert losses.similarity_preserving(ours, theirs).item() == pytest.approx(expected)


def test_linear_cka_by_centered_kernels():
    ours, theirs = draw(6, 3), draw(6, 2, 4, seed=1)
    center = np.eye(6) - np.full((6, 6), 1 / 6)
    kernels = [center @ (r @ r.T) @ center for r in (ours.numpy(), theirs.numpy().reshape(6, -1))]
    hsic = [
        np.trace(a @ b) for a, b in ((0, 1), (0, 0), (1, 1)) for a, b in [(kernels[a], kernels[b])]
    ]
    expected = 1 - hsic[0] / math.sqrt(hsic[1] * hsic[2])
    assert losses.linear_cka(ours, theirs).item() == pytest.approx(expected)


def test_linear_cka_sees_no_rotation_and_survives_constant_features():
    x = draw(8, 5)
    rotation, _ = np.linalg.qr(draw(5, 5, seed=1).numpy())
    assert losses.linear_cka(x, 3 * x @ torch.from_numpy(rotation)).item() == pytest.approx(0.0)
    assert torch.isfinite(losses.linear_cka(torch.ones(4, 2), torch.ones(4, 3)))


ON_OUTPUTS = [losses.mse, losses.l1, losses.kl_divergence, losses.bernoulli_kl]
ON_FEATURES = [
    losses.attention_transfer,
    losses.similarity_preserving,
    losses.linear_cka,
    step_kl,
]


@pytest.mark.parametrize("loss", [*ON_OUTPUTS, *ON_FEATURES], ids=lambda loss: loss.__name__)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 5.0))
@settings(max_examples=15, deadline=None)
def test_losses_are_zero_at_the_teacher_and_never_below(loss, seed, scale):
    shape = (4, 3, 5) if loss is step_kl else (4, 3, 2, 2)
    ours, theirs = draw(*shape, seed=seed, scale=scale), draw(*shape, seed=seed + 1, scale=scale)
    assert loss(ours, theirs).item() >= -1e-12
    assert loss(theirs, theirs).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("loss", [*ON_OUTPUTS, *ON_FEATURES], ids=lambda loss: loss.__name__)
def test_gradients(loss):
    shape = (3, 2, 4) if loss is step_kl else (3, 2, 2, 2)
    ours, theirs = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, theirs), ours)


def test_a_modules_own_losses_beside_an_output_are_no_part_of_a_loss():
    ours, theirs = torch.zeros(2, 3), torch.ones(2, 3)
    both = losses.LossInputs((torch.tensor(5.0), ours), (torch.tensor(7.0), theirs))
    loss = losses.FunctionLoss(losses.mse)
    assert loss(both).item() == 1.0
    assert loss(losses.LossInputs(torch.tensor(5.0), torch.tensor(7.0))).item() == 4.0


def test_codes_beside_an_output_are_no_part_of_a_loss():
    ours, theirs = torch.rand(2, 3), torch.rand(2, 3)
    codes = torch.tensor([[1, 2]])
    loss = losses.LOSSES["mse"](1.0)
    both = losses.LossInputs((ours, codes), (theirs, codes + 1))
    torch.testing.assert_close(loss(both), (ours - theirs).square().mean())
    with pytest.raises(TypeError, match="mse needs a floating-point output"):
        loss(losses.LossInputs(codes, codes))
