"""Attention heads as channels: `nn.MultiheadAttention` with fewer heads than its width asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.channels.trace import Nodes, Trace

__all__ = ["ATTENTION", "FewerHeads", "attention_rule", "attention_sizes", "fit_attention"]

ATTENTION = ("embed_dim", "num_heads", "kdim", "vdim", "_qkv_same_embed_dim")


class FewerHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than its inputs.

    torch's own takes the width of all heads to be that of its inputs. A layer that loses heads
    becomes one of these: its parameters keep their names, and it is called the same way.

    >>> layer = nn.MultiheadAttention(8, 4, bias=False)
    >>> layer.in_proj_weight.data = layer.in_proj_weight.data[:18]
    >>> layer.out_proj.weight.data = layer.out_proj.weight.data[:, :6]
    >>> fit_attention(layer)
    >>> type(layer).__name__, layer(*[torch.zeros(5, 2, 8)] * 3)[0].shape
    ('FewerHeads', torch.Size([5, 2, 8]))
    """

    def forward(  # noqa: D102
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  # torch wants the mask as well
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        q, k, v = (
            one.unsqueeze(0) if not batched else one if self.batch_first else one.transpose(0, 1)
            for one in (query, key, value)
        )
        q, k, v = self._projected(q, k, v)  # (N, L, width of all heads)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([one, more.expand(len(one), -1, -1)], dim=1)
                for one, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (functional.pad(one, (0, 0, 0, 1)) for one in (k, v))
        q, k, v = (one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in (q, k, v))
        bias = self._bias(q, k, key_padding_mask, attn_mask)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        weights = functional.dropout(weights, self.dropout, self.training)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        shown = weights.mean(1) if average_attn_weights else weights
        return out, shown if batched else shown[0]

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            functional.linear(one, weight, bias)
            for one, weight, bias in zip((q, k, v), weights, biases, strict=True)
        ]

    def _bias(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores, (N, heads, L, S)."""
        found = None
        if mask is not None:
            mask = _as_bias(mask, q.dtype)
            if mask.dim() == 3:  # one for each example and head
                mask = mask.reshape(len(q), -1, *mask.shape[1:])
                if mask.shape[1] not in (1, q.shape[1]):
                    raise ValueError(
                        f"attn_mask is for {mask.shape[1]} heads, and {q.shape[1]} are left: give "
                        "one of shape (L, S), or one for each head that is there (num_heads)"
                    )
            found = mask
        if padding is not None:
            padding = _as_bias(padding, q.dtype).reshape(len(q), 1, 1, -1)
            found = padding if found is None else found + padding
        if found is None:
            return None
        return functional.pad(found, (0, k.shape[-2] - found.shape[-1]))


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _inner(layer: nn.MultiheadAttention) -> int:
    """Width of all heads together."""
    if layer.in_proj_weight is not None:
        return layer.in_proj_weight.shape[0] // 3
    return layer.q_proj_weight.shape[0]


def attention_sizes(layer: nn.MultiheadAttention) -> dict[str, Any]:
    """Size attributes that follow from the shapes of a layer's tensors."""
    packed = layer.in_proj_weight is not None
    weights = [layer.in_proj_weight] * 3 if packed else [
        layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    ]  # fmt: skip
    width, kdim, vdim = (one.shape[1] for one in weights)
    inner = _inner(layer)
    return {
        "num_heads": inner // layer.head_dim,
        "embed_dim": width,
        "kdim": kdim,
        "vdim": vdim,
        # TransformerEncoderLayer calls a kernel of torch's own where this is set.
        "_qkv_same_embed_dim": packed and inner == width == layer.out_proj.weight.shape[0],
    }


def fit_attention(layer: nn.MultiheadAttention) -> None:
    """Let a layer be one of torch's own where its heads are as wide as its inputs, else its kin."""
    width, made = _inner(layer), layer.out_proj.weight.shape[0]
    packed = layer.in_proj_weight if layer.in_proj_weight is not None else layer.q_proj_weight
    plain = width == packed.shape[1] == made
    if type(layer) in (FewerHeads, nn.MultiheadAttention):  # not somebody's own
        kind: Any = nn.MultiheadAttention if plain else FewerHeads
        layer.__class__ = kind


def attention_rule(trace: Trace, path: str, layer: Any, args: Any, out: Any) -> None:
    """Rule of `nn.MultiheadAttention`: whole heads go, out of queries, keys, values and output."""
    if type(layer) not in (nn.MultiheadAttention, FewerHeads):
        trace.unknown(f"{path} ({type(layer).__name__})", args)
        trace.clear_axes(out[0])
        return
    query, key, value = [one for one in args if isinstance(one, Tensor)][:3]
    dependencies = trace.dependencies
    heads = dependencies.new_nodes(layer.num_heads, path)
    inner = np.repeat(heads, layer.head_dim)
    for one in (query, key, value):
        for nodes in trace.axes(one)[:-1]:
            dependencies.fix(nodes, f"mixed by {path}")
    _inputs(trace, layer, (query, key, value), inner)
    if layer.in_proj_bias is not None:
        bias = str(trace.path_of(layer.in_proj_bias))
        dependencies.use(bias, 0, np.tile(inner, 3), "through")
    for more in (layer.bias_k, layer.bias_v):
        if more is not None:
            dependencies.use(str(trace.path_of(more)), 2, inner, "through")
    where = f"{path}.out_proj" if path else "out_proj"
    made = _output(trace, where, layer.out_proj, inner, out[0])
    trace.set_axes(out[0], [*trace.axes(query)[:-1], made])
    if out[1] is not None:
        trace.clear_axes(out[1])


def _inputs(trace: Trace, layer: Any, tensors: tuple[Tensor, Tensor, Tensor], inner: Nodes) -> None:
    """Queries, keys and values, by one weight or by three."""
    packed = layer.in_proj_weight is not None
    names = ["in_proj_weight"] if packed else [f"{one}_proj_weight" for one in "qkv"]
    for name, one in zip(names * 3 if packed else names, tensors, strict=True):
        trace.reads(trace.path_of(getattr(layer, name)), 1, trace.axes(one)[-1])
    for name, one in zip(names, tensors, strict=False):
        path = str(trace.path_of(getattr(layer, name)))
        trace.dependencies.use(path, 0, np.tile(inner, 3) if packed else inner, "out")
        trace.dependencies.add_work(path, one.numel() / one.shape[-1] / trace.batch)


def _output(trace: Trace, path: str, layer: Any, inner: Nodes, out: Tensor) -> Nodes:
    weight = str(trace.path_of(layer.weight))
    trace.reads(weight, 1, inner)
    made = trace.makes(weight, 0, out.shape[-1], path)
    if layer.bias is not None:
        trace.dependencies.use(str(trace.path_of(layer.bias)), 0, made, "through")
    trace.dependencies.add_work(weight, out.numel() / out.shape[-1] / trace.batch)
    return made
