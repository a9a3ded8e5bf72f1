"""Where a model's bytes, operations and time are, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.lab.evaluation.cost import flop_counter, unfused_attention
from lightning_compress.modes import evaluating
from lightning_compress.sample_inputs import take_rows

__all__ = ["LayerProfile", "profile_layers"]


@dataclass(frozen=True)
class LayerProfile:
    """One layer that holds weights, or none.

    Args:
        path: of the layer.
        kind: its class.
        bytes: of its own parameters and buffers.
        macs: multiply-accumulates for one example.
        ms: milliseconds for one example, median.
    """

    path: str
    kind: str
    bytes: int
    macs: int
    ms: float


@torch.no_grad()
def profile_layers(
    parts: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]], *, repeats: int = 15
) -> list[LayerProfile]:
    """Profile the layers (modules without children) of some networks, run on one example.

    Args:
        parts: path of each network -> (network, its inputs with the batch on axis 0).
        repeats: timed runs; the median counts.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    >>> found = profile_layers({"net": (net, (torch.ones(2, 8),))})
    >>> [(one.path, one.bytes, one.macs) for one in found]
    [('net.0', 144, 32), ('net.1', 0, 0)]
    """
    found: list[LayerProfile] = []
    for name, (network, inputs) in parts.items():
        example = take_rows(inputs, 1)
        leaves = {path: one for path, one in network.named_modules() if not list(one.children())}
        with evaluating(network):
            times = _times(network, example, leaves, repeats)
            with unfused_attention():
                macs = _macs(network, example, leaves)
        for path, layer in leaves.items():
            full = f"{name}.{path}" if path else name
            ms = median(times[path]) if times[path] else 0.0
            kind = type(layer).__name__
            found.append(LayerProfile(full, kind, _own_bytes(layer), macs[path], ms))
    return found


def _own_bytes(layer: nn.Module) -> int:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return sum(one.numel() * one.element_size() for one in tensors)


def _times(
    network: nn.Module, example: tuple[Tensor, ...], leaves: Mapping[str, nn.Module], repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {path: [] for path in leaves}
    began: dict[str, float] = {}
    handles: list[Any] = []
    for path, layer in leaves.items():
        handles.append(layer.register_forward_pre_hook(_start(began, path)))
        handles.append(layer.register_forward_hook(_stop(began, times, path)))
    try:
        for turn in range(repeats + 1):
            network(*example)
            if turn == 0:  # the first call allocates
                for each in times.values():
                    each.clear()
    finally:
        for handle in handles:
            handle.remove()
    return times


def _start(began: dict[str, float], path: str) -> Any:
    def hook(*_: Any) -> None:
        began[path] = time.perf_counter()

    return hook


def _stop(began: dict[str, float], times: dict[str, list[float]], path: str) -> Any:
    def hook(*_: Any) -> None:
        times[path].append(1e3 * (time.perf_counter() - began[path]))

    return hook


def _macs(
    network: nn.Module, example: tuple[Tensor, ...], leaves: Mapping[str, nn.Module]
) -> dict[str, int]:
    """Of each layer, from torch's own counter around its call alone."""
    counts = dict.fromkeys(leaves, 0)
    open_counters: dict[str, FlopCounterMode] = {}

    def start(path: str) -> Any:
        def hook(*_: Any) -> None:
            counter = flop_counter()
            open_counters[path] = counter
            counter.__enter__()

        return hook

    def stop(path: str) -> Any:
        def hook(*_: Any) -> None:
            counter = open_counters.pop(path)
            counter.__exit__(None, None, None)
            counts[path] += counter.get_total_flops() // 2

        return hook

    handles = []
    for path, layer in leaves.items():
        handles.append(layer.register_forward_pre_hook(start(path)))
        handles.append(layer.register_forward_hook(stop(path)))
    try:
        network(*example)
    finally:
        for handle in handles:
            handle.remove()
    return counts
