"""A sharded module to one file: the first process asks for tensor after tensor, the others help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor, distributed

from lightning_compress.sharding import whole_tensor

__all__ = ["Gather", "together"]

Gather = Callable[[str], Tensor]
T = TypeVar("T")


def together(tensors: Mapping[str, Tensor], work: Callable[[Gather], T]) -> T:
    """Run something on the first process that needs whole tensors, one at a time.

    The others wait: they answer what it asks for, and learn how it ended. As it alone decides what
    comes next, an error there, or threads that ask in any order, leave nobody waiting.

    Args:
        tensors: by name, sharded or not; the same names on all processes.
        work: gets a function from a name to the whole tensor.

    Returns:
        What `work` returned, on every process.

    Raises:
        Exception: what `work` raised, on every process.
    """
    if distributed.get_rank() != 0:
        return _help(tensors)
    turn = Lock()

    def gather(name: str) -> Tensor:
        with turn:
            _told(name)
            return whole_tensor(tensors[name])

    try:
        result = work(gather)
    except BaseException as error:
        _told(error)
        raise
    _told([result])
    return result


def _help(tensors: Mapping[str, Tensor]) -> Any:
    while isinstance(said := _told(), str):
        whole_tensor(tensors[said])
    if isinstance(said, BaseException):
        raise said
    return said[0]


def _told(what: Any = None) -> Any:
    """What the first process says next: a name, an error, or a result in a list."""
    box = [what]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
