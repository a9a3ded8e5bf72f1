"""PyTorch's ONNX exporter, with a dynamic batch and nothing silently different."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from lightning_compress.sample_inputs import take_rows

__all__ = [
    "onnx_program",
    "plain_copy",
]

# What the exporter says of its own workings; everything else still reaches the user.
EXPORTER_WARNINGS = (
    ".*_check_is_size will be removed",  # its own use of an old check
    r"The tensor attributes? .*_flat_weights",  # recurrent layers list their weights anew
    "# The axis name: batch.* will not be used",  # all inputs share one batch axis, as meant
)


def onnx_program(
    module: nn.Module, inputs: tuple[Tensor, ...], opset: int | None, *, optimize: bool = True
) -> Any:
    """The exported program; the exporter would bake in a batch size of 1, so it gets 2 or more.

    Raises:
        ValueError: when the opset cannot be reached or the module fixes its batch size.
    """
    with _exporter_warnings_ignored(), torch.no_grad():
        program = torch.onnx.export(
            module,
            take_rows(inputs, max(2, len(inputs[0]))),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=optimize,
            dynamic_shapes=_dynamic_batch(module, len(inputs)),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _check_request(program.model, opset)
    return program


def _dynamic_batch(module: nn.Module, count: int) -> tuple[Any, ...]:
    """One batch axis for `count` inputs; those that `*inputs` takes in stand in a tuple."""
    axes = ({0: torch.export.Dim("batch", min=1)},) * count
    return tuple(inspect.signature(module.forward).bind(*axes).arguments.values())


@contextmanager
def _exporter_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _check_request(model: Any, opset: int | None) -> None:
    """The exporter may give another opset or a fixed batch size without an error."""
    actual = model.opset_imports[""]
    if opset not in (None, actual):
        raise ValueError(f"opset {opset} cannot be reached, the exporter stays at opset {actual}")
    for entry in model.graph.inputs:
        if isinstance(entry.shape[0], int):
            raise ValueError(
                f"input {entry.name!r} has its batch size fixed at {entry.shape[0]} by the "
                "module's forward: use x.shape[0] there, not len(x) or a number"
            )


def plain_copy(module: nn.Module) -> nn.Module:
    """An eval-mode CPU copy with ordinary, frozen parameters; the module stays as it is.

    spectral_norm, weight_norm and any other parametrization are folded into their weights, in the
    new (`torch.nn.utils.parametrizations`) and in the older form (`torch.nn.utils`).

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(plain_copy(layer).state_dict())
    ['bias', 'weight']
    """
    # The older spectral_norm, and recurrent layers, keep graph tensors, which deepcopy refuses.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for attribute in vars(part).values()
        for value in (attribute if isinstance(attribute, list) else [attribute])
        if isinstance(value, Tensor) and not value.is_leaf
    }
    plain = copy.deepcopy(module, memo).cpu().eval()
    for part in list(plain.modules()):
        _remove_parametrizations(part)
        _remove_old_norms(part)
    return plain.requires_grad_(False)


def _remove_parametrizations(part: nn.Module) -> None:
    if not parametrize.is_parametrized(part):
        return
    # A copy shares its class with the original, and removal deletes the class's property.
    shared = type(part)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    own = type(shared.__name__, shared.__bases__, body)
    part.__class__ = own  # pyright: ignore[reportAttributeAccessIssue]
    for name in list(part.parametrizations):  # pyright: ignore[reportArgumentType]
        parametrize.remove_parametrizations(part, name)


def _remove_old_norms(part: nn.Module) -> None:
    removers = {"SpectralNorm": remove_spectral_norm, "WeightNorm": remove_weight_norm}
    for hook in list(part._forward_pre_hooks.values()):
        remove = removers.get(type(hook).__name__)
        if remove is not None and type(hook).__module__.startswith("torch.nn.utils"):
            remove(part, hook.name)  # pyright: ignore[reportFunctionMemberAccess]
