"""Resize layers in place: tensors, gradients and optimizer states, and back to earlier sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lightning_compress.channels.agreement import joint_faults, norms_without_tensors
from lightning_compress.channels.attention import ATTENTION, attention_sizes, fit_attention
from lightning_compress.channels.graph import Kept, ScaledKept, free_reshapes
from lightning_compress.channels.own_sizes import known_sizes, own_sizes, set_own_sizes
from lightning_compress.errors import TargetError
from lightning_compress.modes import evaluating
from lightning_compress.projection import select_entries
from lightning_compress.removed import RemovedChannels
from lightning_compress.state import forget_removed, note_removed, removed_channels
from lightning_compress.targets import older_norm, split_path

__all__ = [
    "CHANNELS",
    "check_sizes",
    "compose",
    "fit_sizes",
    "grow",
    "match_channels",
    "overlay",
    "rebuild_channels",
    "resize_module",
    "resize_tensor",
    "scaled",
    "select_optimizer_state",
    "set_sizes",
    "shrink",
    "sizes_known",
    "sizes_of_layers",
    "structure_of",
]
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
CHANNELS = "removed_channels"  # key in a checkpoint: plain data


def sizes_known(module: nn.Module, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size attributes of the layers that hold some tensors, by the path of the layer."""
    layers = dict.fromkeys(split_path(path)[0] for path in paths)
    owners = {id(module.get_submodule(one)): one for one in layers}
    parameters = dict(module.named_parameters())
    ids = {id(parameters[path]) for path in paths if path in parameters}
    for path, layer in module.named_modules():
        if any(id(one) in ids for one in layer.parameters(recurse=False)):  # tied weights
            owners.setdefault(id(layer), path)
    return {path: _known(module.get_submodule(path)) for path in owners.values()}


def _known(layer: nn.Module) -> dict[str, Any]:
    known = {
        name: getattr(layer, name) for name in _NAMES if isinstance(getattr(layer, name, None), int)
    }
    if isinstance(layer, nn.MultiheadAttention):
        known |= {name: getattr(layer, name) for name in ATTENTION}
    if isinstance(layer, nn.RMSNorm):
        known |= {"normalized_shape": layer.normalized_shape, "eps": layer.eps}
    return known | known_sizes(layer)


def fit_sizes(layer: nn.Module, before: Mapping[str, Any]) -> None:
    """Set a layer's size attributes from its tensors."""
    _set(layer, **_wanted(layer, before))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()


def _set(layer: nn.Module, **sizes: Any) -> None:
    for name, value in sizes.items():
        setattr(layer, name, value)
    if isinstance(layer, nn.MultiheadAttention):
        fit_attention(layer)


