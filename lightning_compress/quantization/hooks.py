"""Forward hooks that copies of a module do not inherit, and that compilation leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["hook_input", "hook_output"]

Change = Callable[[Tensor], Tensor]


class _Inert:
    """What a hook becomes in a copied or unpickled module."""

    def __call__(self, *_: Any) -> None:
        return None


class _Hook:
    def __init__(self, change: Change) -> None:
        # Traced hooks are silently wrong, so the compiler is kept out.
        self.change: Any = torch.compiler.disable(change)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _InputHook(_Hook):
    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self.change(kwargs["input"])}


class _OutputHook(_Hook):
    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        return self.change(output)


def hook_input(layer: nn.Module, change: Change, *, first: bool = False) -> RemovableHandle:
    """Change the first input of a layer at each forward pass, `first` before all other hooks.

    >>> layer = nn.Identity()
    >>> handle = hook_input(layer, lambda x: x + 1)
    >>> layer(torch.zeros(1))
    tensor([1.])
    >>> handle.remove()
    """
    return layer.register_forward_pre_hook(_InputHook(change), with_kwargs=True, prepend=first)


def hook_output(layer: nn.Module, change: Change) -> RemovableHandle:
    """Change the output of a layer at each forward pass."""
    return layer.register_forward_hook(_OutputHook(change))
