"""What layers know of their sizes: told, set, and compared with their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.modes import evaluating

__all__ = ["check_sizes", "fit_sizes", "set_sizes", "sizes_known", "sizes_of_layers"]

_CONVS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase,)
_CELLS = (nn.GRUCell, nn.LSTMCell, nn.RNNCell)

_SAME_SHAPE = {"_SpectralNorm", "_WeightNorm"}  # parametrizations that keep a weight's shape
_BIASED: dict[type[nn.Module], str] = {
    nn.Linear: "out_features",
    _CONVS: "out_channels",
    nn.modules.batchnorm._NormBase: "num_features",
    nn.GroupNorm: "num_channels",
}
_NAMES = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features",
    "num_channels", "num_groups", "embedding_dim", "input_size", "hidden_size", "proj_size",
    "num_parameters",
)  # fmt: skip


def _layer_path(path: str) -> str:
    return path.partition(".parametrizations.")[0] if ".parametrizations." in path else (
        path.rpartition(".")[0]
    )  # fmt: skip


def sizes_known(module: nn.Module, paths: Iterable[str]) -> dict[str, dict[str, int]]:
    """What the layers of some tensors know of their sizes, by the path of the layer."""
    layers = dict.fromkeys(_layer_path(path) for path in paths)
    owners = {id(module.get_submodule(one)): one for one in layers}
    for path, layer in module.named_modules(remove_duplicate=True):
        tied = any(id(one) in _ids(module, paths) for one in layer.parameters(recurse=False))
        if tied:
            owners.setdefault(id(layer), path)
    return {path: _known(module.get_submodule(path)) for path in owners.values()}


def _ids(module: nn.Module, paths: Iterable[str]) -> set[int]:
    named = dict(module.named_parameters())
    return {id(named[path]) for path in paths if path in named}


def _known(layer: nn.Module) -> dict[str, int]:
    return {
        name: getattr(layer, name) for name in _NAMES if isinstance(getattr(layer, name, None), int)
    }


def fit_sizes(layer: nn.Module, before: Mapping[str, int]) -> None:
    """Let a layer know the sizes of its tensors."""
    _set(layer, **_wanted(layer, before))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()


def _set(layer: nn.Module, **sizes: int) -> None:
    for name, value in sizes.items():
        setattr(layer, name, value)


def sizes_of_layers(module: nn.Module) -> dict[str, dict[str, int]]:
    """What each layer knows of its size, by path.

    >>> sizes_of_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    {'0': {'in_features': 2, 'out_features': 3}}
    """
    found = {path: _known(layer) for path, layer in module.named_modules()}
    return {path: sizes for path, sizes in found.items() if sizes}


def set_sizes(module: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Let layers know the sizes that `sizes_of_layers` told, where they know others."""
    for path, known in sizes.items():
        layer = module.get_submodule(path)
        if _known(layer) != known:
            _set(layer, **known)
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()


def _shape(layer: Any, name: str) -> tuple[int, ...]:
    """The shape of a weight. To compute it in training mode would move spectral_norm's vectors."""
    if not parametrize.is_parametrized(layer, name):
        return tuple(getattr(layer, name).shape)
    stored = layer.parametrizations[name]
    if {type(step).__name__ for step in stored} <= _SAME_SHAPE:
        free = stored.original1 if hasattr(stored, "original1") else stored.original
        return tuple(free.shape)
    with evaluating(layer):
        return tuple(getattr(layer, name).shape)


def _wanted(layer: Any, before: Mapping[str, int]) -> dict[str, int]:
    """The sizes that a layer should know, by the shapes of its tensors."""
    if isinstance(layer, nn.Linear):
        outputs, inputs = _shape(layer, "weight")
        return {"out_features": outputs, "in_features": inputs}
    if isinstance(layer, _CONVS):
        return _conv_sizes(layer, before)
    if isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        each = before["num_channels"] // before["num_groups"]
        size = len(layer.weight)
        return {"num_channels": size, "num_groups": size // each}
    if isinstance(layer, _NORMS):
        known = layer.weight if layer.weight is not None else layer.running_mean
        return {} if known is None else {"num_features": len(known)}
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": _shape(layer, "weight")[1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": len(layer.weight)}
    if isinstance(layer, _CELLS):
        inputs, shown = _shape(layer, "weight_ih")[1], _shape(layer, "weight_hh")[1]
        return {"input_size": inputs, "hidden_size": shown}
    if isinstance(layer, nn.RNNBase):
        return _recurrent_sizes(layer)
    return {}


def _conv_sizes(layer: Any, before: Mapping[str, int]) -> dict[str, int]:
    first, second = _shape(layer, "weight")[:2]
    if before["groups"] > 1 and before["groups"] == before["in_channels"]:  # depthwise
        each = before["out_channels"] // before["in_channels"]
        groups = first if layer.transposed else first // each
        return {"in_channels": groups, "out_channels": groups * each, "groups": groups}
    outputs, inputs = (second, first) if layer.transposed else (first, second)
    groups = before["groups"]
    if layer.transposed:
        return {"in_channels": inputs, "out_channels": outputs * groups}
    return {"in_channels": inputs * groups, "out_channels": outputs}


def _recurrent_sizes(layer: Any) -> dict[str, int]:
    shown = _shape(layer, "weight_hh_l0")[1]
    sizes = {"input_size": _shape(layer, "weight_ih_l0")[1]}
    if layer.proj_size:
        return {**sizes, "proj_size": shown, "hidden_size": _shape(layer, "weight_hr_l0")[1]}
    return {**sizes, "hidden_size": shown}


def check_sizes(module: nn.Module) -> list[str]:
    """What layers say of their sizes and their tensors do not; empty when all is well.

    >>> layer = nn.Linear(2, 3, bias=False)
    >>> layer.out_features = 4
    >>> check_sizes(layer)
    ['(root): out_features is 4, the tensors say 3']
    """
    faults = []
    for path, layer in module.named_modules():
        if any(
            isinstance(one, nn.UninitializedParameter) for one in layer.parameters(recurse=False)
        ):
            continue
        known = _known(layer)
        for name, value in _wanted(layer, known).items():
            if known.get(name, value) != value:
                place = path or "(root)"
                faults.append(f"{place}: {name} is {known[name]}, the tensors say {value}")
        faults += [f"{path or '(root)'}: {fault}" for fault in _odd_tensors(layer)]
    return faults


def _odd_tensors(layer: Any) -> list[str]:
    """Tensors of a layer that do not fit each other."""
    faults = []
    if isinstance(layer, nn.RNNBase):
        rows = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1) * layer.hidden_size
        for name, one in layer.named_parameters(recurse=False):
            if not name.startswith("weight_hr") and len(one) != rows:
                faults.append(f"{name} has {len(one)} rows, not {rows}")
        return faults
    size = _BIASED.get(next((kind for kind in _BIASED if isinstance(layer, kind)), nn.Module))
    for name in ("bias", "running_mean", "running_var") if size else ():
        one, wanted = getattr(layer, name, None), getattr(layer, str(size))
        if isinstance(one, Tensor) and len(one) != wanted:
            faults.append(f"{name} has {len(one)} entries, not {wanted}")
    return faults
