"""Inputs and hidden states of the layers inside `nn.RNN`, `nn.GRU` and `nn.LSTM`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["recurrent_states"]


def recurrent_states(
    owner: nn.RNNBase, x: Tensor | PackedSequence, hx: Any, output: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each weight of a recurrent layer: what it was multiplied with, and its units' states.

    Inner layers are run again one by one, without the dropout between them (the hooks of the
    layer see its ends alone). `weight_hr` of a projected LSTM stays invisible and is left out.

    Args:
        owner: the layer.
        x: its input, padded, packed or without a batch.
        hx: its initial state, or None for zeros.
        output: what it returned.

    Returns:
        name -> (inputs (samples, columns), states (samples, hidden)).

    >>> gru, x = nn.GRU(2, 3), torch.zeros(5, 1, 2)
    >>> states = recurrent_states(gru, x, None, gru(x))
    >>> {name: tuple(pair[0].shape) for name, pair in states.items()}
    {'weight_ih_l0': (5, 2), 'weight_hh_l0': (5, 3)}
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    weight = owner.weight_ih_l0
    assert isinstance(weight, Tensor)
    dtype = weight.dtype  # the call itself may have run in half precision
    x, hx = x.to(dtype), _cast(hx, dtype)
    initial = hx[0] if isinstance(hx, tuple) else hx
    directions = 2 if owner.bidirectional else 1
    for depth in range(owner.num_layers):
        state = None if hx is None else _of_depth(hx, depth, directions)
        last = owner.num_layers == 1
        y = output[0] if last else _single(owner, depth)(x, state)[0]
        steps, valid = _time_major(x, owner.batch_first)
        states = _time_major(y, owner.batch_first)[0].to(dtype)
        for way in range(directions):
            name = f"l{depth}" + ("_reverse" if way else "")
            mine = states.chunk(directions, 2)[way]
            first = _initial(initial, depth * directions + way, mine)
            before = _shifted(mine, first, valid, backward=bool(way))
            found[f"weight_ih_{name}"] = (steps[valid], mine[valid])
            found[f"weight_hh_{name}"] = (before[valid], mine[valid])
        x = y
    return found


def _of_depth(hx: Any, depth: int, directions: int) -> Any:
    part = slice(depth * directions, (depth + 1) * directions)
    return tuple(one[part] for one in hx) if isinstance(hx, tuple) else hx[part]


def _cast(hx: Any, dtype: torch.dtype) -> Any:
    if isinstance(hx, tuple):
        return tuple(one.to(dtype) for one in hx)
    return None if hx is None else hx.to(dtype)


def _single(owner: nn.RNNBase, depth: int) -> nn.RNNBase:
    """One layer of several by itself, made without touching the random state."""
    directions = 2 if owner.bidirectional else 1
    size = owner.proj_size or owner.hidden_size
    extra: dict[str, Any] = {}
    if isinstance(owner, nn.RNN):
        extra["nonlinearity"] = owner.nonlinearity
    weight = getattr(owner, f"weight_ih_l{depth}")
    kind = next(kind for kind in (nn.GRU, nn.LSTM, nn.RNN) if isinstance(owner, kind))
    size_in = owner.input_size if depth == 0 else size * directions
    if owner.proj_size:
        extra["proj_size"] = owner.proj_size
    single = kind(
        size_in,
        owner.hidden_size,
        bias=owner.bias,
        batch_first=owner.batch_first,
        bidirectional=owner.bidirectional,
        device="meta",  # where initial values cost no random numbers
        dtype=weight.dtype,
        **extra,
    ).to_empty(device=weight.device)
    for name, parameter in single.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(getattr(owner, name.replace("_l0", f"_l{depth}")))
    single.flatten_parameters()
    return single


def _time_major(x: Tensor | PackedSequence, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Values (T, N, features), and which (T, N) of them are steps of a sequence."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        padded = padded.detach()
        steps = torch.arange(padded.shape[0]).unsqueeze(1)
        return padded, (steps < lengths).to(padded.device)
    x = x.detach()
    x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if batch_first else x
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _initial(hx: Tensor | None, index: int, states: Tensor) -> Tensor:
    if hx is None:
        return torch.zeros_like(states[:1])
    return hx[index].detach().view(1, -1, states.shape[2])


def _shifted(states: Tensor, first: Tensor, valid: Tensor, *, backward: bool) -> Tensor:
    """The state that each step started from."""
    if not backward:
        return torch.cat([first, states[:-1]])
    following = torch.cat([states[1:], first])
    ends = valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    return torch.where(ends.unsqueeze(2), first, following)
