"""Update rules of federated peers from their papers, each with this package's coder.

A rule takes the difference by name, what earlier rounds did not send, and a generator; it returns
what the receiver decodes, its bytes, and what is left. BatchNorm's statistics go with the rest.
"""

# ruff: noqa: ARG001 (all rules have one signature)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.federated.updates import UpdateCodec, encode_update, kept_by_magnitude
from lightning_compress.grids import AffineGrid
from lightning_compress.lcz.memory import tensors_to_bytes

Tensors = dict[str, Tensor]
Rule = Callable[[Tensors, Tensors, torch.Generator], tuple[Tensors, int, Tensors]]


@dataclass(frozen=True)
class Peer:
    """A method: its update rules up and down."""

    up: Rule
    down: Rule


def plain(dtype: torch.dtype) -> Rule:
    """FedAvg (McMahan et al. 2017): all values; nothing is left."""

    def rule(delta: Tensors, left: Tensors, generator: torch.Generator) -> tuple:
        cast = {name: one.to(dtype) for name, one in delta.items()}
        size = sum(one.numel() * one.element_size() for one in cast.values())
        return {name: one.float() for name, one in cast.items()}, size, {}

    return rule


def top_k(density: float) -> Rule:
    """The largest values, the rest is added to the next update (Stich et al. 2018)."""

    def rule(delta: Tensors, left: Tensors, generator: torch.Generator) -> tuple:
        whole = {name: one + left.get(name, 0) for name, one in delta.items()}
        kept = kept_by_magnitude(whole, density)
        size = len(tensors_to_bytes(kept, codec="fast"))
        return kept, size, {name: whole[name] - kept[name] for name in whole}

    return rule


def qsgd(bits: int) -> Rule:
    """`|v|_2 * sign(v_i) * l / s`, l rounded at random (Alistarh et al. 2017); no feedback.

    FedPAQ (Reisizadeh et al. 2020) sends the same of differences after several local steps.
    """
    levels = 2 ** (bits - 1) - 1

    def rule(delta: Tensors, left: Tensors, generator: torch.Generator) -> tuple:
        decoded, grids = {}, {}
        for name, one in delta.items():
            step = max(float(one.norm()) / levels, torch.finfo(torch.float32).tiny)
            scaled = one.abs() / step
            low = scaled.floor()
            up = torch.rand(one.shape, generator=generator) < scaled - low
            grids[name] = _grid(step, max(bits, 2))
            symbols = ((low + up).clamp(max=levels) * one.sign()).int()
            decoded[name] = grids[name].dequantize(symbols) + 0.0
        return decoded, len(tensors_to_bytes(decoded, grids, "fast")), {}

    return rule


def stc(density: float) -> Rule:
    """Sparse ternary: the largest as +- their mean size, with feedback (Sattler et al. 2019)."""

    def rule(delta: Tensors, left: Tensors, generator: torch.Generator) -> tuple:
        whole = {name: one + left.get(name, 0) for name, one in delta.items()}
        kept = kept_by_magnitude(whole, density)
        count = sum(int(one.count_nonzero()) for one in kept.values()) or 1
        size = sum(float(one.abs().sum()) for one in kept.values()) / count or 1.0
        grid = _grid(size, 2)
        decoded = {name: grid.dequantize(one.sign().int()) + 0.0 for name, one in kept.items()}
        grids = dict.fromkeys(decoded, grid)
        length = len(tensors_to_bytes(decoded, grids, "fast"))
        return decoded, length, {name: whole[name] - decoded[name] for name in whole}

    return rule


def ours(codec: UpdateCodec) -> Rule:
    """The package's own codec."""

    def rule(delta: Tensors, left: Tensors, generator: torch.Generator) -> tuple:
        zero = {name: torch.zeros_like(one) for name, one in delta.items()}
        sent = encode_update(delta, zero, codec, left)
        return sent.decoded, len(sent.payload), sent.residual

    return rule


def _grid(step: float, bits: int) -> AffineGrid:
    zero = torch.zeros(1, dtype=torch.int32)
    return AffineGrid(torch.tensor([step], dtype=torch.float32), zero, bits, True, None)


FP32, FP16 = plain(torch.float32), plain(torch.float16)
PEERS = {
    "FedAvg fp32": Peer(FP32, FP32),
    "FedAvg fp16": Peer(FP16, FP16),
    "top-k 1 %": Peer(top_k(0.01), FP32),
    "top-k 5 %": Peer(top_k(0.05), FP32),
    "QSGD 8 bits": Peer(qsgd(8), FP32),
    "QSGD 4 bits": Peer(qsgd(4), FP32),
    "FedPAQ 4 bits": Peer(qsgd(4), FP32),  # of half the clients a round, see bench_federated.py
    "STC 1 %": Peer(stc(0.01), stc(0.01)),
    "ours": Peer(ours(UpdateCodec()), ours(UpdateCodec(density=0.2, relative_step=1.5))),
    "ours 5 % / 10 %, finer": Peer(
        ours(UpdateCodec(density=0.05, relative_step=1.0)),
        ours(UpdateCodec(density=0.1, relative_step=1.0)),
    ),
    "ours, rate and distortion": Peer(
        ours(UpdateCodec(density=1.0, relative_step=1.9, lmbda=0.3)),
        ours(UpdateCodec(density=1.0, relative_step=1.5, lmbda=0.3)),
    ),
}
