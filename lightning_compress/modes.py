"""Contexts of a module: eval mode, without foreign hooks, with a random stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "GeneratorState",
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


@dataclass(frozen=True)
class GeneratorState:
    """Random state of the CPU, and of the GPU that a module is on."""

    cpu: Tensor
    gpu: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module) -> GeneratorState:
        """The present state."""
        device = _device(module)
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu, device)

    def restore(self) -> None:
        """Draw from here on."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


@contextmanager
def own_random_stream(module: nn.Module, state: GeneratorState | None = None) -> Iterator[None]:
    """A block that draws without moving the streams that the student draws from.

    Args:
        module: whose device draws.
        state: where the block's stream begins; None for where the streams are.
    """
    device = _device(module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if state is not None:
            state.restore()
        yield


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.zeros(())).device
