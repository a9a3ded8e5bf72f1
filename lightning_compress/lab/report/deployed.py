"""The one file to take away: its bytes, its speed, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.lab.report.formats import DASH, kilobytes, milliseconds, scalar, times
from lightning_compress.lab.report.wording import Results, section

__all__ = ["DeployedFile", "deployed_file"]

# The first that was written: key of `bytes`, what it is, where it lies, where it runs, runtime.
CHOICES = (
    (
        "lcz_graph",
        "One .lcz file with its int8 graph",
        "compressed/model.graph.lcz",
        "ONNX Runtime without PyTorch: onnx_session(path)",
        "onnxruntime int8",
    ),
    (
        "onnx_int8",
        "ONNX, int8",
        "compressed/*.int8.onnx",
        "ONNX Runtime, OpenVINO and others that read ONNX: onnx_session(path)",
        "onnxruntime int8",
    ),
    (
        "lcz",
        "One .lcz file, weights alone",
        "compressed/model.lcz",
        "PyTorch: load_compressed(path, module) fills the plain module",
        "torch",
    ),
)


@dataclass(frozen=True)
class DeployedFile:
    """The first artifact of a run.

    Attributes:
        title: what it is.
        path: where it lies in the run's folder.
        size: its bytes, and how often they go into the dense torch.save file.
        speed: of a call, beside the dense model's; a dash where it was not timed.
        runs: where it runs, and the call.
    """

    title: str
    path: str
    size: str
    speed: str
    runs: str


def deployed_file(results: Results) -> DeployedFile | None:
    """The file that a reader should take: the smallest that runs alone; None without a file.

    >>> sides = {"dense": {"bytes": {"torch": 900}}, "compressed": {"bytes": {"lcz_graph": 90}}}
    >>> deployed_file(sides).size
    '0.1 kB, 10.0× smaller than the dense torch.save file'
    """
    sizes = section(results["compressed"], "bytes")
    for key, title, path, runs, runtime in CHOICES:
        size = scalar(sizes.get(key))
        if size is not None and size > 0:
            return DeployedFile(title, path, _size(results, size), _speed(results, runtime), runs)
    return None


def _size(results: Results, size: float) -> str:
    dense = scalar(section(results["dense"], "bytes").get("torch"))
    if not dense:
        return kilobytes(size)
    ratio = f"{times(dense / size)} smaller" if dense >= size else f"{times(size / dense)} larger"
    return f"{kilobytes(size)}, {ratio} than the dense torch.save file"


def _speed(results: Results, runtime: str) -> str:
    """The fewest threads and the smallest batch first: as the run timed them."""
    dense, compressed = (section(results[side], "latency_ms") for side in ("dense", "compressed"))
    for key, values in compressed.items():
        name, _, conditions = str(key).partition(", ")
        fast = _median(values)
        if name == runtime and fast:
            slow = _median(dense.get(key))
            beside = f"; the dense fp32 model takes {milliseconds(slow)} ms" if slow else ""
            ratio = f" ({times(slow / fast)} as fast)" if slow else ""
            return f"{milliseconds(fast)} ms a call{ratio}, {conditions}{beside}"
    return DASH


def _median(values: object) -> float | None:
    found: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
    return scalar(found.get("median"))
