"""What torch's functions do to channels, by their names."""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "ALONG",
    "JOINING",
    "MERGING",
    "MOVES",
    "POINTWISE",
    "POOL",
    "REDUCE",
    "SILENT",
    "SPATIAL",
    "name_of",
]

MOVES = frozenset(
    """
    H T __getitem__ broadcast_to cat channel_shuffle chunk concat concatenate dstack expand
    expand_as flatten flip gather hstack index_select mH mT moveaxis movedim narrow permute
    pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll select
    split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim tensor_split tile
    transpose unbind unflatten unsqueeze view view_as vstack
    """.split()  # noqa: SIM905
)
JOINING = frozenset(
    """
    cat concat concatenate dstack hstack stack vstack
    """.split()  # noqa: SIM905
)
MERGING = frozenset(
    """
    flatten pixel_shuffle ravel reshape reshape_as unflatten view view_as
    """.split()  # noqa: SIM905
)
POINTWISE = frozenset(
    """
    __abs__ __add__ __and__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __invert__
    __isub__ __itruediv__ __le__ __lt__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__
    __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ abs absolute add addcdiv addcmul
    alpha_dropout atan2 bernoulli bfloat16 bool ceil celu clamp clamp_max clamp_min clip clone
    contiguous cos cpu cuda data detach div divide double dropout dropout1d dropout2d dropout3d
    elu empty_like eq erf exp expm1 fake_quantize_per_tensor_affine feature_alpha_dropout
    feature_dropout float floor floor_divide fmax fmin fmod full_like ge gelu gt half hardshrink
    hardsigmoid hardswish hardtanh int isfinite isnan le leaky_relu lerp log log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logsigmoid long lt masked_fill
    maximum minimum mish mul multiply nan_to_num ne neg negative ones_like pow rand_like
    randn_like reciprocal relu relu6 remainder requires_grad requires_grad_ round rrelu rsqrt
    rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tan
    tanh tanhshrink threshold to true_divide type type_as where zeros_like
    """.split()  # noqa: SIM905
)
ALONG = frozenset(
    """
    cumprod cumsum layer_norm log_softmax normalize rms_norm softmax softmin
    """.split()  # noqa: SIM905
)
REDUCE = frozenset(
    """
    all amax amin any argmax argmin count_nonzero logsumexp max mean median min nanmean nansum
    norm prod std std_mean sum var var_mean
    """.split()  # noqa: SIM905
)
SILENT = frozenset(
    """
    __len__ device dim dtype is_cuda item ndim numel shape size stride tolist
    """.split()  # noqa: SIM905
)
SPATIAL = frozenset({"interpolate", "upsample", "pad", "grid_sample", "instance_norm"})
POOL = re.compile(r"(?:adaptive_)?(?:avg|max|lp)_pool([123])d(?:_with_indices)?")


def name_of(func: Any) -> str:
    """The name of a function, or of the attribute that a getter reads.

    >>> import torch
    >>> name_of(torch.relu), name_of(torch.Tensor.shape.__get__)
    ('relu', 'shape')
    """
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name
