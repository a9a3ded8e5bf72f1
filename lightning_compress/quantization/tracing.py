"""Which layers are the last ones of a network: their outputs reach no other of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.quantization.hooks import hook_input, hook_output

__all__ = ["LastLayers"]


class LastLayers:
    """Finds them in autograd's graph, from forward passes that run anyway.

    Args:
        layers: by path.
        parts: paths of the networks that ship; what one of them gives another is an output.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> finder = LastLayers({"0": net[0], "2": net[2]})
    >>> import torch; _ = net(torch.zeros(1, 2))
    >>> finder.look(), finder.found()
    (True, ['2'])
    >>> finder.stop()
    """

    def __init__(self, layers: dict[str, nn.Module], parts: Sequence[str] = ("",)) -> None:
        self.part_of = {path: _part(path, parts) for path in layers}
        self._outputs: dict[Any, str] = {}  # autograd nodes of this step
        self._inputs: list[tuple[Any, str]] = []
        self._feeds: set[str] = set()  # layers whose output reaches another one
        self._seen: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for path, layer in layers.items():
            self._hook(path, layer)

    def _hook(self, path: str, layer: nn.Module) -> None:
        def entered(x: Tensor) -> Tensor:
            if x.grad_fn is not None:
                self._inputs.append((x.grad_fn, path))
            return x

        def left(x: Tensor) -> Tensor:
            if x.grad_fn is not None:
                self._outputs[x.grad_fn] = path
                self._seen.add(path)
            return x

        self._handles += [hook_input(layer, entered), hook_output(layer, left)]

    def look(self) -> bool:
        """Read what ran since the last look, and let go of it: whether all layers have run."""
        for start, path in self._inputs:
            self._walk(start, path)
        self._outputs, self._inputs = {}, []
        return self._seen == set(self.part_of)

    def _walk(self, start: Any, path: str) -> None:
        waiting, visited = [start], {start}
        while waiting:
            node = waiting.pop()
            if (source := self._outputs.get(node)) is not None:
                if source != path and self.part_of[source] == self.part_of[path]:
                    self._feeds.add(source)
                continue  # what lies behind it is found from its own input
            for before, _ in node.next_functions:
                if before is not None and before not in visited:
                    visited.add(before)
                    waiting.append(before)

    def found(self) -> list[str]:
        """The last layers among those that ran."""
        return [path for path in self.part_of if path in self._seen - self._feeds]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs, self._inputs = {}, []


def _part(path: str, parts: Sequence[str]) -> str:
    inside = [one for one in parts if one == "" or path == one or path.startswith(f"{one}.")]
    return max(inside, key=len, default="")
