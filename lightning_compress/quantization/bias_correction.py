"""Bias correction: the mean that rounding the weights shifts is taken from the bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_compress.quantization.calibration import run_batch
from lightning_compress.quantization.dataflow import Dataflow
from lightning_compress.quantization.hooks import hook_output
from lightning_compress.targets import Coverage

__all__ = ["channel_means", "correct_biases"]


class _Mean:
    """Mean output of a layer, for each output channel."""

    def __init__(self, layer: nn.Module) -> None:
        self.axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        self.total: Tensor | float = 0.0
        self.count = 0

    def see(self, output: Tensor) -> Tensor:
        rows = output.detach().double().transpose(0, self.axis).flatten(1)
        self.total, self.count = self.total + rows.sum(1), self.count + rows.shape[1]
        return output


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Mean]]:
    means = {path: _Mean(layer) for path, layer in layers.items()}
    handles = [hook_output(layer, means[path].see) for path, layer in layers.items()]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def channel_means(
    module: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[object]
) -> dict[str, Tensor]:
    """Mean output over all batches of each layer, (channels,), in the order of their calls."""
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, path=path: order.setdefault(path))
        for path, layer in layers.items()
    ]
    with _watched(layers) as means:
        for batch in batches:
            run_batch(module, batch)
    for handle in handles:
        handle.remove()
    return {path: torch.as_tensor(means[path].total) / means[path].count for path in order}


@torch.no_grad()
def correct_biases(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[object],
    means: Mapping[str, Tensor],
) -> list[Coverage]:
    """Shift biases until each layer has the mean outputs that it had before, in place.

    Layer after layer, so that each sees the corrected ones before it; a layer without a bias is
    corrected in the running mean of the BatchNorm that alone reads it. Nagel et al. 2019,
    arXiv:1906.04721, section 4.2.

    Args:
        module: with quantized weights, in eval mode.
        layers: by path.
        batches: the calibration data.
        means: what `channel_means` gave before the weights were quantized.

    Returns:
        A row a layer: where it was corrected, or why it could not be.
    """
    flow, rows = Dataflow.of(module), []
    for path, before in means.items():
        layer, norm = layers[path], flow.norms.get(path)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        running = None if norm is None else module.get_submodule(norm).running_mean
        if bias is None and not isinstance(running, Tensor):
            why = flow.stopped.get("", "it has no bias, and no BatchNorm alone reads its output")
            rows.append(Coverage(path, (), False, why))
            continue
        shift = channel_means(module, {path: layer}, batches)[path] - before
        if bias is not None:
            bias.sub_(shift.to(bias))
        else:
            assert isinstance(running, Tensor)
            running.add_(shift.to(running))
        where = "in its bias" if bias is not None else f"in the running mean of {norm}"
        rows.append(Coverage(path, (), True, where))
    return rows
