"""GRU encoders and decoders for sequences as plain modules, ready for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "SequenceDecoder",
    "SequenceEncoder",
    "TokenDecoder",
    "TokenEncoder",
    "drop_words",
]

PAD, START, END, UNKNOWN = 0, 1, 2, 3


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
