"""int8 files of a trained model: calibrated by the model's own use, and what runs in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.onnx import OnnxInfo, OnnxMismatchError, export_onnx
from lightning_compress.data import SplitDataModule
from lightning_compress.state import compression_state

__all__ = ["inputs_in_use", "int8_bytes", "int8_path", "int8_rows", "write_int8_files"]

DRAWN = 64
BATCHES = 4


def int8_path(folder: Path, part: str) -> Path:
    """Where a part's int8 file lies."""
    return folder / f"{part}.int8.onnx"


def write_int8_files(
    model: Any, folder: Path, data: SplitDataModule
) -> dict[str, OnnxInfo | OnnxMismatchError]:
    """One int8 ONNX file for each part of a model, or why its check refused the file.

    A part whose activations were quantized in training keeps those grids. Otherwise training data
    and latents from the prior show their ranges: what the part is given when the model is used.
    A recurrent part is left without ranges: beside its float recurrence, rounding what one small
    layer reads costs more time than that layer's int8 product saves.
    """
    infos: dict[str, OnnxInfo | OnnxMismatchError] = {}
    for name, (part, sample) in model.parts().items():
        known = compression_state(part).activations or any(map(_recurs, part.modules()))
        calibration = None if known else inputs_in_use(model, part, data)
        path = int8_path(folder, name)
        try:
            infos[name] = export_onnx(part, path, sample, int8=True, calibration=calibration)
        except OnnxMismatchError as error:  # the training that came before is worth its results
            path.unlink(missing_ok=True)  # of an earlier run in this folder
            infos[name] = error
            print(f"no int8 file: {error}", file=sys.stderr, flush=True)
    return infos


def _recurs(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.RNNBase, nn.RNNCellBase))


def int8_bytes(infos: dict[str, OnnxInfo | OnnxMismatchError]) -> int | None:
    """Size of all files together; None where one is missing."""
    if any(isinstance(info, OnnxMismatchError) for info in infos.values()):
        return None
    return sum(info.bytes for info in infos.values() if isinstance(info, OnnxInfo))


def int8_rows(infos: dict[str, OnnxInfo | OnnxMismatchError]) -> dict[str, Any]:
    """What `results.json` says of the files: operators, reasons, differences."""
    return {name: _row(info) for name, info in infos.items()}


def _row(info: OnnxInfo | OnnxMismatchError) -> dict[str, Any]:
    if isinstance(info, OnnxMismatchError):
        return {"refused": str(info)}
    return {
        "int8_ops": dict(info.int8_ops),
        "float_ops": dict(info.float_ops),
        "reasons": dict(info.reasons),
        "parity": {runtime: vars(parity) for runtime, parity in info.parity.items()},
        "session": dict(info.session),
    }


def inputs_in_use(model: Any, part: nn.Module, data: SplitDataModule) -> list[tuple[Tensor, ...]]:
    """What a part is given while the model draws, and encodes or classifies training data."""
    seen: list[tuple[Tensor, ...]] = []
    model = model.cpu().eval()
    handle = part.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(one.detach().clone() for one in inputs))
    )
    try:
        with torch.no_grad():
            for use in _uses(model, data):
                use()
    finally:
        handle.remove()
    return seen


def _uses(model: Any, data: SplitDataModule) -> Iterable[Callable[[], Any]]:
    batches = [batch[0] for batch in islice(data.train_dataloader(), BATCHES)]
    if not hasattr(model, "latents"):
        return [lambda x=x: model(x) for x in batches]
    draw = model.sequences if getattr(model, "discrete", False) else model.images
    latents = [model.latents(DRAWN, seed=seed) for seed in range(BATCHES)]
    uses: list[Callable[[], Any]] = [lambda z=z: draw(z) for z in latents]
    if hasattr(model, "posterior"):
        uses += [lambda x=x: model.posterior(x) for x in batches]
    return uses
