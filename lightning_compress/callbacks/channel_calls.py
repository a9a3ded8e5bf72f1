"""Which networks of a module a run calls, where nobody says which they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Calls"]

_INSIDE = ("_orig_mod", "parametrizations")  # what is below is not called by name


class Calls:
    """The networks that are called from outside, each with the inputs of its first call.

    Lightning calls `training_step`, never the module. What is called there is a network of its
    own: its inputs and outputs keep their sizes. A network whose inner parts are called by
    themselves too stands for these parts.

    Args:
        module: the whole.
        targets: paths of the parameters that are looked for.
        keep: what to keep of the arguments of a call.

    >>> import torch
    >>> whole = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    >>> calls = Calls(whole, ["net.0.weight", "net.1.weight"], keep=len)
    >>> out = whole["net"](torch.zeros(1, 3))
    >>> calls.roots()
    {'net': 1}
    >>> out = whole["net"][1](torch.zeros(1, 4))
    >>> calls.roots()
    {'net.0': 1, 'net.1': 1}
    >>> calls.stop()
    """

    def __init__(
        self, module: nn.Module, targets: Sequence[str], *, keep: Callable[[Any], Any]
    ) -> None:
        self.targets, self._keep = list(targets), keep
        self._inputs: dict[str, Any] = {}
        self._outermost: set[str] = set()
        self._compiled: set[str] = set()
        self._inside = 0
        self._handles: list[Any] = []
        for path in _holders(targets):
            layer = module.get_submodule(path)
            if hasattr(layer, "_orig_mod"):
                self._compiled.add(path)
            self._handles.append(layer.register_forward_pre_hook(partial(self._enter, path)))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _enter(self, path: str, _layer: nn.Module, args: Any) -> None:
        if path not in self._inputs:
            self._inputs[path] = self._keep(args)
        if not self._inside:
            self._outermost.add(path)
        self._inside += 1

    def _leave(self, _layer: nn.Module, _args: Any, _out: Any) -> None:
        self._inside -= 1

    def roots(self) -> dict[str, Any]:
        """The inputs of each network so far, by its path."""
        whole = [
            path
            for path in self._inputs
            if not any(_below(other, path) for other in self._outermost)
        ]
        return {
            self._uncompiled(path): self._inputs[path]
            for path in whole
            if not any(_below(path, other) for other in whole)
        }

    def _uncompiled(self, path: str) -> str:
        """What torch.compile wraps is plain Python inside, which can be followed."""
        return f"{path}._orig_mod" if path in self._compiled else path

    def missed(self) -> list[str]:
        """Targets that are in none of the networks."""
        roots = self.roots()
        return [one for one in self.targets if not any(_below(one, root) for root in roots)]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _holders(targets: Iterable[str]) -> list[str]:
    """Paths of the modules around parameters, from the outside in."""
    found = [""]
    for target in targets:
        names = target.split(".")[:-1]
        inner = next((at for at, name in enumerate(names) if name in _INSIDE), len(names))
        found += [".".join(names[: at + 1]) for at in range(inner)]
    return list(dict.fromkeys(found))


def _below(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
