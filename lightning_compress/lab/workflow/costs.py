"""Costs of a run: bytes of its files, operations, and latency beside the dense baseline."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_compress.conversion.checks import OnnxMismatchError
from lightning_compress.conversion.export import OnnxInfo, export_onnx
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.cost import file_sizes, macs, parameter_counts
from lightning_compress.lab.evaluation.latency import latency_grid, onnx_runner, torch_runner
from lightning_compress.lcz.artifact import load_compressed, save_compressed, write_graph
from lightning_compress.lcz.info import ArtifactInfo
from lightning_compress.lcz.rdoq import check_rdoq
from lightning_compress.lcz.write import Encoding
from lightning_compress.state import compression_state

__all__ = [
    "check_export",
    "deployed_cost",
    "deployed_inputs",
    "graph_name",
    "graph_path",
    "inputs_in_use",
    "int8_bytes",
    "int8_path",
    "int8_records",
    "side_by_side_latency",
    "tensor_records",
    "write_files",
    "write_graph_file",
    "write_int8_files",
]
DRAWN = 64
BATCHES = 4  # that show the ranges of activations


def int8_path(folder: Path, part: str) -> Path:
    """Path of a part's int8 file."""
    return folder / f"{part}.int8.onnx"


def graph_path(folder: Path) -> Path:
    """Path of the `.lcz` file that holds the runnable graph, for `onnx_session`."""
    return folder / "model.graph.lcz"


def graph_name(part: str, parts: int) -> str | None:
    """Name of a part's graph in a file of so many graphs; None: it is the only one."""
    return part if parts > 1 else None


def write_graph_file(folder: Path, infos: Mapping[str, OnnxInfo | OnnxMismatchError]) -> int | None:
    """Write the int8 files of all parts into one `.lcz` file that runs; its size.

    None, and no file, where a part has no int8 file.
    """
    path = graph_path(folder)
    if not infos or any(isinstance(info, OnnxMismatchError) for info in infos.values()):
        path.unlink(missing_ok=True)  # of an earlier run in this folder
        return None
    graphs = {graph_name(part, len(infos)) or "": int8_path(folder, part) for part in infos}
    return write_graph(graphs, path).bytes


def write_int8_files(
    model: Any, folder: Path, data: SplitDataModule
) -> dict[str, OnnxInfo | OnnxMismatchError]:
    """One int8 ONNX file for each part of a model, or why its check refused the file.

    A part whose activations were quantized in training keeps those grids. Otherwise training data
    and latents from the prior show their ranges: the inputs of the part in use.
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


def int8_records(infos: dict[str, OnnxInfo | OnnxMismatchError]) -> dict[str, Any]:
    """Entry of the int8 files in `results.json`: operators, reasons, differences."""
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


def inputs_in_use(
    model: Any, part: nn.Module, data: SplitDataModule, batches: int = BATCHES
) -> list[tuple[Tensor, ...]]:
    """Inputs of a part while the model samples, and encodes or classifies training data."""
    seen: list[tuple[Tensor, ...]] = []
    model = model.cpu().eval()
    handle = part.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(one.detach().clone() for one in inputs))
    )
    try:
        with torch.no_grad():
            for use in _uses(model, data, batches):
                use()
    finally:
        handle.remove()
    return seen


def deployed_inputs(model: Any, data: SplitDataModule) -> Any:
    """The `data` of `save_compressed` for a deployed module: `inputs_in_use`, by part."""
    inputs = {name: inputs_in_use(model, part, data) for name, (part, _) in model.parts().items()}
    several = isinstance(model.deployed_module(), nn.ModuleDict)
    return inputs if several else next(iter(inputs.values()))


def _uses(model: Any, data: SplitDataModule, count: int) -> Iterable[Callable[[], Any]]:
    batches = [batch[0] for batch in islice(data.train_dataloader(), count)]
    if getattr(model, "kind", None) == "conditional":
        return [lambda x=x: model.outputs(x) for x in batches]
    if not hasattr(model, "latents"):
        return [lambda x=x: model(x) for x in batches]
    draw = model.sequences if getattr(model, "discrete", False) else model.images
    latents = [model.latents(DRAWN, seed=seed) for seed in range(count)]
    uses: list[Callable[[], Any]] = [lambda z=z: draw(z) for z in latents]
    if hasattr(model, "posterior"):
        uses += [lambda x=x: model.posterior(x) for x in batches]
    return uses


def deployed_cost(model: Any) -> dict[str, Any]:
    """Parameters, non-zero ones and multiply-accumulates of the deployed part.

    A part that runs several times for one result (`part_calls` of the model, such as a sampler's
    step) counts as often; `calls` says so.
    """
    counts, calls = parameter_counts(model.deployed_module()), getattr(model, "part_calls", {})
    total = sum(
        calls.get(name, 1) * macs(part, inputs) for name, (part, inputs) in model.parts().items()
    )
    return {**counts, "macs": total, **({"calls": calls} if calls else {})}


def check_export(export: DictConfig) -> None:
    """Refuse wrong values of the `export` settings, which are used when training is over.

    Raises:
        ValueError: with the key, the value and the valid ones.
    """
    try:
        Encoding(export.get("codec", "auto"), export.get("float_dtype"))
        check_rdoq(export.get("rdoq") or None, has_data=False)
    except ValueError as error:
        raise ValueError(f"export.{error}") from None


def write_files(
    model: Any,
    folder: Path,
    export: DictConfig,
    data: SplitDataModule | None = None,
    *,
    lossy: bool = False,
) -> tuple[dict[str, int | None], ArtifactInfo]:
    """Write a model's `.lcz` and ONNX files; sizes in bytes of all formats.

    A model of several parts has one ONNX file each; their sizes add up.

    Args:
        model: the model.
        folder: of the files.
        export: the config.
        data: for `rdoq` of the config: its training data show what the weights are worth.
        lossy: whether `float_dtype`, `fold_batchnorm` and `rdoq` count. The model then has the
            values of its file, so that what is measured next is what is deployed.
    """
    module, path = model.deployed_module(), folder / "model.lcz"
    choices = {name: export.get(name) for name in ("float_dtype", "fold_batchnorm")}
    choices = {name: value for name, value in choices.items() if value and lossy}
    if lossy and export.get("rdoq") and data is not None:
        choices |= {"rdoq": export.rdoq, "data": deployed_inputs(model, data)}
    artifact = save_compressed(module, path, codec=export.codec, **choices)
    if choices:
        load_compressed(path, module)
    sizes: dict[str, int | None] = {**file_sizes(model.deployed_module()), "lcz": artifact.bytes}
    sizes["lcz_graph"] = sizes["onnx"] = sizes["onnx_int8"] = None
    if export.onnx:
        infos = [
            export_onnx(part, onnx_path(folder, name), inputs)
            for name, (part, inputs) in model.parts().items()
        ]
        sizes["onnx"] = sum(info.bytes for info in infos)
    return sizes, artifact


def onnx_path(folder: Path, part: str) -> Path:
    """Path of a part's ONNX file."""
    return folder / f"{part}.onnx"


