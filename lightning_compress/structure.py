"""Dataflow between the networks of a module in a training batch, to find the deployed part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.targets import clean_path

__all__ = ["StructureReader", "networks_by_optimizer"]

Owner = tuple[int, ...]  # the optimizers that train a network, by their places
_DATA: Owner = (-1,)
_MOST_BATCHES = 4  # to see each network called: some train in turns


def networks_by_optimizer(
    module: nn.Module, optimizers: Sequence[Optimizer]
) -> list[tuple[str, Owner]]:
    """The largest modules whose parameters one optimizer trains, by path.

    >>> gan = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> networks_by_optimizer(gan, [torch.optim.SGD(one.parameters()) for one in gan])
    [('0', (0,)), ('1', (1,))]
    """
    owners: dict[int, Owner] = {}
    for place, optimizer in enumerate(optimizers):
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            owners[id(parameter)] = (*owners.get(id(parameter), ()), place)
    found: list[tuple[str, Owner]] = []

    def walk(path: str, part: nn.Module) -> None:
        here = {owners[id(one)] for one in part.parameters() if id(one) in owners}
        if len(here) == 1:
            found.append((path, here.pop()))
            return
        for name, child in part.named_children() if here else ():
            walk(f"{path}.{name}" if path else name, child)

    walk("", module)
    return found


class StructureReader:
    """Follows the outputs of networks through one or a few training batches.

    A network is a judge of another one if it receives what that one gives and also what it does
    not give (data, or draws from a prior), and nobody receives what it gives itself. All others
    ship. Tensors are followed through the functions of torch that they go through.

    Args:
        module: the whole.
        optimizers: that train it; each stands for the networks that it owns.

    >>> gan = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 1)])
    >>> reader = StructureReader(gan, [torch.optim.SGD(one.parameters()) for one in gan])
    >>> data = torch.zeros(4, 3)
    >>> reader.begin(data)
    >>> _ = gan[1](gan[0](torch.zeros(4, 2)).detach()), gan[1](data)
    >>> reader.end(), reader.deployed()
    (True, ('0',))
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.networks = networks_by_optimizer(module, optimizers)
        self._module = module
        self._batches = 0
        self._handles: list[Any] = []
        self._mode: _Follow | None = None
        self._inside: list[Owner] = []
        self._labels: Any = WeakTensorKeyDictionary()
        self._storages: dict[int, set[Owner]] = {}
        self._kept: list[Tensor] = []  # so that no storage is another's while it is looked for
        self._shapes: dict[Owner, set[tuple[int, ...]]] = {_DATA: set()}
        self._sizes: dict[Owner, int] = {}
        self._calls: dict[Owner, list[tuple[set[Owner], bool]]] = {}

    @property
    def useful(self) -> bool:
        """Whether several optimizers train networks of their own."""
        return len({owner for _, owner in self.networks}) > 1

    def begin(self, batch: Any) -> None:
        """Follow what is called from now on."""
        if self._handles:
            return
        for one in _tensors(batch):
            self._put(one, {_DATA})
            self._shapes[_DATA].add(tuple(one.shape[1:]))
        for path, owner in self.networks:
            for layer in self._module.get_submodule(path).modules():
                enter, leave = partial(self._enter, owner), partial(self._leave, owner)
                self._handles += [
                    layer.register_forward_pre_hook(_untraced(enter), with_kwargs=True),
                    layer.register_forward_hook(_untraced(leave), always_call=True),
                ]
        if not any(hasattr(one, "_orig_mod") for one in self._module.modules()):
            self._mode = _Follow(self._follow)
            self._mode.__enter__()

    def end(self) -> bool:
        """Stop following; whether enough was seen."""
        if not self._handles:
            return self._batches > 0
        self.stop()
        self._batches += 1
        if self._batches >= _MOST_BATCHES or self.deployed():
            return True
        return all(one in self._calls for _, one in self.networks) and not self._undecided()

    def _undecided(self) -> bool:
        """Whether a network that makes no data has received another's output alone so far."""
        if self.one_network:
            return False
        return any(
            labels - {owner, _DATA}
            for owner in self._calls.keys() - self._makers()
            for labels, _ in self._calls[owner]
        )

    def stop(self) -> None:
        """Remove what follows."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()
        self._storages.clear()
        self._labels = WeakTensorKeyDictionary()
        self._inside.clear()

    def deployed(self) -> tuple[str, ...]:
        """Paths of the networks that ship; empty when none of them judges another."""
        group = self._groups()
        calls: dict[Owner, list[tuple[set[Owner], bool]]] = {}
        for owner, own in self._calls.items():
            for labels, joined in own:
                named = {group.get(one, one) for one in labels} - {group[owner]}
                calls.setdefault(group[owner], []).append((named, joined))
        received = {one for own in calls.values() for labels, _ in own for one in labels}
        makers = {group[one] for one in self._makers()}
        judges = {
            owner
            for owner, own in calls.items()
            if owner not in received and _is_judge(own, makes_data=owner in makers)
        }
        if not judges:
            return ()
        return tuple(
            clean_path(path)
            for path, owner in self.networks
            if group.get(owner, owner) not in judges
        )

    @property
    def one_network(self) -> bool:
        """Whether the optimizers train layers of one network, which feed each other."""
        group = self._groups()
        return len({group.get(owner, owner) for _, owner in self.networks}) == 1

    def _groups(self) -> dict[Owner, Owner]:
        """Optimizers whose networks receive each other's outputs, by the first of them."""
        received = {
            owner: {one for labels, _ in calls for one in labels}
            for owner, calls in self._calls.items()
        }
        first: dict[Owner, Owner] = {owner: owner for owner in received}
        for owner, labels in received.items():
            for other in labels & received.keys():
                if owner in received[other]:
                    old, new = first[other], first[owner]
                    first = {one: new if at == old else at for one, at in first.items()}
        return first

    def _makers(self) -> set[Owner]:
        """Optimizers of networks whose outputs have the shape of the data."""
        data = self._shapes[_DATA]
        return {one for one, shapes in self._shapes.items() if shapes & data} - {_DATA}

    def _enter(self, owner: Owner, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._inside:
            labels: set[Owner] = set()
            joined = False
            for one in _tensors((args, kwargs)):
                mine = self._get(one)
                labels |= mine
                # Data and drawn examples in one tensor, one behind the other.
                rows = max((self._sizes.get(each, 0) for each in mine - {_DATA}), default=0)
                joined |= _DATA in mine and 0 < rows < (len(one) if one.dim() else 0)
            self._calls.setdefault(owner, []).append((labels, joined))
        self._inside.append(owner)

    def _leave(self, owner: Owner, _layer: nn.Module, _args: Any, out: Any) -> None:
        self._inside.pop()
        if self._inside:
            return
        for one in _tensors(out):
            self._put(one, {owner})
            self._kept.append(one)
            self._storages[_place(one)] = {owner}
            self._shapes.setdefault(owner, set()).add(tuple(one.shape[1:]))
            self._sizes[owner] = len(one) if one.dim() else 0

    def _follow(self, given: Any, out: Any) -> None:
        if self._inside:
            return
        results = list(_tensors(out))
        labels = set().union(*map(self._get, _tensors(given))) if results else set()
        for one in results if labels else ():
            self._put(one, labels | self._labels.get(one, set()))

    def _get(self, tensor: Tensor) -> set[Owner]:
        found = self._labels.get(tensor)
        return self._storages.get(_place(tensor), set()) if found is None else found

    def _put(self, tensor: Tensor, labels: set[Owner]) -> None:
        self._labels[tensor] = labels


def _is_judge(calls: Sequence[tuple[set[Owner], bool]], *, makes_data: bool) -> bool:
    """Whether calls with another's outputs stand beside such with data, or with draws."""
    for other in {one for labels, _ in calls for one in labels} - {_DATA}:
        without = [labels for labels, _ in calls if other not in labels]
        real = any(_DATA in labels for labels in without)
        mixed = any(joined for labels, joined in calls if other in labels)
        if real or mixed or (without and not makes_data):
            return True
    return False


class _Follow(TorchFunctionMode):
    """Tells of each function of torch what went in and what came out."""

    def __init__(self, record: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self._record((args, kwargs), out)
        return out


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (one for one in pytree.tree_leaves(tree) if isinstance(one, Tensor))


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no storage: sparse, or a wrapper
        return 0


def _untraced(hook: Callable[..., Any]) -> Any:
    return torch.compiler.disable(hook)
