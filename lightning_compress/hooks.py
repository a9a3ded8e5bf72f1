"""Hooks that `torch.compile` leaves alone and that are inert in copies of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.outputs import flatten

__all__ = [
    "Hook",
    "Taps",
    "hook_input",
    "hook_inputs",
    "hook_output",
    "tensors_of",
]
Change = Callable[[Tensor], Tensor]


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


def hook_input(layer: nn.Module, change: Change, *, first: bool = False) -> RemovableHandle:
    """Change the first input of a layer at each forward pass, `first` before all other hooks.

    >>> layer = nn.Identity()
    >>> handle = hook_input(layer, lambda x: x + 1)
    >>> layer(torch.zeros(1))
    tensor([1.])
    >>> handle.remove()
    """
    hook = Hook(partial(_with_first_changed, change))
    return layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)


def hook_inputs(layer: nn.Module, look: Callable[[tuple[Any, ...]], None]) -> RemovableHandle:
    """Show what a layer is given, positional and by keyword, at each forward pass."""
    hook = Hook(lambda _layer, args, kwargs: look((*args, *kwargs.values())))
    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def hook_output(layer: nn.Module, change: Change) -> RemovableHandle:
    """Change the output of a layer at each forward pass."""
    return layer.register_forward_hook(Hook(lambda _layer, _args, output: change(output)))


def _with_first_changed(
    change: Change, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": change(kwargs["input"])}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output: itself, or those of a container, dataclass or distribution.

    Containers inside a container, such as the states of a recurrent layer, are not looked into.
    """
    if isinstance(output, (tuple, list, Mapping)):
        parts = output.values() if isinstance(output, Mapping) else output
        nested = (tuple, list, Mapping)
        return [one for part in parts if not isinstance(part, nested) for one in tensors_of(part)]
    return [one for one in flatten(output)[0] if isinstance(one, Tensor)]


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
