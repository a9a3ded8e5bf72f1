import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.lab.models import RecurrentVAE
from lightning_compress.lab.models.recurrent_vae import drop_words

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
TOKENS = torch.tensor([[1, 5, 6, 7, 2, 0], [1, 2, 0, 0, 0, 0], [1, 4, 4, 3, 8, 2]])


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    seed_everything(0, verbose=False)
    return RecurrentVAE(vocab_size=9, steps=6, hidden=8, latent_dim=3, embedding=8).eval()


def test_tokens_against_a_categorical_one_by_one(model):
    with torch.no_grad():
        nll, _ = model.elbo_terms(TOKENS, generator=seeded())
        mu, logvar = model.posterior(TOKENS)
        z = mu + (0.5 * logvar).exp() * torch.randn(3, 3, generator=seeded())
        for row, latent, value in zip(TOKENS, z, nll, strict=True):
            words = row[row != 0]
            state, expected = model.decoder.initial_state(latent[None]), 0.0
            for word, following in itertools.pairwise(words):
                logits, state = model.decoder(word.view(1, 1), state, latent[None])
                expected -= Categorical(logits=logits[0, 0]).log_prob(following).item()
            assert value.item() == pytest.approx(expected, rel=1e-5)
    assert model.steps_per_example(TOKENS).tolist() == [4, 1, 5]


def test_padding_changes_nothing(model):
    padded = functional.pad(TOKENS, (0, 4))
    with torch.no_grad():
        for f in (
            lambda x: model.elbo_terms(x, generator=seeded()),
            lambda x: model.log_weights(x, 3, generator=seeded()),
            model.steps_per_example,
        ):
            torch.testing.assert_close(f(padded), f(TOKENS))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_values_against_torch_distributions(likelihood):
    model = RecurrentVAE(features=4, steps=5, hidden=8, latent_dim=3, likelihood=likelihood).eval()
    x = torch.rand(3, 5, 4)
    with torch.no_grad():
        nll, _ = model.elbo_terms(x, generator=seeded())
        mu, logvar = model.posterior(x)
        z = mu + (0.5 * logvar).exp() * torch.randn(3, 3, generator=seeded())
        output = model(z)
    bernoulli = Bernoulli(logits=output, validate_args=False)
    distribution = bernoulli if likelihood == "bernoulli" else Normal(output, 0.1)
    torch.testing.assert_close(nll, -distribution.log_prob(x).sum((1, 2)))
    pictures = model.images(z)
    assert pictures.shape == (3, 1, 5, 4)
    torch.testing.assert_close(pictures[:, 0], distribution.mean)
    assert model.steps_per_example(x).tolist() == [5, 5, 5]


@settings(deadline=None, max_examples=20)
@given(rate=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_word_dropout_rate(rate, seed):
    words = torch.full((100, 100), 7)
    dropped = drop_words(words, rate, generator=seeded(seed))
    assert set(dropped.unique().tolist()) <= {3, 7}
    share = (dropped == 3).float().mean().item()
    assert abs(share - rate) <= 6 * (rate * (1 - rate) / 10_000) ** 0.5 + 1e-9


def test_word_dropout_in_training_only(model):
    model = RecurrentVAE(vocab_size=9, steps=6, hidden=8, latent_dim=3, word_dropout=1.0)
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.elbo_terms(TOKENS)
    assert seen[-1].tolist() == [[1, 3, 3, 3, 2], [1, 2, 0, 0, 0], [1, 3, 3, 3, 3]]
    model.eval().elbo_terms(TOKENS)
    assert torch.equal(seen[-1], TOKENS[:, :-1])


def test_greedy_sequences_follow_the_decoder():
    torch.manual_seed(0)
    model = RecurrentVAE(vocab_size=6, steps=12, hidden=8, latent_dim=3, embedding=8).eval()
    model.decoder.output.weight.data *= 8  # varied sequences, with ends in them
    z = model.latents(64, seed=0)
    rows = model.sequences(z)
    assert rows.shape == (64, 12)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == 1).all()
    with torch.no_grad():
        logits, _ = model.decoder(rows[:, :-1], model.decoder.initial_state(z), z)
    best = logits[..., 2:].argmax(-1) + 2
    ended = (rows == 2).cumsum(1)[:, :-1] > 0
    assert ended.any()
    assert not ended.all(1).all()
    assert torch.equal(rows[:, 1:], best.masked_fill(ended, 0))


