"""What a model costs: bytes of its files, operations, and time beside its dense twin."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_compress.coding.artifact import ArtifactInfo, save_compressed
from lightning_compress.conversion.onnx import export_onnx
from lightning_compress.evaluation.cost import file_sizes, macs, parameter_counts
from lightning_compress.evaluation.latency import latency_grid, onnx_runner, torch_runner
from lightning_compress.workflow.int8 import int8_path

__all__ = ["deployed_cost", "layer_rows", "side_by_side_latency", "write_files"]


def deployed_cost(model: Any) -> dict[str, Any]:
    """Parameters, non-zero ones and multiply-accumulates of the part that ships."""
    counts = parameter_counts(model.deployed_module())
    return {**counts, "macs": sum(macs(part, inputs) for part, inputs in model.parts().values())}


def write_files(
    model: Any, folder: Path, export: DictConfig
) -> tuple[dict[str, int | None], ArtifactInfo]:
    """Write a model's `.lcz` and ONNX files; sizes in bytes of all formats.

    A model of several parts has one ONNX file each; their sizes add up.
    """
    artifact = save_compressed(model.deployed_module(), folder / "model.lcz", codec=export.codec)
    sizes: dict[str, int | None] = {**file_sizes(model.deployed_module()), "lcz": artifact.bytes}
    sizes["onnx"] = sizes["onnx_int8"] = None
    if export.onnx:
        infos = [
            export_onnx(part, onnx_path(folder, name), inputs)
            for name, (part, inputs) in model.parts().items()
        ]
        sizes["onnx"] = sum(info.bytes for info in infos)
    return sizes, artifact


def onnx_path(folder: Path, part: str) -> Path:
    """Where a part's ONNX file lies."""
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

    The compressed side's int8 file, if there is one, runs beside the dense side's fp32 file.

    Returns:
        One dict a side: `"torch, 1 thread, batch 1"` -> median, p10, p90, and for the compressed
        side the ratio to the dense one with its quartiles.
    """
    name, (_, inputs) = next(iter(dense.parts().items()))
    pairs = {"torch": [partial(torch_runner, one.parts()[name][0]) for one in (dense, compressed)]}
    if onnx:
        pairs["onnxruntime"] = [partial(onnx_runner, onnx_path(one, name)) for one in folders]
    if onnx and int8_path(folders[1], name).exists():
        files = (onnx_path(folders[0], name), int8_path(folders[1], name))
        pairs["onnxruntime int8"] = [partial(onnx_runner, file) for file in files]
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


def layer_rows(artifact: ArtifactInfo) -> list[dict[str, Any]]:
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
