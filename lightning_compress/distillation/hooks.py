"""Hooks that belong to one fit: left alone by the compiler, inert in copies of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.terms import tensors_of

__all__ = ["Hook", "Taps", "evaluating", "own_random_stream", "without_running_statistics"]


class Hook:
    """A callable that does nothing after deepcopy or pickle, and that `torch.compile` leaves alone.

    A copied module (an average, a saved one) must not teach, and a traced hook is silently wrong.

    >>> import copy
    >>> Hook(lambda: 1)(), copy.deepcopy(Hook(lambda: 1))()
    (1, None)
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = torch.compiler.disable(call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hook."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*_: Any, **__: Any) -> None:
    return None


class Taps:
    """Catches what some layers inside a module give, while it is wanted.

    Args:
        module: where to look.
        paths: of layers inside it.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> taps = Taps(net, ["0"])
    >>> with taps.catching() as found:
    ...     _ = net(torch.zeros(4, 2))
    >>> found["0"].shape
    torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, paths: list[str]) -> None:
        self._found: list[dict[str, Tensor]] = []
        self._handles = [
            module.get_submodule(path).register_forward_hook(Hook(self._catcher(path)))
            for path in dict.fromkeys(paths)
        ]

    def _catcher(self, path: str) -> Callable[..., None]:
        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            # A clone: a layer that follows may change its input in place, values and graph.
            if self._found and (tensors := tensors_of(output)):
                self._found[-1][path] = tensors[0].clone()

        return catch

    def begin(self) -> None:
        """Catch from now on."""
        self._found.append({})

    def end(self) -> dict[str, Tensor]:
        """Stop, and hand over what was caught since `begin`."""
        return self._found.pop()

    def clear(self) -> None:
        """Forget calls that broke off."""
        self._found.clear()

    @contextmanager
    def catching(self) -> Iterator[dict[str, Tensor]]:
        """Catch inside the block."""
        self.begin()
        found = self._found[-1]
        try:
            yield found
        finally:
            self._found.pop()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode without compiling it; each layer gets its own mode back.

    What is compiled before there are hooks inside it would run without them for ever.
    """
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def own_random_stream(module: nn.Module) -> Any:
    """A block that draws without moving the streams that the student draws from."""
    device = next(module.parameters(), torch.zeros(())).device
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)
