"""Bytes and milliseconds of the files that a benchmark writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_compress import ArtifactInfo, save_compressed
from lightning_compress.lab.evaluation.latency import Latency, latency_grid, onnx_runner

__all__ = ["Grid", "coded", "grid_of", "milliseconds_of_parts"]

Grid = Mapping[str, Mapping[str, Latency]]  # by setting, then by file


def coded(model: Any) -> ArtifactInfo:
    """What the `.lcz` file of a model's deployed part holds; the file is not kept."""
    with TemporaryDirectory() as folder:
        return save_compressed(model.deployed_module(), Path(folder) / "model.lcz")


def grid_of(
    files: Mapping[str, Path],
    inputs: Any,
    rounds: int,
    more: Mapping[str, Callable[..., Any]] | None = None,
) -> Grid:
    """Times of ONNX files under ONNX Runtime on one thread, called in turn.

    Args:
        files: by name; the first one is what the others are compared with.
        inputs: of a call.
        rounds: calls of each.
        more: further runners, such as those of another engine.
    """
    runners = {key: partial(onnx_runner, path) for key, path in files.items()}
    return latency_grid({**runners, **(more or {})}, inputs, threads=(1,), repeats=rounds)


def milliseconds_of_parts(grids: Iterable[Grid]) -> dict[tuple[str, str], float]:
    """Medians of a model's parts, called one after the other, added up by (setting, file)."""
    total: dict[tuple[str, str], float] = {}
    for grid in grids:
        for setting, times in grid.items():
            for key, at in times.items():
                total[setting, key] = total.get((setting, key), 0.0) + at.median_ms
    return total
