"""Low-rank factors of wide weights: one layer to two, and modules to fit files of such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.sharding import is_sharded
from lightning_compress.targets import clean_path

__all__ = ["factorize", "match_factors", "replace_layer", "why_whole"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = (nn.Linear, *_CONVS)


def factorize(layer: nn.Module, rank: float) -> nn.Sequential:
    """Two layers in place of one: the best factors of its weight by singular values.

    A `Linear` of weight W (out, in) becomes `Linear(in, r)` and `Linear(r, out)` with
    `W ~ U S^(1/2) S^(1/2) V^T`; a convolution becomes r kernels and a 1x1 convolution (Zhang et
    al. 2015, arXiv:1505.06798; Denton et al. 2014, arXiv:1404.0736).

    Args:
        layer: a `Linear`, or a convolution of one group.
        rank: r; or, below 1, the part of the weight's energy (sum of squares) that r keeps.

    Returns:
        The two layers; the bias is the second one's, the same parameter.

    >>> factors = factorize(nn.Linear(6, 4), 2)
    >>> factors[0].weight.shape, factors[1].weight.shape
    (torch.Size([2, 6]), torch.Size([4, 2]))
    """
    weight = layer.get_parameter("weight")
    flat = weight.detach().double().flatten(1)
    left, sizes, right = torch.linalg.svd(flat, full_matrices=False)
    r = _rank(sizes, rank)
    root = sizes[:r].sqrt()
    first, second = _layers(layer, r)
    _fill(first, root[:, None] * right[:r], weight)
    _fill(second, left[:, :r] * root, weight)
    bias = layer.bias
    if isinstance(bias, nn.Parameter):
        second.bias = bias
    factors = nn.Sequential(first, second)
    return factors.train(layer.training)


def _rank(sizes: Tensor, rank: float) -> int:
    if rank >= 1:
        return min(int(rank), sizes.numel())
    energy = sizes.square().cumsum(0)
    return min(int((energy < rank * energy[-1]).sum()) + 1, sizes.numel())


def _layers(layer: Any, r: int) -> tuple[Any, Any]:
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, r, bias=False, **place)
        return first, nn.Linear(r, layer.out_features, bias=False, **place)
    kind = next(one for one in _CONVS if isinstance(layer, one))
    kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    rules = {name: getattr(layer, name) for name in kept}
    first = kind(layer.in_channels, r, bias=False, **rules, **place)
    return first, kind(r, layer.out_channels, 1, bias=False, **place)


@torch.no_grad()
def _fill(layer: Any, values: Tensor, like: nn.Parameter) -> None:
    layer.weight.copy_(values.reshape(layer.weight.shape))
    layer.weight.requires_grad_(like.requires_grad)


def why_whole(layer: nn.Module, name: str, rank: float) -> str:
    """Why a weight stays whole; empty: it need not."""
    if name != "weight" or type(layer) not in _KINDS:
        return f"{type(layer).__name__} has no two factors"
    if parametrize.is_parametrized(layer) or getattr(layer, "groups", 1) != 1:
        return "its weight is parametrized, or of several groups"
    weight = layer.get_parameter("weight")
    if is_sharded(weight):
        return "its weight is sharded"
    rows, columns = weight.shape[0], weight[0].numel()
    r = (
        rank
        if rank >= 1
        else _rank(torch.linalg.svdvals(weight.detach().double().flatten(1)), rank)
    )
    if r * (rows + columns) >= rows * columns:
        return f"two factors of rank {int(r)} hold no fewer weights"
    return ""


def replace_layer(module: nn.Module, path: str, factors: nn.Module) -> None:
    """Put another layer at a path of a module."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, factors)


def match_factors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Let layers become two where a file or checkpoint has two, so that it can be loaded.

    Args:
        module: as its class makes it; changed in place.
        tensors: by key of the trained module's `state_dict`: those of `read_tensors`, say.

    Returns:
        The module.

    >>> trained = nn.Sequential(factorize(nn.Linear(6, 4), 2))
    >>> match_factors(nn.Sequential(nn.Linear(6, 4)), trained.state_dict())[0][0].out_features
    2
    """
    for path, layer in list(module.named_modules()):
        one = tensors.get(f"{clean_path(path)}.0.weight")
        is_whole = f"{clean_path(path)}.weight" in tensors
        if type(layer) in _KINDS and one is not None and not is_whole and path:
            replace_layer(module, path, factorize(layer, one.shape[0]))
    return module
