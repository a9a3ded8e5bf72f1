"""Bounds on a linear-Gaussian model, whose marginal likelihood is known in closed form."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from lightning_compress.lab.evaluation.likelihood import accuracy, likelihood

LATENT, SIZE, NOISE = 3, 5, 0.7


class LinearGaussian(nn.Module):
    """x = W z + noise; q(z|x) is the exact posterior, with its standard deviation times `width`."""

    def __init__(self, width=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(SIZE, LATENT, generator=generator).double())
        with torch.no_grad():  # orthogonal columns give a posterior with a diagonal covariance
            self.weight.copy_(torch.linalg.qr(self.weight)[0] * torch.tensor([2.0, 1.0, 0.01]))
        self.width, self.largest_call = width, 0

    def posterior(self, x):
        precision = 1 + (self.weight**2).sum(0) / NOISE**2
        mu = x @ self.weight / NOISE**2 / precision
        return mu, (self.width**2 / precision).log().expand_as(mu)

    def _draw(self, x, k, generator):
        self.largest_call = max(self.largest_call, k * len(x))
        mu, logvar = self.posterior(x)
        noise = torch.randn(k, *mu.shape, generator=generator, dtype=mu.dtype)
        return mu + noise * (0.5 * logvar).exp(), mu, logvar

    def _nll(self, x, z):
        return -torch.distributions.Normal(z @ self.weight.T, NOISE).log_prob(x).sum(-1)

    def elbo_terms(self, x, *, generator):
        assert not self.training
        z, mu, logvar = self._draw(x, 1, generator)
        return self._nll(x, z[0]), 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)

    def log_weights(self, x, k, *, generator):
        z, mu, logvar = self._draw(x, k, generator)
        normal = torch.distributions.Normal
        prior = normal(0.0, 1.0).log_prob(z).sum(-1)
        return -self._nll(x, z) + prior - normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)

    def exact(self, x):
        covariance = (
            (self.weight @ self.weight.T + NOISE**2 * torch.eye(SIZE).double()).detach().numpy()
        )
        return -scipy.stats.multivariate_normal(cov=covariance).logpdf(x.numpy()).mean()

    def sample(self, count):
        generator = torch.Generator().manual_seed(7)
        z = torch.randn(count, LATENT, generator=generator).double()
        noise = torch.randn(count, SIZE, generator=generator).double()
        return (z @ self.weight.T + NOISE * noise).detach()


def test_both_bounds_are_tight_for_the_exact_posterior():
    model = LinearGaussian()
    x = model.sample(2000)
    result = likelihood(model, x, batch_size=300, importance_samples=4)
    # log p(x, z) - log q(z|x) is log p(x) for every z when q is exact
    assert result["neg_iwae"] == pytest.approx(model.exact(x), abs=1e-9)
    assert result["neg_elbo"] == pytest.approx(model.exact(x), abs=0.1)  # one sample each
    assert result["neg_elbo"] == pytest.approx(result["reconstruction"] + result["kl"])


def test_many_importance_samples_close_the_gap_that_a_wrong_posterior_leaves():
    model = LinearGaussian(width=1.6)
    x = model.sample(300)
    exact = model.exact(x)
    few, many = (likelihood(model, x, importance_samples=k)["neg_iwae"] for k in (1, 2000))
    gap = LATENT * ((1.6**2 - 1) / 2 - math.log(1.6))  # KL(q || exact posterior)
    assert few == pytest.approx(exact + gap, abs=0.2)
    assert many == pytest.approx(exact, abs=0.01)


def test_no_call_holds_more_than_batch_size_pairs_and_chunks_do_not_change_the_bound():
    model = LinearGaussian()
    x = model.sample(7)
    for batch_size, samples in ((4, 10), (16, 10), (256, 10)):
        model.largest_call = 0
        result = likelihood(model, x, batch_size=batch_size, importance_samples=samples)
        assert model.largest_call <= batch_size
        assert result["neg_iwae"] == pytest.approx(model.exact(x), abs=1e-9)


def test_active_units_follow_the_variance_of_the_posterior_mean():
    model = LinearGaussian()
    x = model.sample(500)
    result = likelihood(model, x)
    variance = np.var(model.posterior(x)[0].detach().numpy(), axis=0)
    assert (result["active_units"], result["latent_dim"]) == (2, 3)
    assert (variance > 0.01).sum() == 2
    assert "neg_iwae" not in result
    assert "perplexity" not in result


@pytest.mark.parametrize(("variance", "active"), [(0.009, 0), (0.011, 2), (0.019, 2)])
def test_a_unit_is_active_from_a_variance_of_a_hundredth_on(variance, active):
    """The threshold of Burda et al. 2016, section 5.2; twice of it is another measure."""

    class Given(nn.Module):
        def posterior(self, x):
            return x, torch.zeros_like(x)

        def elbo_terms(self, x, *, generator):
            del generator
            return x[:, 0], x[:, 0]

    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    x = (x - x.mean(0)) / x.std(0) * variance**0.5
    assert likelihood(Given(), x)["active_units"] == active


class Tokens(nn.Module):
    """Every token costs log(8) nats, whatever is asked."""

    def elbo_terms(self, x, *, generator):
        return self.steps_per_example(x) * math.log(8), torch.zeros(len(x))

    def posterior(self, x):
        return torch.zeros(len(x), 2), torch.zeros(len(x), 2)

    def steps_per_example(self, x):
        return (x >= 0).sum(1)


def test_perplexity_counts_the_steps_that_are_there():
    x = torch.tensor([[1, 2, 3, -1], [1, -1, -1, -1], [1, 2, 3, 4]])
    result = likelihood(Tokens(), x, batch_size=2)
    assert result["neg_elbo"] == pytest.approx(8 / 3 * math.log(8), rel=1e-6)
    assert result["nats_per_step"] == pytest.approx(math.log(8), rel=1e-6)
    assert result["perplexity"] == pytest.approx(8, rel=1e-5)
    continuous = likelihood(Tokens(), x.float())
    assert continuous["nats_per_step"] == pytest.approx(math.log(8), rel=1e-6)
    assert "perplexity" not in continuous


def test_seeds_decide_and_neither_random_stream_nor_mode_moves():
    model, random = LinearGaussian().train(), torch.get_rng_state()
    x = model.sample(20)
    first = likelihood(model, x, importance_samples=2, seed=1)
    assert likelihood(model, x, importance_samples=2, seed=1) == first
    assert likelihood(model, x, importance_samples=2, seed=2) != first
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


class WrongShape(Tokens):
    def elbo_terms(self, x, *, generator):
        return torch.zeros(len(x), 1), torch.zeros(len(x))


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (Tokens(), torch.zeros(1, 4), {}, "at least 2 examples"),
        (Tokens(), torch.full((2, 4), math.nan), {}, "not finite"),
        (Tokens(), torch.zeros(2, 4), {"batch_size": 0}, "batch_size"),
        (Tokens(), torch.zeros(2, 4), {"importance_samples": -1}, "importance_samples"),
        (WrongShape(), torch.zeros(2, 4), {}, r"shape \(2, 1\) where \(2,\) was due"),
    ],
)
def test_bad_arguments_are_refused(model, x, options, message):
    with pytest.raises(ValueError, match=message):
        likelihood(model, x, **options)


def test_accuracy_equals_scikit_learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).train()
    x, y = torch.randn(50, 6), torch.randint(0, 4, (50,))
    result = accuracy(model, x, y, batch_size=16)
    probabilities = model[0](x).softmax(1).detach().double().numpy()
    assert result["accuracy"] == accuracy_score(y, probabilities.argmax(1))
    expected = log_loss(y, probabilities / probabilities.sum(1, keepdims=True), labels=range(4))
    assert result["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert model[1].training
    with pytest.raises(ValueError, match="labels"):
        accuracy(model, x, y[:3])
