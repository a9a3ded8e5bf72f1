"""Cost of a model: parameters, multiply-accumulates, bytes on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.modes import evaluating
from lightning_compress.sample_inputs import take_rows

__all__ = [
    "file_sizes",
    "flop_counter",
    "macs",
    "parameter_counts",
    "safetensors_bytes",
    "torch_bytes",
    "unfused_attention",
]


def _bilinear(_a: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of `nn.Bilinear`: each row uses every weight once (times a product of two inputs)."""
    return 2 * prod(weight[1:]) * prod(out_shape)


def _fused_lstm(x: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    """FLOPs of one layer and direction of oneDNN's LSTM, x (steps, N, features)."""
    return 2 * prod(x[:-1]) * (prod(weight_ih) + prod(weight_hh))


# Operators that torch's own table lacks: it would count them as 0 without a word.
FORMULAS = {
    torch.ops.aten._trilinear: _bilinear,
    torch.ops.aten.mkldnn_rnn_layer: _fused_lstm,
}


def flop_counter() -> FlopCounterMode:
    """Torch's counter of matrix products and convolutions, with what its own table lacks."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention as matrix products: its fused CPU kernels are not in the table either."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Stored and non-zero parameters; a shared parameter counts once, buffers do not count.

    >>> layer = nn.Linear(3, 2)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> parameter_counts(layer)
    {'params': 8, 'nonzero_params': 6}
    """
    parameters = list(module.parameters())
    return {
        "params": sum(p.numel() for p in parameters),
        "nonzero_params": sum(int(torch.count_nonzero(p.detach())) for p in parameters),
    }


def macs(module: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of matrix products and convolutions for one example, in eval mode.

    Zeros in the weights are counted like any other value. A transposed convolution counts each
    input position times the whole kernel, also where padding crops the result.

    Args:
        module: is run once, on one example.
        inputs: positional inputs with the batch on axis 0; the first example is used.

    >>> macs(nn.Linear(8, 4), torch.zeros(5, 8))
    32
    """
    example = take_rows(inputs, 1)
    counter = flop_counter()
    with evaluating(module), unfused_attention(), counter:
        module(*example)
    return counter.get_total_flops() // 2


def torch_bytes(module: nn.Module) -> int:
    """Bytes of the file that `torch.save(module.state_dict(), path)` writes."""
    return _bytes("model.pt", lambda path: torch.save(module.state_dict(), path))


def safetensors_bytes(module: nn.Module) -> int:
    """Bytes of the module's safetensors file; shared tensors are stored once."""
    return _bytes("model.safetensors", lambda path: save_model(module, str(path)))


def _bytes(name: str, write: Callable[[Path], object]) -> int:
    """Bytes of a file that is written for its size alone.

    Raises:
        OSError: naming the temporary folder, when there is no room in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            write(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk makes of them
            raise OSError(f"cannot write {path} to measure its size: {error}") from error
        return path.stat().st_size


def file_sizes(module: nn.Module) -> dict[str, int]:
    """Bytes of the module's weights in the two usual formats, headers included.

    >>> sizes = file_sizes(nn.Linear(100, 100))
    >>> sizes["safetensors"] - 4 * 10_100 < 200 < sizes["torch"] - 4 * 10_100
    True
    """
    return {"torch": torch_bytes(module), "safetensors": safetensors_bytes(module)}