def side_by_side_latency(
    dense: Any,
    compressed: Any,
    folders: tuple[Path, Path],
    settings: DictConfig,
    *,
    onnx: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds of the part that draws (or classifies), dense and compressed in turn.

    The compressed side's int8 file, if there is one, runs beside the dense side's fp32 file; from
    the one `.lcz` file that holds it, where that was written.

    Returns:
        One dict a side: `"torch, 1 thread, batch 1"` -> median, p10, p90, and for the compressed
        side the ratio to the dense one with its quartiles.
    """
    name, (_, inputs) = next(iter(dense.parts().items()))
    pairs = {"torch": [partial(torch_runner, one.parts()[name][0]) for one in (dense, compressed)]}
    if onnx:
        pairs["onnxruntime"] = [partial(onnx_runner, onnx_path(one, name)) for one in folders]
    if onnx and int8_path(folders[1], name).exists():
        packed, int8 = graph_path(folders[1]), int8_path(folders[1], name)
        graph = graph_name(name, len(dense.parts()))
        whole = partial(onnx_runner, packed, graph=graph) if packed.exists() else None
        fp32 = partial(onnx_runner, onnx_path(folders[0], name))
        pairs["onnxruntime int8"] = [fp32, whole or partial(onnx_runner, int8)]
    sides: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    threads = sorted({1, os.cpu_count() or 1})
    for runtime, (one, other) in pairs.items():
        grid = latency_grid(
            {"dense": one, "compressed": other},
            inputs,
            threads=threads,
            repeats=settings.latency_repeats,
        )
        for key, timed in grid.items():
            label = f"{runtime}, {_readable(key)}"
            for side, times in zip(sides, timed.values(), strict=True):
                side[label] = {
                    "median": times.median_ms,
                    "p10": times.p10_ms,
                    "p90": times.p90_ms,
                    "ratio": times.ratio,
                    "ratio_q25": times.ratio_q25,
                    "ratio_q75": times.ratio_q75,
                }
    return sides


def _readable(key: str) -> str:
    """`"batch1_threads2"` as `"2 threads, batch 1"`."""
    batch, threads = key.removeprefix("batch").split("_threads")
    return f"{threads} thread{'' if threads == '1' else 's'}, batch {batch}"


def tensor_records(artifact: ArtifactInfo) -> list[dict[str, Any]]:
    """One row a stored tensor, for the report."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "weights": tensor.elements,
            "sparsity": 1 - tensor.nonzero / tensor.elements if tensor.elements else 0.0,
            "bits": tensor.bits,
            "codec": tensor.codec,
            "bytes": tensor.bytes,
            "bound_bytes": tensor.bound_bytes,
        }
        for name, tensor in artifact.per_tensor.items()
    ]
