"""How a module is put into its evaluation state, or out of its hooks, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["bare", "evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule gets its own former mode back.

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
        with torch.no_grad():
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
