"""Files of the headline table's rows: written, measured and timed beside the dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import export_onnx, load_compressed, onnx_session, save_compressed
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.cost import torch_bytes
from lightning_compress.lab.evaluation.latency import openvino_runner
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.workflow.costs import (
    deployed_cost,
    int8_bytes,
    int8_path,
    write_int8_files,
)
from lightning_compress.lab.workflow.quality import rows
from lightning_compress.quantization.fake_quantize import fake_quantized

from .files import Grid, grid_of, milliseconds_of_parts
from .headline_runs import Runs

__all__ = [
    "OnnxPart",
    "Shipped",
    "controls",
    "lcz",
    "loaded",
    "measured",
    "speeds_of",
    "speeds_of_all",
]

Row = dict[str, Any]
BOUND = 64  # samples of the importance-weighted bound
IMAGES = 1000  # of the test split that it is measured on


@dataclass
class Shipped:
    """A trained model and its file.

    Args:
        model: that computes as the file does.
        kind: of the file, in words.
        bytes: of it.
        home: folder of the files.
        int8: bytes of its int8 ONNX files, where there are any.
        onnx: whether the parts are ONNX files already.
    """

    model: Any
    kind: str
    bytes: int
    home: Path
    int8: int | None = None
    onnx: bool = False


def lcz(
    model: Any, home: Path, *, codec: str = "auto", int8: SplitDataModule | None = None
) -> Shipped:
    """A model as an `.lcz` file; with `int8` also as ONNX files of integers."""
    info = save_compressed(model.deployed_module(), home / "model.lcz", codec=codec)
    whole = None if int8 is None else int8_bytes(write_int8_files(model, home, int8))
    return Shipped(model, ".lcz", info.bytes, home, whole)


def loaded(runs: Runs, home: Path) -> Any:
    """The model of the `.lcz` file in a row's folder."""
    model = runs.fresh()
    load_compressed(home / "model.lcz", model.deployed_module())
    return model.eval()


class OnnxPart(nn.Module):
    """A part of a model that ONNX Runtime computes.

    Args:
        path: of its file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.session = path, self.open(path)

    @staticmethod
    def open(path: Path) -> Any:
        """A session on one thread."""
        return onnx_session(path, threads=1)

    def forward(self, *inputs: Tensor) -> Any:
        """What the file gives: a tensor, or several."""
        names = [one.name for one in self.session.get_inputs()]
        feed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        out = [torch.from_numpy(one) for one in self.session.run(None, feed)]
        return out[0] if len(out) == 1 else tuple(out)


def measured(runs: Runs, shipped: Shipped, dense: Path, rounds: int) -> Row:
    """Quality, bytes, operations, and the speed of the part that draws beside the dense file's."""
    plain = runs.fresh()
    weights = torch_bytes(plain.deployed_module())
    row: Row = runs.start.quality(shipped.model)
    row |= {"file": shipped.kind, "bytes": shipped.bytes, "dense_bytes": weights}
    row |= {"ratio": round(weights / shipped.bytes, 2), "int8_bytes": shipped.int8}
    if not shipped.onnx:
        cost, whole = deployed_cost(shipped.model), deployed_cost(plain)
        row |= {f"{key}_left": cost[key] / whole[key] for key in ("macs", "params")}
        row["nonzero_left"] = cost["nonzero_params"] / whole["params"]
    return row | {"speed": speeds(runs, shipped, dense, rounds)}


def controls(runs: Runs, arm: str, model: Any) -> Row:
    """Of a dense row the real data's own noise; of a VAE's main rows a tighter bound.

    `neg_iwae` has 64 samples, on the first 1,000 images: the same ones, and the same noise, for
    all rows.
    """
    found: Row = {}
    if arm == "dense":
        found["measure"] = runs.start.evaluator(model).describe()
    if runs.kind in ("vae", "recurrent_vae") and arm in runs.model.main:
        x = rows(runs.start.data.test_dataset)[0][:IMAGES]
        with fake_quantized(model):
            found["neg_iwae"] = likelihood(model, x, importance_samples=BOUND)["neg_iwae"]
    return found


def speeds(runs: Runs, shipped: Shipped, dense: Path, rounds: int) -> Row:
    """Times faster than the dense fp32 file, see `speeds_of`; writes the file of the part first."""
    name, (_, inputs) = next(iter(runs.fresh().parts().items()))
    if not shipped.onnx:
        part = getattr(shipped.model, name)
        export_onnx(part, shipped.home / f"{name}.onnx", inputs)
    return speeds_of(runs, shipped.home, dense, rounds)


def speeds_of(runs: Runs, home: Path, dense: Path, rounds: int) -> Row:
    """Times faster than the dense fp32 file under ONNX Runtime, one thread, calls in turn.

    Args:
        runs: of the model.
        home: folder of a row's files; where there is no fp32 file its int8 file is timed.
        dense: folder of the dense row's.
        rounds: calls of each.
    """
    name, (_, inputs) = next(iter(runs.fresh().parts().items()))
    file, whole = home / f"{name}.onnx", int8_path(home, name)
    files = {"fp32": dense / f"{name}.onnx", "this": file if file.exists() else whole}
    if file.exists() and whole.exists():
        files["int8"] = whole
    file = files["this"]
    others: dict[str, Callable[..., Any]] = {}
    for key, path in {"this": file, "int8": files.get("int8")}.items():
        if path is not None and _openvino_takes(path, inputs):
            others[f"{key}, OpenVINO"] = partial(openvino_runner, path)
    grid = grid_of(files, inputs, rounds, others)
    return {
        f"{key}, batch {_batch(where)}": round(1 / at.ratio, 2)
        for where, times in grid.items()
        for key, at in times.items()
        if key != "fp32"
    }


def speeds_of_all(runs: Runs, home: Path, dense: Path, rounds: int) -> Row:
    """The same of all deployed parts, one after the other: medians of each, added up.

    A VAE's encoder and decoder; a generator alone has nothing to add.

    Args:
        runs: of the model.
        home: folder of a row's `.lcz` file, and of its int8 files where there are any.
        dense: folder of the dense row's `.lcz` file.
        rounds: calls of each.
    """
    models = {"fp32": loaded(runs, dense), "this": loaded(runs, home)}
    spent = milliseconds_of_parts(
        _grid_of_part(models, home, name, inputs, rounds)
        for name, (_, inputs) in runs.fresh().parts().items()
    )
    return {
        f"{key}, batch {_batch(where)}": round(spent[where, "fp32"] / ms, 2)
        for (where, key), ms in spent.items()
        if key != "fp32"
    }


def _grid_of_part(models: Row, home: Path, name: str, inputs: Any, rounds: int) -> Grid:
    with TemporaryDirectory() as folder:
        files = {key: Path(folder) / f"{key}.onnx" for key in models}
        for key, model in models.items():
            export_onnx(model.parts()[name][0], files[key], inputs)
        if (whole := int8_path(home, name)).exists():
            files["int8"] = whole
        return grid_of(files, inputs, rounds)


def _batch(where: str) -> str:
    return where.removeprefix("batch").partition("_")[0]


def _openvino_takes(path: Path, inputs: Any) -> bool:
    try:
        openvino_runner(path, inputs)
    except RuntimeError as error:
        print(f"no OpenVINO figures: it refuses {path}: {error}", flush=True)
        return False
    return True
