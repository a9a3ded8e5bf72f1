"""The rows of the main table and of the table of stored tensors, every cell as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.report import formats, wording
from lightning_compress.report.formats import kilobytes, milliseconds, number, scalar, times
from lightning_compress.report.wording import Results, section

__all__ = ["HEADER", "LAYER_HEADER", "Group", "Row", "layer_rows", "main_groups"]

FILE_LABELS = {
    "torch": "torch.save, fp32",
    "safetensors": "safetensors",
    "lcz": ".lcz (entropy coded)",
    "onnx": "ONNX, fp32",
    "onnx_int8": "ONNX, int8",
}
HEADER = ("", "Dense", "Compressed", "Change", "Floor", "Seed spread")


@dataclass(frozen=True)
class Row:
    """One line of the main table, every cell as text; `better` is "lower", "higher" or ""."""

    label: str
    dense: str
    compressed: str
    change: str
    floor: str = ""
    spread: str = ""
    better: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the cells in the order of `HEADER`."""
        return (self.label, self.dense, self.compressed, self.change, self.floor, self.spread)


@dataclass(frozen=True)
class Group:
    """Rows that belong together, and what their change column means."""

    title: str
    change: str
    rows: tuple[Row, ...]


def _ratio(dense: float | None, compressed: float | None) -> float | None:
    return dense / compressed if dense is not None and compressed else None


def _keys(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> list[str]:
    """Return the keys of both sides, each once, in the order of their first appearance."""
    return list(dict.fromkeys([*dense, *compressed]))


def main_groups(results: Results) -> list[Group]:
    """Return the main table, dense against compressed; groups without values are left out."""
    groups = [
        Group("Quality", f"compressed {formats.MINUS} dense", _quality_rows(results)),
        Group("Files", "dense torch.save ÷ compressed file", _file_rows(results)),
        Group("Size and work", "dense ÷ compressed", _cost_rows(results)),
        Group(
            f"Latency, ms: median (p10{formats.DASH}p90)",
            "dense ÷ compressed; above 1 is faster",
            _latency_rows(results),
        ),
    ]
    return [group for group in groups if group.rows]


def _quality_rows(results: Results) -> tuple[Row, ...]:
    dense, compressed = (section(results[side], "quality") for side in ("dense", "compressed"))
    floor = section(section(results, "evaluator"), "floor")
    spreads = section(results, "baseline_spread")
    return tuple(
        _quality_row(
            wording.metric(results, key),
            dense.get(key),
            compressed.get(key),
            floor=_value(floor[key]) if key in floor else "",
            spread=_spread(section(spreads, key)),
        )
        for key in _keys(dense, compressed)
    )


def _quality_row(
    metric: wording.Metric,
    before: float | None,
    after: float | None,
    *,
    floor: str,
    spread: str,
) -> Row:
    dense, compressed, change = scalar(before), scalar(after), formats.DASH
    if dense is not None and compressed is not None:
        change = formats.signed(compressed - dense)
        if dense and math.isfinite(dense) and math.isfinite(compressed):
            change += f" ({formats.signed(100 * (compressed - dense) / abs(dense), 2)} %)"
    label = f"{metric.label} {metric.arrow}".rstrip()
    return Row(label, _value(before), _value(after), change, floor, spread, metric.better)


def _value(value: float | None) -> str:
    """Format a quality: JSON's whole numbers are counts, such as active units."""
    form = formats.count if isinstance(value, int) else number
    return form(scalar(value))


def _spread(spread: Mapping[str, Any]) -> str:
    if not spread:
        return ""
    mean, std, seeds = (scalar(spread.get(key)) for key in ("mean", "std", "n"))
    return f"{number(mean)} ± {number(std, 2)} (n={formats.count(seeds)})"


def _file_rows(results: Results) -> tuple[Row, ...]:
    dense, compressed = (section(results[side], "bytes") for side in ("dense", "compressed"))
    base = scalar(dense.get("torch"))
    rows = []
    for key in _keys(dense, compressed):
        before, after = scalar(dense.get(key)), scalar(compressed.get(key))
        if before is None and after is None:
            continue  # a format that was not asked for
        ratio = _ratio(base, after)
        if key == "lcz":
            ratio = wording.size_ratio(results)
        label = FILE_LABELS.get(key, key)
        rows.append(Row(label, kilobytes(before), kilobytes(after), times(ratio), better="lower"))
    return tuple(rows)


def _cost_rows(results: Results) -> tuple[Row, ...]:
    shown: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("params", "Parameters", formats.count),
        ("nonzero_params", "Non-zero parameters", formats.count),
        ("macs", "MACs (counted dense)", formats.count),
        ("train_seconds", "Training time, s", number),
    ]
    rows = []
    for key, label, form in shown:
        before, after = (scalar(results[side].get(key)) for side in ("dense", "compressed"))
        if before is not None or after is not None:
            rows.append(Row(label, form(before), form(after), times(_ratio(before, after))))
    return tuple(rows)


def _latency_rows(results: Results) -> tuple[Row, ...]:
    dense, compressed = (section(results[side], "latency_ms") for side in ("dense", "compressed"))
    rows = []
    for key in _keys(dense, compressed):
        before, after = section(dense, key), section(compressed, key)
        ratio = _ratio(scalar(before.get("median")), scalar(after.get("median")))
        rows.append(Row(key, _latency(before), _latency(after), times(ratio), better="lower"))
    return tuple(rows)


def _latency(values: Mapping[str, Any]) -> str:
    median, low, high = (scalar(values.get(key)) for key in ("median", "p10", "p90"))
    if low is None or high is None:
        return milliseconds(median)
    return f"{milliseconds(median)} ({milliseconds(low)}{formats.DASH}{milliseconds(high)})"


LAYER_HEADER = ("Tensor", "Shape", "Weights", "Zeros", "Bits", "Codec", "Stored", "Bound", "Bits/w")


def layer_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row a stored tensor, cells in the order of `LAYER_HEADER`."""
    return [_layer_row(layer) for layer in results.get("layers") or ()]


def _layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    shape, weights = layer.get("shape"), scalar(layer.get("weights"))
    stored = scalar(layer.get("bytes"))
    sizes = [str(size) for size in shape] if isinstance(shape, list) else [formats.DASH]
    return (
        str(layer.get("name", formats.DASH)),
        formats.TIMES.join(sizes) or "scalar",
        formats.count(weights),
        formats.percent(scalar(layer.get("sparsity"))),
        formats.count(scalar(layer.get("bits"))),
        str(layer.get("codec") or formats.DASH),
        kilobytes(stored),
        kilobytes(scalar(layer.get("bound_bytes"))),
        number(None if stored is None or not weights else 8 * stored / weights, 3),
    )
