"""A recurrent VAE for sequences: real values in [0, 1], or tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import check_choice
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    Parts,
    check_count,
    check_range,
    scaled_width,
)
from lightning_compress.lab.models.vae import BaseVAE, bernoulli_nll, gaussian_nll

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "RecurrentVAE",
    "SequenceDecoder",
    "SequenceEncoder",
    "TokenDecoder",
    "TokenEncoder",
    "drop_words",
]
PAD, START, END, UNKNOWN = 0, 1, 2, 3
# Word dropout, annealing steps and free bits with tokens, where the posterior collapses without.
TOKEN_DEFAULTS = (0.4, 1000, 0.25)


class SequenceEncoder(nn.Module):
    """Sequence (N, T, F) -> (mu, logvar), each (N, latent_dim), from the GRU's last state."""

    def __init__(self, features: int, *, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.mu = nn.Linear(hidden, latent_dim)
        self.logvar = nn.Linear(hidden, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar)."""
        states, _ = self.gru(x)
        last = states[:, -1]
        return self.mu(last), self.logvar(last)


class TokenEncoder(nn.Module):
    """Tokens (N, T) -> (mu, logvar), each (N, latent_dim), from the state at the last real token.

    Padding only trails, and a GRU in one direction does not look ahead: picking that state gives
    what a packed sequence would, and exports.
    """

    def __init__(self, vocab_size: int, *, embedding: int, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.mu = nn.Linear(hidden, latent_dim)
        self.logvar = nn.Linear(hidden, latent_dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar)."""
        states, _ = self.gru(self.embedding(tokens))
        last = (tokens != PAD).sum(1).clamp(min=1) - 1
        index = last.view(-1, 1, 1).expand(-1, 1, states.shape[2])
        state = states.gather(1, index).squeeze(1)
        return self.mu(state), self.logvar(state)


class SequenceDecoder(nn.Module):
    """z (N, latent_dim) -> (N, steps, features): the GRU reads z at every step, nothing else.

    Args:
        features: values a step.
        steps: length of the sequence, fixed.
        latent_dim: size of z.
        hidden: size of the GRU's state.
        final: the last activation; `nn.Identity()` gives logits.
    """

    def __init__(
        self, features: int, *, steps: int, latent_dim: int, hidden: int, final: nn.Module
    ) -> None:
        super().__init__()
        self.steps = steps
        self.gru = nn.GRU(latent_dim, hidden, batch_first=True)
        self.output = nn.Linear(hidden, features)
        self.final = final

    def forward(self, z: Tensor) -> Tensor:
        """Decode z, without teacher forcing."""
        states, _ = self.gru(z.unsqueeze(1).expand(-1, self.steps, -1))
        return self.final(self.output(states))


class TokenDecoder(nn.Module):
    """One or more steps of an autoregressive decoder that reads z beside every token.

    The state starts at zero and z enters at each step, so one exported step is the whole decoder.
    """

    def __init__(self, vocab_size: int, *, embedding: int, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.gru = nn.GRU(embedding + latent_dim, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocab_size)

    def initial_state(self, z: Tensor) -> Tensor:
        """The state before the first token, (N, hidden): zeros."""
        return z.new_zeros(z.shape[0], self.gru.hidden_size)

    def distillation_inputs(
        self, tokens: Tensor, state: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this decoder, as a teacher, is called with where a student was so called.

        A student's state has another size; in training it is the initial one.
        """
        del state
        return tokens, self.initial_state(z), z

    def forward(self, tokens: Tensor, state: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, T), state (N, hidden), z (N, latent_dim) -> logits (N, T, V), next state."""
        words = self.embedding(tokens)
        repeated = z.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        inputs = torch.cat([words, repeated.to(words.dtype)], dim=2)
        states, last = self.gru(inputs, state.unsqueeze(0))
        return self.output(states), last.squeeze(0)


def drop_words(tokens: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replace a share `rate` of the words by the unknown token; pad, start and end stay.

    Bowman et al. 2016, https://arxiv.org/abs/1511.06349: a decoder that misses words must use z.

    >>> drop_words(torch.tensor([[1, 7, 8, 2, 0]]), 1.0).tolist()
    [[1, 3, 3, 2, 0]]
    """
    device = tokens.device if generator is None else generator.device
    chance = torch.rand(tokens.shape, generator=generator, device=device).to(tokens.device)
    return tokens.masked_fill((chance < rate) & (tokens > END), UNKNOWN)


class RecurrentVAE(BaseVAE):
    """GRU encoder and decoder with a latent for the whole sequence.

    Bowman et al. 2016, https://arxiv.org/abs/1511.06349. Give exactly one of `features` (batches
    (N, T, F) in [0, 1]) and `vocab_size` (tokens (N, T): 0 pad, 1 start, 2 end, 3 unknown; each
    row begins with start, and its padding trails). Logs as `VAE` does.

    Args:
        features: values a step; the decoder reads z at each step, nothing else.
        vocab_size: number of tokens; the decoder also reads the token before (teacher forcing).
        steps: T, with the start token.
        latent_dim: size of z.
        hidden: size of the GRUs' states.
        embedding: size of a token's vector; unused with `features`.
        likelihood: `"bernoulli"` or `"gaussian"` with `features`, `"categorical"` with tokens;
            None takes the first that fits.
        observation_std: standard deviation of the Gaussian likelihood, fixed.
        word_dropout: share of the decoder's input words replaced by unknown in training; None:
            0.4 with tokens, else 0.
        kl_weight: weight of the KL in the training loss once annealed.
        kl_anneal_steps: optimizer steps over which that weight rises from 0; 0 switches it off;
            None: 1,000 with tokens, else 0. The clock is `global_step`: it survives a resume, and
            with automatic optimization and one optimizer it counts that optimizer's steps.
        free_bits: nats of each latent unit, as the batch's mean, that the training loss does not
            charge for (Kingma et al. 2016, arXiv:1606.04934); None: 0.25 with tokens, else 0.
            Without these three a decoder that reads the token before learns to ignore z.
        lr: Adam's learning rate.
        width_multiplier: scales `hidden` and `embedding`, to multiples of 8.

    Raises:
        ValueError: for a bad argument, with the valid ones.

    >>> model = RecurrentVAE(vocab_size=9, steps=6, hidden=8).eval()
    >>> model.sequences(model.latents(2, seed=0)).shape
    torch.Size([2, 6])
    """

    kind = "recurrent_vae"
    data_kinds = ("sequence", "tokens")

    def __init__(
        self,
        *,
        steps: int,
        features: int | None = None,
        vocab_size: int | None = None,
        latent_dim: int = 16,
        hidden: int = 128,
        embedding: int = 32,
        likelihood: Literal["bernoulli", "gaussian", "categorical"] | None = None,
        observation_std: float = 0.1,
        word_dropout: float | None = None,
        kl_weight: float = 1.0,
        kl_anneal_steps: int | None = None,
        free_bits: float | None = None,
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if (features is None) == (vocab_size is None):
            raise ValueError(
                f"features={features!r}, vocab_size={vocab_size!r}: give exactly one of the two"
            )
        self.discrete = vocab_size is not None
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.steps = check_count("steps", steps, least=2)
        self.likelihood = self._check_likelihood(likelihood)
        self.observation_std = check_range("observation_std", observation_std, 1e-6)
        dropout, anneal, free = TOKEN_DEFAULTS if self.discrete else (0.0, 0, 0.0)
        self.word_dropout = check_range(
            "word_dropout", dropout if word_dropout is None else word_dropout, 0, 1
        )
        self.kl_anneal_steps = check_count(
            "kl_anneal_steps", anneal if kl_anneal_steps is None else kl_anneal_steps, least=0
        )
        self.free_bits = check_range("free_bits", free if free_bits is None else free_bits, 0)
        if word_dropout and not self.discrete:
            raise ValueError(
                f"word_dropout={word_dropout} needs vocab_size: features have no words"
            )
        check_range("kl_weight", kl_weight, 0)
        check_range("lr", lr, 0)
        self.save_hyperparameters()
        sizes = {
            "latent_dim": latent_dim,
            "hidden": scaled_width(hidden, width_multiplier, name="hidden"),
        }
        if vocab_size is None:
            self._build_for_values(check_count("features", features), sizes)
        else:
            sizes["embedding"] = scaled_width(embedding, width_multiplier, name="embedding")
            self._build_for_tokens(check_count("vocab_size", vocab_size, least=UNKNOWN + 2), sizes)

    def _check_likelihood(self, likelihood: str | None) -> str:
        choices = ("categorical",) if self.discrete else ("bernoulli", "gaussian")
        return choices[0] if likelihood is None else check_choice("likelihood", likelihood, choices)

    def _build_for_values(self, features: int, sizes: dict[str, Any]) -> None:
        final = nn.Identity() if self.likelihood == "bernoulli" else nn.Sigmoid()
        self.encoder = SequenceEncoder(features, **sizes)
        self.decoder = SequenceDecoder(features, steps=self.steps, final=final, **sizes)

    def _build_for_tokens(self, vocab_size: int, sizes: dict[str, Any]) -> None:
        self.encoder = TokenEncoder(vocab_size, **sizes)
        self.decoder = TokenDecoder(vocab_size, **sizes)

    def kl_factor(self) -> float:
        """`kl_weight`, rising linearly from 0 over the first `kl_anneal_steps` optimizer steps."""
        steps = self.kl_anneal_steps
        share = min(1.0, self.global_step / steps) if steps else 1.0
        return share * float(self.hparams["kl_weight"])

    def training_loss(self, nll: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """Mean of reconstruction (N,) and weighted KL, of which `free_bits` a unit cost nothing."""
        if not self.free_bits:
            return super().training_loss(nll, mu, logvar)
        units = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)
        return nll.mean() + self.kl_factor() * units.clamp(min=self.free_bits).sum()

    def reconstruction_nll(
        self, x: Tensor, z: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """-log p(x | z) in nats, (N,), summed over steps; padding counts nothing."""
        if self.discrete:
            return self._token_nll(x, z, generator)
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return bernoulli_nll(x, output)
        return gaussian_nll(x, output, std=self.observation_std)

    def _token_nll(self, x: Tensor, z: Tensor, generator: torch.Generator | None) -> Tensor:
        if bool((x[:, 0] != START).any()):  # else the first token would cost nothing, silently
            raise ValueError(f"token sequences must begin with the start token {START}")
        inputs, targets = x[:, :-1], x[:, 1:]
        if self.training and self.word_dropout > 0:
            inputs = drop_words(inputs, self.word_dropout, generator=generator)
        logits, _ = self.decoder(inputs, self._decoder().initial_state(z), z)
        loss = functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=PAD, reduction="none"
        )
        return loss.sum(1)

    def _decoder(self) -> TokenDecoder:
        if isinstance(self.decoder, TokenDecoder):
            return self.decoder
        raise ValueError("this model has features, not tokens: use images(z), not sequences(z)")

    def steps_per_example(self, x: Tensor) -> Tensor:
        """Predicted steps of each example, (N,): T, or the tokens after start that are no pad."""
        if self.discrete:
            return (x[:, 1:] != PAD).sum(1)
        return torch.full((x.shape[0],), x.shape[1], device=x.device)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> mean sequences as images (N, 1, T, F); in eval mode.

        Raises:
            ValueError: with tokens, which make no image.
        """
        if self.discrete:
            raise ValueError("this model has tokens, not features: use sequences(z), not images(z)")
        output = self.decoder(z).float().unsqueeze(1)
        return output.sigmoid() if self.likelihood == "bernoulli" else output

    @torch.no_grad()
    def sequences(self, z: Tensor) -> Tensor:
        """Latents (N, latent_dim) -> tokens (N, T) int64 by greedy decoding; in eval mode.

        Each row begins with start; after end it is padded.

        Raises:
            ValueError: with real-valued features.
        """
        decoder = self._decoder()
        state = decoder.initial_state(z)
        rows = [torch.full((z.shape[0],), START, device=z.device)]
        for _ in range(self.steps - 1):
            logits, state = decoder(rows[-1].unsqueeze(1), state, z)
            best = logits[:, -1, END:].argmax(1) + END  # pad and start are never predicted
            over = (rows[-1] == END) | (rows[-1] == PAD)
            rows.append(best.masked_fill(over, PAD))
        return torch.stack(rows, dim=1)

    def parts(self) -> Parts:
        """The decoder and the encoder (mu, logvar).

        With tokens the decoder is one step: (token (N, 1), state (N, hidden), z) -> (logits
        (N, 1, V), state), beginning with the start token and a state of zeros.
        """
        z = self.sample_latents()
        if self.discrete:
            tokens = torch.full((SAMPLE_BATCH, self.steps), START)
            decoder_inputs = (tokens[:, :1], self._decoder().initial_state(z), z)
            return {"decoder": (self.decoder, decoder_inputs), "encoder": (self.encoder, (tokens,))}
        shape = (SAMPLE_BATCH, self.steps, self.hparams["features"])
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        return {"decoder": (self.decoder, (z,)), "encoder": (self.encoder, (x,))}
