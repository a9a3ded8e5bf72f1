"""Find the networks that a run calls, and their sample inputs, where no root is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import TargetError
from lightning_compress.sample_inputs import placed, sample_inputs
from lightning_compress.targets import Target, clean_path

__all__ = [
    "CalledNetworks",
    "SampleInputs",
    "few_rows",
    "place_inputs",
]
_INSIDE = ("_orig_mod", "parametrizations")  # what is below is not called by name
_ROWS = 2  # examples that are kept of a batch
_WAYS = (
    "Lightning calls training_step and not the module: say what belongs together by "
    "example_input_array and a forward(), by parts(), or by an attribute deployed that names the "
    "deployed networks"
)


class CalledNetworks:
    """Networks that are called from outside, each with the inputs of its first call.

    Lightning calls `training_step`, never the module. What is called there is a network of its
    own: its inputs and outputs keep their sizes. A network whose inner parts are called by
    themselves too stands for these parts.

    Args:
        module: the whole.
        targets: paths of the parameters that are looked for.
        keep: what to keep of the arguments of a call.
        within: path of a network; what is around it is not looked at.

    >>> import torch
    >>> whole = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    >>> calls = CalledNetworks(whole, ["net.0.weight", "net.1.weight"], keep=len)
    >>> out = whole["net"](torch.zeros(1, 3))
    >>> calls.roots()
    {'net': 1}
    >>> out = whole["net"][1](torch.zeros(1, 4))
    >>> calls.roots()
    {'net.0': 1, 'net.1': 1}
    >>> calls.stop()
    """

    def __init__(
        self,
        module: nn.Module,
        targets: Sequence[str],
        *,
        keep: Callable[[Any], Any],
        within: str = "",
    ) -> None:
        self.targets, self._keep = list(targets), keep
        self._inputs: dict[str, Any] = {}
        self._outermost: set[str] = set()
        self._compiled: set[str] = set()
        self._inside: list[bool] = []  # whether each call counts
        self._within, self._forward = within, module.get_submodule(within).forward
        self._handles: list[Any] = []
        for path in _holders(targets):
            if path != within and not _below(path, within):
                continue
            layer = module.get_submodule(path)
            if hasattr(layer, "_orig_mod"):
                self._compiled.add(path)
            enter = partial(self._enter, path)
            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _enter(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        # Lightning calls a whole LightningModule to redirect to `training_step`; checkpointing
        # calls what is inside a module again in the backward pass.
        redirected = path == self._within and layer.forward != self._forward
        counts = not redirected and torch._C._current_graph_task_id() == -1
        if counts and path not in self._inputs:
            self._inputs[path] = self._keep(_positional(layer, args, kwargs))
        if counts and not any(self._inside):
            self._outermost.add(path)
        self._inside.append(counts)

    def _leave(self, _layer: nn.Module, _args: Any, _out: Any) -> None:
        self._inside.pop()

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


def _positional(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call, in the order in which `forward` names them.

    >>> _positional(nn.Linear(2, 1), (), {"input": 3})
    (3,)
    """
    if not kwargs:
        return args
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


class SampleInputs:
    """Sample inputs of some modules: known, or taken from the first batch.

    A network that a batch used through a method, or through its layers, is never called itself:
    those that were called inside take its place.

    Args:
        module: the whole.
        roots: paths of the modules; in place of the whole itself, the networks that are called.
        targets: weights that they hold.
    """

    def __init__(self, module: nn.Module, roots: Sequence[str], targets: Sequence[Target]) -> None:
        self._found: dict[str, tuple[Any, ...]] = {}
        self._handles: list[Any] = []
        self.roots = list(roots)
        self._calls: dict[str, CalledNetworks] = {}
        self.watched = False  # whether the roots are those that were called
        paths = {
            root: [one.path for one in targets if _innermost(one.path, roots) == root]
            for root in roots
        }
        for root in self.roots:
            part = module.get_submodule(root)
            known = sample_inputs(module, clean_path(root), part)
            if known is not None:
                self._found[root] = known
                continue
            self._calls[root] = CalledNetworks(module, paths[root], keep=few_rows, within=root)
            if not root:
                continue

            def look(layer: nn.Module, args: Any, kwargs: Any, root: str = root) -> None:
                self._found.setdefault(root, few_rows(_positional(layer, args, kwargs)))

            self._handles.append(part.register_forward_pre_hook(look, with_kwargs=True))

    @property
    def complete(self) -> bool:
        """Whether inputs of all modules are known."""
        return all(root in self._found for root in self.roots)

    def settle(self) -> list[str]:
        """After a step of the optimizer: the networks that were called take the whole's place.

        Returns:
            Targets that none of them holds, by path.

        Raises:
            TargetError: when none was called.
        """
        waiting = [root for root in self.roots if root not in self._found]
        calls = {root: self._calls[root].roots() for root in waiting}
        missed = [path for root in waiting for path in self._calls[root].missed()]
        if not any((*calls.values(), *self._found)):
            raise TargetError(f"no network was called that holds {missed}. {_WAYS}")
        for root, called in calls.items():
            self._calls.pop(root).stop()
            self.watched = True
            self.roots = [*(one for one in self.roots if one != root), *called]
            self._found |= called
        return missed

    def give(self, module: nn.Module, inputs: Mapping[str, Sequence[Any]]) -> None:
        """Inputs of an earlier part of the run, by path, in place of those of a batch to come."""
        self.stop()
        self._calls, self.roots = {}, list(inputs)
        self._found = place_inputs(module, inputs)

    def explain(self, error: TargetError) -> TargetError:
        """An error of the networks that were called, with the ways out."""
        return TargetError(f"{error}. Called were {self.roots}. {_WAYS}")

    def take(self) -> dict[str, tuple[Any, ...]]:
        """The inputs, by path; looking ends."""
        self.stop()
        return {root: self._found[root] for root in self.roots}

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for calls in self._calls.values():
            calls.stop()

    def __str__(self) -> str:
        return str([root or "the module" for root in self.roots if root not in self._found])


def _innermost(path: str, roots: Sequence[str]) -> str:
    """The root that a target belongs to."""
    return max((one for one in roots if _below(path, one)), key=len, default="")


def few_rows(args: Any) -> Any:
    """A few examples of the arguments of a call, without graphs."""
    tensors = [one for one in pytree.tree_leaves(args) if isinstance(one, Tensor)]
    batch = len(tensors[0]) if tensors and tensors[0].dim() else 0

    def cut(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        rows = one[:_ROWS] if one.dim() and len(one) == batch else one
        return rows.detach().clone()

    return pytree.tree_map(cut, args)


def place_inputs(
    module: nn.Module, inputs: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[Any, ...]]:
    """Sample inputs of some modules, by path, brought to where these are."""
    return {path: placed(tuple(one), module.get_submodule(path)) for path, one in inputs.items()}
