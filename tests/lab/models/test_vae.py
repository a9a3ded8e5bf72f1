import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.lab.models.vae import VAE, bernoulli_nll, gaussian_nll, normal_kl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def real_digits(n):
    small = torch.tensor(load_digits().images[:n], dtype=torch.float32)[:, None] / 16
    return functional.interpolate(small, size=16, mode="bilinear")


@pytest.fixture
def model():
    seed_everything(0, verbose=False)
    return VAE(image_size=16, width=8, latent_dim=3).eval()


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def test_terms_against_torch_distributions():
    mu, logvar = torch.randn(2, 5, 3)
    posterior = Normal(mu, (0.5 * logvar).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(normal_kl(mu, logvar), expected)
    x, output = torch.rand(5, 1, 4, 4), torch.randn(5, 1, 4, 4)
    expected = -Bernoulli(logits=output).log_prob(x.round()).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(x.round(), output), expected)
    expected = -Normal(output, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_nll(x, output, std=0.3), expected)


def test_terms_are_float32_for_half_precision_inputs():
    x = torch.rand(5, 1, 4, 4)
    assert bernoulli_nll(x, torch.randn_like(x).bfloat16()).dtype == torch.float32
    assert gaussian_nll(x, x.bfloat16(), std=0.3).dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_elbo_and_weights_against_torch_distributions(likelihood):
    model = VAE(image_size=16, width=8, latent_dim=3, likelihood=likelihood).eval()
    x = real_digits(4)
    with torch.no_grad():
        nll, kl = model.elbo_terms(x, generator=seeded())
        weights = model.log_weights(x, 1, generator=seeded())
        mu, logvar = model.posterior(x)
        posterior, prior = Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)
        z = mu + posterior.stddev * torch.randn(4, 3, generator=seeded())
        output = model(z)
    pixels = Bernoulli(logits=output, validate_args=False)  # grey values
    if likelihood == "gaussian":
        pixels = Normal(output, 0.1)
    log_likelihood = pixels.log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(nll, -log_likelihood)
    torch.testing.assert_close(kl, kl_divergence(posterior, prior).sum(1))
    difference = (prior.log_prob(z) - posterior.log_prob(z)).sum(1)
    torch.testing.assert_close(weights, (log_likelihood + difference)[None])


def test_one_importance_sample_is_the_elbo_on_average(model):
    x = real_digits(3)
    with torch.no_grad():
        weights = model.log_weights(x, 2000, generator=seeded())
        terms = [sum(model.elbo_terms(x, generator=seeded(2 + i))) for i in range(400)]
    spread = weights.std(0) / math.sqrt(2000) + torch.stack(terms).std(0) / math.sqrt(400)
    difference = weights.mean(0) + torch.stack(terms).mean(0)
    assert (difference.abs() < 4 * spread + 1e-4).all()
    assert (torch.logsumexp(weights, 0) - math.log(2000) >= weights.mean(0)).all()


def test_gaussian_decoder_gives_the_mean(model):
    gaussian = VAE(image_size=16, width=8, likelihood="gaussian").eval()
    z = gaussian.latents(4, seed=0)
    assert torch.equal(gaussian.images(z), gaussian.decoder(z))
    z = model.latents(4, seed=0)
    torch.testing.assert_close(model.images(z), model.decoder(z).sigmoid())


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def test_twenty_steps_on_digits_learn():
    seed_everything(0, verbose=False)
    data = TensorDataset(real_digits(640), torch.zeros(640))
    losses = Losses()
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[losses],
    )  # fmt: skip
    model = VAE(image_size=16, width=16, kl_weight=0.5)
    trainer.fit(model, DataLoader(data, 64), DataLoader(data, 320))
    assert len(losses.seen) == 20
    assert losses.seen[-1]["train/loss"] < 0.8 * losses.seen[0]["train/loss"]
    for seen in losses.seen:
        parts = seen["train/recon"] + 0.5 * seen["train/kl"]
        assert seen["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert seen["train/kl_factor"] == 0.5
    final = trainer.validate(model, DataLoader(data, 320), verbose=False)[0]
    assert set(final) == {"val/elbo", "val/recon", "val/kl"}
    assert final["val/elbo"] == pytest.approx(-final["val/recon"] - final["val/kl"], rel=1e-5)
    assert trainer.validate(model, DataLoader(data, 320), verbose=False)[0] == final


def test_default_size_on_digits():
    model = VAE(image_size=16)
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 500_000
    half = VAE(image_size=16, width_multiplier=0.5)
    assert half.decoder.up1.in_channels == model.decoder.up1.in_channels // 2
    assert half.encoder.body.down2.out_channels == model.encoder.body.down2.out_channels // 2
