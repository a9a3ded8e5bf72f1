"""Make layers smaller: tensors, gradients, optimizer states; and a full model cut for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.errors import TargetError
from lightning_compress.pruning.channel_sizes import check_sizes, fit_sizes, sizes_known
from lightning_compress.pruning.channels import Kept, free_reshapes

__all__ = [
    "match_channels",
    "resize_tensor",
    "select_entries",
    "select_optimizer_state",
    "shrink",
]


def select_entries(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The entries of a tensor that stay, axis by axis.

    >>> select_entries(torch.arange(6).reshape(2, 3), {1: torch.tensor([0, 2])}).tolist()
    [[0, 2], [3, 5]]
    """
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


@torch.no_grad()
def shrink(module: nn.Module, kept: Kept, *, sized: Mapping[str, int] | None = None) -> None:
    """Remove channels in place: parameters stay the objects that they are, gradients are cut too.

    Args:
        module: of the structure that `kept` was made for.
        kept: entries that stay, by path and axis.
        sized: new sizes of layers that hold no tensors.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    known = sizes_known(module, kept)
    for path, dims in kept.items():
        resize_tensor(tensors[path], select_entries(tensors[path].detach(), dims), dims)
    for path, before in known.items():
        fit_sizes(module.get_submodule(path), before)
    for path, size in (sized or {}).items():
        module.get_submodule(path).num_features = size  # type: ignore[assignment]


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
        TargetError: when the two differ in more than sizes along axes of known layers.

    >>> small = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).state_dict()
    >>> net = match_channels(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), small)
    >>> net[0].out_features, net[1].in_features
    (4, 4)
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shapes = {
        name: torch.Size(getattr(state[name], "shape", state[name]))
        for name in tensors
        if name in state
    }
    other = {name: shape for name, shape in shapes.items() if shape != tensors[name].shape}
    if not other:
        return module
    for name, shape in other.items():
        if len(shape) != tensors[name].dim():
            raise TargetError(
                f"{name}: {tuple(tensors[name].shape)} cannot become {tuple(shape)}: it is another "
                "model, not one with fewer channels"
            )
    known = sizes_known(module, other)
    for name, shape in other.items():
        own = tensors[name]
        resize_tensor(own, torch.zeros(shape, dtype=own.dtype, device=own.device))
    for path, before in known.items():
        fit_sizes(module.get_submodule(path), before)
    free_reshapes(module)
    if faults := check_sizes(module):
        raise TargetError(f"the sizes do not fit together: {'; '.join(faults[:3])}")
    return module


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