class Factors(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.callback_metrics["train/kl_factor"].item())


def test_annealing_survives_a_resume(tmp_path):
    data = DataLoader(TensorDataset(TOKENS, torch.zeros(3)), 3)

    def fit(epochs, ckpt_path=None):
        factors = Factors()
        trainer = Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, callbacks=[factors],
        )  # fmt: skip
        model = RecurrentVAE(
            vocab_size=9, steps=6, hidden=8, latent_dim=3, kl_weight=2.0, kl_anneal_steps=4
        )
        trainer.fit(model, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return factors.seen

    assert fit(3) == [0.0, 0.5, 1.0]
    assert fit(6, tmp_path / "last.ckpt") == [1.5, 2.0, 2.0]


def test_learns_which_sentence_it_read():
    seed_everything(0, verbose=False)
    model = RecurrentVAE(vocab_size=9, steps=6, hidden=32, latent_dim=4, kl_weight=0.1, lr=0.02)
    trainer = Trainer(
        max_epochs=120, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(TOKENS, torch.zeros(3)), 3))
    mu, _ = model.eval().posterior(TOKENS)
    assert torch.equal(model.sequences(mu), TOKENS)


WORDS = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aeio" for c in "lmnr" for d in "kpst"]


def trained_on_words(**more):
    """The KL in nats after a few hundred steps on made-up words, and the model."""
    rows = [[1, *(ord(one) - ord("a") + 4 for one in word), 2] for word in WORDS]
    data = DataLoader(TensorDataset(torch.tensor(rows), torch.zeros(len(rows))), batch_size=256)
    seed_everything(0, verbose=False)
    model = RecurrentVAE(
        vocab_size=30, steps=6, hidden=16, embedding=8, latent_dim=16, lr=1e-2, **more
    )
    trainer = Trainer(
        max_epochs=150,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    with torch.no_grad():
        return float(model.eval().elbo_terms(torch.tensor(rows), generator=seeded())[1].mean())


def test_the_posterior_of_words_does_not_collapse_by_default():
    """Bowman et al. 2016, section 3.1; without all three the same model ignores z."""
    assert trained_on_words(kl_anneal_steps=75) > 3.0  # the other two as they are by default
    assert trained_on_words(word_dropout=0.0, kl_anneal_steps=0, free_bits=0.0) < 1.0


def test_free_bits_leave_the_first_nats_of_a_unit_without_a_cost():
    model = RecurrentVAE(vocab_size=9, steps=6, latent_dim=2, kl_anneal_steps=0, free_bits=0.5)
    nll, logvar = torch.tensor([1.0, 3.0]), torch.zeros(2, 2)
    mu = torch.tensor([[0.2, 2.0], [0.0, 2.0]], requires_grad=True)  # KL 0.01 and 2, on average
    loss = model.training_loss(nll, mu, logvar)
    assert loss.item() == pytest.approx(2.0 + 0.5 + 2.0)
    loss.backward()
    assert mu.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_values_have_none_of_the_aids_of_tokens_by_default():
    model = RecurrentVAE(features=4, steps=6, hidden=8)
    assert (model.word_dropout, model.kl_anneal_steps, model.free_bits) == (0.0, 0, 0.0)
    nll, mu = torch.tensor([1.0, 3.0]), torch.ones(2, model.latent_dim)
    loss = model.training_loss(nll, mu, torch.zeros_like(mu))
    assert loss.item() == pytest.approx(2.0 + 0.5 * model.latent_dim)


def test_rows_without_start_are_refused(model):
    with pytest.raises(ValueError, match="begin with the start token 1"):
        model.elbo_terms(TOKENS[:, 1:])


def test_the_other_kind_of_sample_is_refused(model):
    with pytest.raises(ValueError, match="use sequences"):
        model.images(model.latents(2, seed=0))
    values = RecurrentVAE(features=4, steps=5, hidden=8)
    with pytest.raises(ValueError, match="use images"):
        values.sequences(values.latents(2, seed=0))
