"""Contexts of a module: eval mode, without foreign hooks, with a random stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    "bare",
    "evaluating",
    "own_random_stream",
    "without_running_statistics",
]


@contextmanager
def evaluating(
    module: nn.Module, *, gradients: bool = False, eager: bool = False
) -> Iterator[None]:
    """Eval mode for a while; every submodule gets its own former mode back.

    Args:
        module: of any kind.
        gradients: leave gradients as they are; else they are off.
        eager: without compiling: what is compiled before there are hooks inside it would run
            without them for ever.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(net):
    ...     net.training, torch.is_grad_enabled()
    (False, False)
    >>> net[0].training, net[1].training
    (True, False)
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with ExitStack() as stack:
            if not gradients:
                stack.enter_context(torch.no_grad())
            if eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for part, training in modes.items():
            part.training = training  # not train(): it would set the children too


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Without hooks of others, but for those of `torch.nn.utils` that make weights."""
    stored = []
    for layer in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(layer, name)
            kept = {
                key: hook
                for key, hook in hooks.items()
                if type(hook).__module__.startswith("torch.nn.utils")
            }
            stored.append((layer, name, hooks))
            object.__setattr__(layer, name, type(hooks)(kept))
    try:
        yield
    finally:
        for layer, name, hooks in stored:
            object.__setattr__(layer, name, hooks)


@contextmanager
def without_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use the batch's statistics without remembering them."""
    norms = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.training
        and layer.track_running_stats
    ]
    for layer in norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in norms:
            layer.track_running_stats = True


def own_random_stream(module: nn.Module) -> Any:
    """A block that draws without moving the streams that the student draws from."""
    device = next(module.parameters(), torch.zeros(())).device
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)