def sizes_of_layers(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Size attributes of each layer, by path.

    >>> sizes_of_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    {'0': {'in_features': 2, 'out_features': 3}}
    """
    found = {path: _known(layer) for path, layer in module.named_modules()}
    return {path: sizes for path, sizes in found.items() if sizes}


def set_sizes(module: nn.Module, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set size attributes to what `sizes_of_layers` returned, where they differ."""
    for path, known in sizes.items():
        layer = module.get_submodule(path)
        if _known(layer) != known:
            _set(layer, **known)
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()


def _shape(layer: Any, name: str) -> tuple[int, ...]:
    """The shape of a weight. To compute it in training mode would move spectral_norm's vectors."""
    if not parametrize.is_parametrized(layer, name):
        if older_norm(layer, name) is not None:  # the attribute is that of the last forward pass
            free = next(one for one in (f"{name}_orig", f"{name}_v") if one in layer._parameters)
            return tuple(getattr(layer, free).shape)
        return tuple(getattr(layer, name).shape)
    stored = layer.parametrizations[name]
    if {type(step).__name__ for step in stored} <= _SAME_SHAPE:
        free = stored.original1 if hasattr(stored, "original1") else stored.original
        return tuple(free.shape)
    with evaluating(layer):
        return tuple(getattr(layer, name).shape)


def _wanted(layer: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Size attributes that follow from the shapes of a layer's tensors."""
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
    return _wanted_of_more(layer, before)


def _wanted_of_more(layer: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(layer, nn.RNNBase):
        return _recurrent_sizes(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return attention_sizes(layer)
    if isinstance(layer, nn.RMSNorm) and layer.weight is not None:
        return _rms_sizes(layer, before)
    return {}


def _rms_sizes(layer: nn.RMSNorm, before: Mapping[str, Any]) -> dict[str, Any]:
    """A mean of squares over fewer channels is larger, and so is what is added to it."""
    shape, first = tuple(layer.weight.shape), before["normalized_shape"]
    if shape == tuple(first):
        return {}
    eps = torch.finfo(layer.weight.dtype).eps if before["eps"] is None else before["eps"]
    return {
        "normalized_shape": shape,
        "eps": eps * math.prod(first) / math.prod(shape),
    }


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
    """Size attributes that disagree with the layer's tensors; empty when all agree.

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


@torch.no_grad()
def shrink(module: nn.Module, kept: Kept, *, sized: Mapping[str, int] | None = None) -> None:
    """Remove channels in place: parameters stay the objects that they are, gradients are cut too.

    Args:
        module: of the structure that `kept` was made for.
        kept: entries that stay, by path and axis.
        sized: new sizes of layers that hold no tensors.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    known, own = sizes_known(module, kept), own_sizes(module)
    factors = kept.factors if isinstance(kept, ScaledKept) else {}
    for path, dims in kept.items():
        values = scaled(tensors[path].detach(), factors.get(path, {}))
        resize_tensor(tensors[path], select_entries(values, dims), dims)
    for path, before in known.items():
        fit_sizes(module.get_submodule(path), before)
    for path, size in (sized or {}).items():
        module.get_submodule(path).num_features = size  # type: ignore[assignment]
    set_own_sizes(module, own)


def scaled(values: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """A tensor times factors along its axes.

    >>> scaled(torch.ones(2, 3), {0: torch.tensor([1.0, 2.0])})[1].tolist()
    [2.0, 2.0, 2.0]
    """
    for dim, factor in factors.items():
        shape = [-1 if one == dim else 1 for one in range(values.dim())]
        values = values * factor.to(values).reshape(shape)
    return values


def resize_tensor(tensor: Tensor, values: Tensor, dims: Mapping[int, Tensor] | None = None) -> None:
    """Give a parameter or buffer other values, of another size; it stays the object that it is.

    Args:
        tensor: changed in place.
        values: that it holds from now on.
        dims: entries of its gradient that stay, along axes; None: the gradient goes.
    """
    gradient, tensor.grad = tensor.grad, None
    tensor.set_(values)  # type: ignore[call-overload]  # the object stays: hooks and optimizers hold it
    if gradient is not None and dims is not None:
        tensor.grad = select_entries(gradient, dims)


@torch.no_grad()
def match_channels(module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Give a module's layers the sizes of a `state_dict`, in place, so that it can be loaded.

    The way back from a file: build the model in full size, match, load. Tensors that differ in
    size are empty until then.

    Args:
        module: of the structure that the state was saved from.
        state: a `state_dict`, or shapes by name.

    Returns:
        The module.

    Raises:
        TargetError: when the two differ in more than sizes along axes of known layers, or sizes
            do not fit each other, of one layer or of neighbours; the module is as it was.

    >>> small = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).state_dict()
    >>> net = match_channels(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), small)
    >>> net[0].out_features, net[1].in_features
    (4, 4)
    """
    return resize_module(module, state)


@torch.no_grad()
def resize_module(
    module: nn.Module, state: Mapping[str, Any], sized: Mapping[str, int] | None = None
) -> nn.Module:
    """`match_channels`, of layers without tensors too.

    Args:
        module: changed in place; as it was where an error is raised.
        state: a `state_dict`, or shapes by name.
        sized: new sizes of layers that know one and hold no tensors, by path.

    Returns:
        The module.

    Raises:
        TargetError: when the two differ in more than sizes along axes of known layers, for sizes
            that do not fit each other, and for a layer that is not there or has no such size.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shapes = {
        name: torch.Size(getattr(state[name], "shape", state[name]))
        for name in tensors
        if name in state
    }
    other = {name: shape for name, shape in shapes.items() if shape != tensors[name].shape}
    bare = norms_without_tensors(module, sized or {})
    if not other and all(bare[path].num_features == size for path, size in (sized or {}).items()):
        return module
    for name, shape in other.items():
        if len(shape) != tensors[name].dim():
            raise TargetError(
                f"{name}: {tuple(tensors[name].shape)} cannot become {tuple(shape)}: it is another "
                "model, not one with fewer channels"
            )
    before = _sizes_by_id(module)
    undo = _save_point(module, [tensors[name] for name in other])
    try:
        known, own_attributes = sizes_known(module, other), own_sizes(module)
        for name, shape in other.items():
            own = tensors[name]
            resize_tensor(own, torch.zeros(shape, dtype=own.dtype, device=own.device))
        for path, sizes in known.items():
            fit_sizes(module.get_submodule(path), sizes)
        for path, size in (sized or {}).items():
            bare[path].num_features = size
        set_own_sizes(module, own_attributes)
        free_reshapes(module)
        unknown = {id(one) for path, one in bare.items() if path not in (sized or {})}
        now = {key: one for key, one in _sizes_by_id(module).items() if key not in unknown}
        faults = check_sizes(module) or joint_faults(module, before, now)
    except BaseException:
        undo()
        raise
    if faults:
        undo()
        raise TargetError(f"the sizes do not fit together: {'; '.join(faults[:3])}")
    return module


def _sizes_by_id(module: nn.Module) -> dict[int, dict[str, int]]:
    return {id(layer): sizes for layer in module.modules() if (sizes := _known(layer))}


def _save_point(module: nn.Module, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Save point of tensors and layer sizes: returns the function that restores them."""
    before = [(one, one.detach(), one.grad) for one in tensors]
    sizes = sizes_of_layers(module)
    folds = [
        (one, one.unflattened_size) for one in module.modules() if isinstance(one, nn.Unflatten)
    ]

    @torch.no_grad()
    def undo() -> None:
        for tensor, values, gradient in before:
            tensor.grad = None
            tensor.set_(values)  # type: ignore[call-overload]
            tensor.grad = gradient
        set_sizes(module, sizes)
        for layer, size in folds:
            layer.unflattened_size = size

    return undo


@torch.no_grad()
def select_optimizer_state(
    optimizers: Sequence[Optimizer], kept: Mapping[nn.Parameter, Mapping[int, Tensor]]
) -> list[str]:
    """Cut what optimizers keep for each entry of a parameter; before the parameters shrink.

    Args:
        optimizers: all of them.
        kept: entries that stay, by parameter.

    Returns:
        What could not be cut and begins anew, in words.
    """
    notes = []
    for optimizer in optimizers:
        if hasattr(optimizer, "_numel_cache"):  # LBFGS: one flat vector of all parameters
            if any(one in kept for group in optimizer.param_groups for one in group["params"]):
                optimizer.state.clear()
                optimizer._numel_cache = None  # type: ignore[attr-defined]
                notes.append(f"{type(optimizer).__name__} begins anew: its state is of all weights")
            continue
        for parameter, dims in kept.items():
            state = optimizer.state.get(parameter, {})
            odd = []
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.numel() == 1 < parameter.numel():
                    continue
                if value.shape == parameter.shape:
                    state[name] = select_entries(value, dims)
                else:
                    odd.append(name)
            if odd:
                optimizer.state.pop(parameter)
                notes.append(f"{type(optimizer).__name__} begins anew: {odd} cannot be cut")
    return list(dict.fromkeys(notes))


def rebuild_channels(module: nn.Module, checkpoint: Mapping[str, Any] | None = None) -> None:
    """Cut a module's layers to the sizes of a checkpoint that `ChannelPruning` left, in place.

    One line in a LightningModule lets `load_from_checkpoint`, and `Trainer.test` in another
    process, load the smaller model: `rebuild_channels(self)` at the end of `__init__` or of
    `configure_model`, for every state that is loaded from then on; or, with the checkpoint, in
    `on_load_checkpoint`. A checkpoint without removed channels changes nothing.

    Args:
        module: in full size, or small already.
        checkpoint: as `on_load_checkpoint` gets it; None: whatever is loaded later.

    Raises:
        TargetError: when the two differ in more than channels; the module is as it was.

    >>> rebuild_channels(nn.Linear(2, 2), {"state_dict": {}})
    >>> small, net = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 8))
    >>> rebuild_channels(net)
    >>> net.load_state_dict(small.state_dict()), net[0].out_features
    (<All keys matched successfully>, 3)
    """
    if checkpoint is None:
        known = module._load_state_dict_pre_hooks.values()
        if not any(getattr(one, "hook", one) is _match for one in known):
            module.register_load_state_dict_pre_hook(_match)
        return
    lost = checkpoint.get(CHANNELS)
    if lost is None:
        return
    resize_module(module, checkpoint["state_dict"], lost["sizes"])
    note_removed(module, RemovedChannels(lost["shapes"], lost["sizes"], lost["kept"]))


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: the sizes of its layers."""
    own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    match_channels(module, own)


def compose(first: Kept, then: Kept) -> Kept:
    """Entries that stay of a module after two removals, counted as they were before the first.

    >>> one, two = torch.tensor([0, 2, 3]), torch.tensor([0, 2])
    >>> compose({"weight": {0: one}}, {"weight": {0: two}})["weight"][0].tolist()
    [0, 3]
    """
    found = {path: dict(dims) for path, dims in first.items()}
    for path, dims in then.items():
        known = found.setdefault(path, {})
        for dim, index in dims.items():
            known[dim] = known[dim][index] if dim in known else index
    return found


def overlay(before: Tensor, now: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """An earlier, larger tensor with the entries that are still there as they are now.

    Args:
        before: in the larger size.
        now: in the smaller one.
        kept: where its entries lie along axes of the larger one; axes that are not named are whole.

    >>> before, now = torch.zeros(3), torch.tensor([7.0, 8.0])
    >>> overlay(before, now, {0: torch.tensor([0, 2])}).tolist()
    [7.0, 0.0, 8.0]
    """
    if not kept:
        return now.clone()
    device = now.device
    places = [kept.get(dim, torch.arange(size)).to(device) for dim, size in enumerate(now.shape)]
    merged = before.to(now).clone()
    merged[torch.meshgrid(*places, indexing="ij")] = now
    return merged


def structure_of(module: nn.Module) -> dict[str, Any]:
    """All that `grow` needs to know of a module besides its tensors, as plain data."""
    lost = removed_channels(module)
    return {
        "sizes": sizes_of_layers(module),
        "lost": {"shapes": lost.shapes, "sizes": lost.sizes, "kept": lost.kept},
    }


@torch.no_grad()
def grow(module: nn.Module, tensors: Mapping[str, Tensor], structure: Mapping[str, Any]) -> None:
    """Give a module tensors of other sizes, in place, and its layers the size attributes of then.

    Args:
        module: whose parameters stay the objects that they are, without gradients.
        tensors: all parameters and buffers that change, by name.
        structure: what `structure_of` returned when the module had these sizes.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, values in tensors.items():
        resize_tensor(own[name], values.to(own[name]).clone())
    set_sizes(module, structure["sizes"])
    forget_removed(module)
    lost = structure["lost"]
    note_removed(module, RemovedChannels(lost["shapes"], lost["sizes"], lost["kept"]))
