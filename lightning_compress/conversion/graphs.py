"""ONNX models of a trained model's deployed parts, for an `.lcz` file that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_compress.conversion.export import export_onnx
from lightning_compress.hooks import hook_inputs
from lightning_compress.state import compression_state

__all__ = ["SeenInputs", "exported_graphs", "sampled_parts"]

_ROWS = 4  # of a training batch: enough to check an export with

Parts = Mapping[str, tuple[nn.Module, tuple[Any, ...]]]


def sampled_parts(model: Any, shipped: nn.Module, seen: tuple[Any, ...] | None) -> Parts | None:
    """What there is to export, with sample inputs: name -> (module, inputs); "" names a single one.

    Args:
        model: may say by `parts()` the deployed modules and their inputs.
        shipped: the module that is saved.
        seen: inputs that it was given; None: it was not called.

    Returns:
        None where nothing tells the inputs.
    """
    parts = getattr(model, "parts", None)
    known: Any = parts() if callable(parts) else {}
    inside = set(shipped.modules())
    known = {name: part for name, part in known.items() if part[0] in inside}
    if known:
        return known if len(known) > 1 else {"": next(iter(known.values()))}
    example = getattr(model, "example_input_array", None) if shipped is model else None
    if seen is None and example is None:
        return None
    if seen is None:
        seen = example if isinstance(example, tuple) else (example,)
    return {"": (shipped, seen)}


def exported_graphs(parts: Parts) -> dict[str, bytes]:
    """One ONNX model a part: its weights stored as integers if they have grids.

    Raises:
        ValueError: when a part cannot be exported, or differs from PyTorch.
        MissingExtraError: when onnx, onnxscript or onnxruntime is not installed.
    """
    graphs: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.onnx")
        for name, (part, inputs) in parts.items():
            export_onnx(part, path, inputs, int8=bool(compression_state(part, masks=False).grids))
            graphs[name] = path.read_bytes()
    return graphs


class SeenInputs:
    """The first rows of what a module is given when it is first called; None: it was not.

    >>> import torch
    >>> layer = nn.Identity()
    >>> seen = SeenInputs(layer)
    >>> _ = layer(torch.zeros(9, 2))
    >>> seen.inputs[0].shape
    torch.Size([4, 2])
    """

    def __init__(self, module: nn.Module) -> None:
        self.inputs: tuple[Any, ...] | None = None
        self._handle = hook_inputs(module, self._take)

    def _take(self, inputs: tuple[Any, ...]) -> None:
        if all(isinstance(one, Tensor) for one in inputs):
            self.inputs = tuple(one.detach()[:_ROWS].cpu().clone() for one in inputs)
        self.stop()

    def stop(self) -> None:
        """Stop looking."""
        self._handle.remove()
