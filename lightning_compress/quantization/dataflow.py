"""Who feeds whom in a module, read from a symbolic trace: what it shows holds for every input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

__all__ = ["Dataflow"]

# A positive factor of a channel goes through these, in eval mode, as if they were not there.
_HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
)
_FUNCTIONS = (torch.relu, nn.functional.relu, nn.functional.leaky_relu)


@dataclass(frozen=True)
class Dataflow:
    """The layer behind each layer, where it is the only one.

    Args:
        next_layer: path of a layer -> path of the only layer that reads its output, through
            operations that let positive factors pass.
        stopped: path of a layer -> why there is none.
        norms: path of a layer -> path of the BatchNorm that alone reads its output.

    >>> flow = Dataflow.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Tanh()))
    >>> flow.next_layer, flow.stopped
    ({'0': '2'}, {'2': 'Tanh lets no factor pass'})
    """

    next_layer: dict[str, str]
    stopped: dict[str, str]
    norms: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> Dataflow:
        """Trace a module; one that cannot be traced has an empty flow with the reason under ''."""
        try:
            graph = fx.Tracer().trace(module)
        except Exception as error:  # forward may do, and raise, anything
            first = str(error).strip().split("\n")[0]
            return cls({}, {"": f"the module cannot be traced: {first}"}, {})
        flow, modules = cls({}, {}, {}), dict(module.named_modules())
        calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        for node in graph.nodes:
            path = str(node.target)
            if node.op != "call_module" or not _has_weight(modules[path]):
                continue
            if calls.count(path) > 1:
                flow.stopped[path] = "it is called more than once"
                continue
            flow._follow(node, path, modules, calls)
        return flow

    def _follow(
        self, node: fx.Node, path: str, modules: dict[str, nn.Module], calls: list[str]
    ) -> None:
        direct = True
        while True:
            if len(node.users) != 1:
                self.stopped[path] = f"{len(node.users)} operations read its output"
                return
            node = next(iter(node.users))
            target = str(node.target)
            layer = modules[target] if node.op == "call_module" else None
            if direct and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                self.norms[path] = target
            direct = False
            if layer is not None and _has_weight(layer) and calls.count(target) == 1:
                self.next_layer[path] = target
                return
            if not isinstance(layer, _HOMOGENEOUS) and node.target not in _FUNCTIONS:
                name = type(layer).__name__ if layer is not None else _name(node)
                self.stopped[path] = f"{name} lets no factor pass"
                return


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    return str(getattr(node.target, "__name__", node.target))
