"""Dependency rules of products of two tensors: attention scores, `matmul`, `einsum`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_compress.channels.trace import Axes, Trace, tensors_in

__all__ = ["CONTRACTIONS", "contraction"]

CONTRACTIONS = frozenset(
    """
    __matmul__ __rmatmul__ baddbmm bmm einsum matmul mm scaled_dot_product_attention
    """.split()  # noqa: SIM905
)
_BATCH = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def contraction(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Axes of equal meaning are connected; what is summed over stays."""
    if name == "scaled_dot_product_attention":
        _attention(trace, args, kwargs, out)
        return
    if name == "einsum":
        operands = tensors_in(args[1:])
        terms = _terms(args[0], operands) if isinstance(args[0], str) else None
    else:
        operands = tensors_in(args)
        if name == "__rmatmul__":
            operands = operands[::-1]
        if name == "baddbmm":
            if any(one is not None for one in trace.axes(operands[0])):
                terms = None
            operands = operands[1:]
        terms = _of_matmul(operands)
    if terms is None or len(operands) < 1:
        trace.unknown(name, (args, kwargs))
        return
    _contract(trace, name, operands, terms, out)


def _of_matmul(operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """Letters of the axes of a matrix product.

    >>> import torch
    >>> _of_matmul([torch.zeros(2, 3, 4), torch.zeros(4, 5)])
    (['Aik', 'kj'], 'Aij')
    """
    if len(operands) != 2 or any(one.dim() < 2 for one in operands):
        return None
    rank = max(one.dim() for one in operands) - 2
    first, second = (_BATCH[rank - (one.dim() - 2) : rank] for one in operands)
    return [f"{first}ik", f"{second}kj"], f"{_BATCH[:rank]}ij"


def _terms(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """Letters of the axes of an einsum; None for one that is not plain.

    >>> import torch
    >>> _terms("b h i d, b h j d -> b h i j", [torch.zeros(1, 1, 1, 1)] * 2)
    (['bhid', 'bhjd'], 'bhij')
    """
    given, arrow, result = re.sub(r"\s", "", equation).partition("->")
    terms = given.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return None
    same = all(len(term) == one.dim() for term, one in zip(terms, operands, strict=True))
    return (terms, result) if same and all(len(set(one)) == len(one) for one in terms) else None


def _contract(
    trace: Trace, name: str, operands: Sequence[Tensor], terms: tuple[list[str], str], out: Tensor
) -> None:
    dependencies, found = trace.dependencies, {}
    for letter in dict.fromkeys("".join(terms[0])):
        axes, fixed = [], False
        for one, term in zip(operands, terms[0], strict=True):
            if letter in term:
                dim = term.index(letter)
                nodes = trace.axes(one)[dim]
                fixed |= nodes is None and one.shape[dim] > 1
                axes += [] if nodes is None else [nodes]
        size = max((len(one) for one in axes), default=0)
        axes = [one for one in axes if len(one) == size]
        for other in axes[1:]:
            dependencies.connect(axes[0], other)
        if not axes:
            continue
        if letter not in terms[1]:
            dependencies.fix(axes[0], f"{name} sums over them")
        elif fixed:
            dependencies.fix(axes[0], f"meets a tensor of fixed size in {name}")
        else:
            found[letter] = axes[0]
    for result in tensors_in(out):
        trace.set_axes(result, [found.get(letter) for letter in terms[1]])


def _attention(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """Heads go out of queries, keys and values together; a head keeps its width."""
    given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
    q, k, v = (trace.axes(given[one]) for one in ("query", "key", "value"))
    for axes in (q, k, v):
        trace.dependencies.fix(axes[-1], "the width of a head scales its attention")
    for nodes in (k[-2], v[-2]):
        trace.dependencies.fix(nodes, "scaled_dot_product_attention sums over them")
    mask = given.get("attn_mask")
    masks = [] if mask is None else [trace.axes(mask)]
    found: Axes = [None] * out.dim()
    for back in range(3, out.dim() + 1):
        size = out.shape[-back]
        axes = [one[-back] for one in (q, k, v, *masks) if len(one) >= back]
        known = [one for one in axes if one is not None and len(one) == size]
        for other in known[1:]:
            trace.dependencies.connect(known[0], other)
        if known and any(one is None for one in axes[:3]) and size > 1:
            trace.dependencies.fix(known[0], "meets a tensor of fixed size in attention")
        found[-back] = known[0] if known else None
    found[-2], found[-1] = q[-2], v[-1]
    trace.set_axes(out, found)
