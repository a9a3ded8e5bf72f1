"""Tables of runs: for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_compress.files import write_atomically
from lightning_compress.lab.report import wording
from lightning_compress.lab.report.loading import Run, common_root, load_runs, run_name
from lightning_compress.lab.report.pooled import pooled_verdicts
from lightning_compress.lab.report.wording import (
    DASH,
    Results,
    count,
    kilobytes,
    milliseconds,
    notes,
    number,
    scalar,
    section,
    times,
)
from lightning_compress.terminal import printable

__all__ = [
    "EXPORTS",
    "HEADER",
    "INT8_HEADER",
    "LAYER_HEADER",
    "OVERVIEW_HEADER",
    "Cell",
    "Group",
    "Row",
    "csv_table",
    "differing_settings",
    "flatten",
    "int8_rows",
    "layer_rows",
    "main_groups",
    "markdown_lines",
    "markdown_table",
    "overview_rows",
    "print_summary",
    "write_export",
    "zeros",
]
INT8_HEADER = ("Part", "Model", "On integers", "In floating point", "Why not", "Largest error")


def int8_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row a part and side, cells in the order of `INT8_HEADER`."""
    return [
        _row(part, side, ops)
        for side in ("dense", "compressed")
        for part, ops in section(results[side], "int8_ops").items()
        if isinstance(ops, Mapping)
    ]


def _row(part: str, side: str, ops: Mapping[str, Any]) -> tuple[str, ...]:
    if ops.get("refused"):
        return (part, side, DASH, DASH, f"no file: {ops['refused']}", DASH)
    reasons = [f"{name}: {reason}" for name, reason in section(ops, "reasons").items()]
    return (
        part,
        side,
        _counts(section(ops, "int8_ops")),
        _counts(section(ops, "float_ops")),
        "; ".join(reasons) or DASH,
        _error(section(ops, "parity")),
    )


def _counts(ops: Mapping[str, Any]) -> str:
    """Format operators with how often they occur.

    >>> _counts({"QLinearConv": 3, "QGemm": 1})
    '3 QLinearConv, 1 QGemm'
    """
    return ", ".join(f"{count(scalar(times))} {name}" for name, times in ops.items()) or DASH


def _error(parity: Mapping[str, Any]) -> str:
    found = [
        f"{number(error, 2)} ({runtime})"
        for runtime, values in parity.items()
        if isinstance(values, Mapping)
        and (error := scalar(values.get("max_abs_error"))) is not None
    ]
    return ", ".join(found) or DASH


FILE_LABELS = {
    "torch": "torch.save, fp32",
    "safetensors": "safetensors",
    "lcz": ".lcz (entropy coded)",
    "lcz_graph": ".lcz with its int8 graph (runs by itself)",
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
        Group("Quality", f"compressed {wording.MINUS} dense", _quality_rows(results)),
        Group("Files", "dense torch.save ÷ compressed file", _file_rows(results)),
        Group("Size and work", "dense ÷ compressed", _cost_rows(results)),
        Group(
            f"Latency, ms: median (p10{wording.DASH}p90)",
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
    metric: wording.MetricLabel,
    before: float | None,
    after: float | None,
    *,
    floor: str,
    spread: str,
) -> Row:
    dense, compressed, change = scalar(before), scalar(after), wording.DASH
    if dense is not None and compressed is not None:
        change = wording.signed(compressed - dense)
        if dense and math.isfinite(dense) and math.isfinite(compressed):
            change += f" ({wording.signed(100 * (compressed - dense) / abs(dense), 2)} %)"
    label = f"{metric.label} {metric.arrow}".rstrip()
    return Row(label, _value(before), _value(after), change, floor, spread, metric.better)


def _value(value: float | None) -> str:
    """Format a quality: JSON's integers are counts, such as active units."""
    form = wording.count if isinstance(value, int) else number
    return form(scalar(value))


def _spread(spread: Mapping[str, Any]) -> str:
    if not spread:
        return ""
    mean, std, seeds = (scalar(spread.get(key)) for key in ("mean", "std", "n"))
    return f"{number(mean)} ± {number(std, 2)} (n={wording.count(seeds)})"


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
        ("params", "Parameters", wording.count),
        ("nonzero_params", "Non-zero parameters", wording.count),
        ("macs", "MACs (counted dense)", wording.count),
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
    return f"{milliseconds(median)} ({milliseconds(low)}{wording.DASH}{milliseconds(high)})"


LAYER_HEADER = ("Tensor", "Shape", "Weights", "Zeros", "Bits", "Codec", "Stored", "Bound", "Bits/w")


def layer_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row a stored tensor, cells in the order of `LAYER_HEADER`."""
    return [_layer_row(layer) for layer in results.get("layers") or ()]


def _layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    shape, weights = layer.get("shape"), scalar(layer.get("weights"))
    stored = scalar(layer.get("bytes"))
    sizes = [str(size) for size in shape] if isinstance(shape, list) else [wording.DASH]
    return (
        str(layer.get("name", wording.DASH)),
        wording.TIMES.join(sizes) or "scalar",
        wording.count(weights),
        wording.percent(scalar(layer.get("sparsity"))),
        wording.count(scalar(layer.get("bits"))),
        str(layer.get("codec") or wording.DASH),
        kilobytes(stored),
        kilobytes(scalar(layer.get("bound_bytes"))),
        number(None if stored is None or not weights else 8 * stored / weights, 3),
    )


def print_summary(results: Results, console: Console | None = None) -> None:
    """Print headline, main table and verdict of one run to the terminal.

    >>> results = {"model": "vae", "data": "digits", "ratio": 2.0, "compressed": {},
    ...            "dense": {"params": 12}}
    >>> print_summary(results, Console(width=80, no_color=True))
    VAE on digits: 2.00× smaller, ...
    """
    console = console or Console()
    verdict, groups = wording.verdict_of(results), main_groups(results)
    style = {"within": "green", "outside": "red", "unknown": "yellow"}[verdict.tone]
    # Text objects, not strings: a model named "[red]" must not be read as markup.
    console.print(Text(printable(wording.headline(results)), style="bold"))
    notes = "; ".join(f"{group.title.split(',')[0]}: {group.change}" for group in groups)
    table = Table(*HEADER, box=box.SIMPLE_HEAD, caption=f"Change is {notes}", padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.overflow = "fold"  # a narrow terminal must not cut numbers
    for group in groups:
        table.add_row(Text(printable(group.title), style="bold"))
        for row in group.rows:
            table.add_row(*(Text(printable(cell)) for cell in row.cells()))
        table.add_section()
    console.print(table)
    lead = f"{verdict.word}; {verdict.fallen}" if verdict.fallen else verdict.word
    console.print(Text(printable(f"{lead}. {verdict.sentence}"), style=style))


def markdown_table(results: Results) -> str:
    """Return the main table of one run as GitHub Markdown; cells are escaped."""
    lines = [_markdown_line(HEADER), "|:--|--:|--:|--:|--:|--:|"]
    for group in main_groups(results):
        lines.append(f"| **{_markdown_cell(group.title)}** | | | {group.change} | | |")
        lines.extend(_markdown_line(row.cells()) for row in group.rows)
    return "\n".join(lines) + "\n"


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Return the lines of a GitHub Markdown table; cells are escaped.

    >>> markdown_lines(["a"], [["x|y"]])
    ['| a |', '|:--|', '| x\\|y |']
    """
    lines = [_markdown_line(header), "|" + ":--|" * len(header)]
    return [*lines, *map(_markdown_line, rows)]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(plain, safe)
    return " ".join(text.split())


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) of nested mappings; lists are leaves.

    >>> dict(flatten({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def csv_table(runs: Sequence[Results]) -> str:
    """Return all runs as CSV, one row a run, one column a value, unrounded.

    The per-layer list and the metrics' labels are left out: they are not values of the run.

    >>> print(csv_table([{"model": "vae", "dense": {"params": 3}}]))
    model,dense.params
    vae,3
    """
    left_out = ("layers", "metric_info")
    flat = [dict(flatten({k: v for k, v in run.items() if k not in left_out})) for run in runs]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in flat:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return stream.getvalue()


OVERVIEW_HEADER = (
    "#",
    "Run",
    "Ratio",
    ".lcz",
    "Zeros",
    "Measure",
    "Dense",
    "Compressed",
    "Change",
    "Quality",
    "Model",
    "Data",
    "Seed",
    "Settings",
)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and the number to sort by (None: sort by the text)."""

    text: str
    key: float | None = None

    @property
    def numeric(self) -> bool:
        """Whether the cell holds a number, so that it is set to the right."""
        return self.key is not None


def _figure(value: object, form: object = number) -> Cell:
    plain = scalar(value)
    text = form(plain) if callable(form) else str(value)
    # A missing number sorts behind all others, in both directions; the page's script knows NaN.
    return Cell(str(text), math.nan if plain is None else plain)


def zeros(results: Results) -> float | None:
    """Return the fraction of zero parameters of the compressed model."""
    total = scalar(results["compressed"].get("params"))
    nonzero = scalar(results["compressed"].get("nonzero_params"))
    return 1 - nonzero / total if total and nonzero is not None else None


def differing_settings(runs: Sequence[Run], limit: int = 4) -> list[str]:
    """Return for each run the compression settings in which the runs differ, at most `limit`.

    Where nothing differs, the names of the methods are returned instead.
    """
    flat = [dict(flatten(section(run.results, "compression"))) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if len({repr(settings.get(key)) for settings in flat}) > 1
    ]
    texts: list[str] = []
    for run, settings in zip(runs, flat, strict=True):
        shown = [
            f"{key}={_setting(settings[key])}" for key in keys if settings.get(key) is not None
        ]
        more = f", and {len(shown) - limit} more" if len(shown) > limit else ""
        methods = ", ".join(wording.methods(run.results)) or "none recorded"
        texts.append(", ".join(shown[:limit]) + more if shown else methods)
    return texts


def _setting(value: object) -> str:
    # Six digits: a sweep's 0.8300000000000001 was meant as 0.83.
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def overview_rows(runs: Sequence[Run], names: Sequence[str]) -> list[list[Cell]]:
    """Return one row a run, cells in the order of `HEADER`."""
    settings = differing_settings(runs)
    return [
        _overview_row(place, run.results, name, setting)
        for place, (run, name, setting) in enumerate(zip(runs, names, settings, strict=True), 1)
    ]


def _overview_row(place: int, results: Results, name: str, setting: str) -> list[Cell]:
    verdict = section(results, "verdict")
    measure = wording.metric(results, str(verdict.get("metric") or wording.DASH))
    size = section(results["compressed"], "bytes").get("lcz")
    seed = results.get("seed")
    dense, compressed = wording.reference(verdict), scalar(verdict.get("compressed"))
    change = None if dense is None or compressed is None else compressed - dense
    return [
        Cell(str(place), place),
        Cell(name),
        _figure(wording.size_ratio(results), wording.times),
        _figure(size, kilobytes),
        _figure(zeros(results), wording.percent),
        Cell(f"{measure.label} {measure.arrow}".rstrip()),
        _figure(dense),
        _figure(compressed),
        _figure(change, wording.signed),
        Cell(wording.verdict_of(results).word),
        Cell(wording.model_name(results)),
        Cell(results["data"]),
        Cell(str(seed), scalar(seed)) if seed is not None else Cell(wording.DASH, math.nan),
        Cell(setting),
    ]


def write_export(run_dirs: Sequence[str | Path], out: Path) -> Path:
    """Write all runs in or beneath the folders as the file's suffix says.

    Raises:
        ValueError: for a suffix that is none of `EXPORTS`, or a run that cannot be read.
        FileNotFoundError: when a folder holds no `results.json`.
    """
    if out.suffix not in EXPORTS:
        raise ValueError(f"{out}: valid are .html, {', '.join(EXPORTS)}")
    runs, unreadable = load_runs(run_dirs)
    if unreadable:
        reasons = "; ".join(f"{one.path}: {one.reason}" for one in unreadable)
        raise ValueError(f"could not be read: {reasons}")
    root = common_root(run_dirs)
    names = [run_name(run.folder, root) for run in runs]
    text = EXPORTS[out.suffix](runs, names)
    return write_atomically(out, text, what="the report", parents=True)


def _csv(runs: Sequence[Run], names: Sequence[str]) -> str:
    return csv_table([{"run": name, **run.results} for name, run in zip(names, runs, strict=True)])


def _markdown(runs: Sequence[Run], names: Sequence[str]) -> str:
    parts: list[str] = []
    if len(runs) > 1:
        cells = [[cell.text for cell in row] for row in overview_rows(runs, names)]
        parts += ["# All runs", "", *markdown_lines(OVERVIEW_HEADER, cells), ""]
        for one in pooled_verdicts(runs):
            parts += [f"**{one.told}.** {one.sentence}", ""]
    for place, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        parts += _one(place, run, name)
    return "\n".join(parts).rstrip() + "\n"


def _one(place: int, run: Run, name: str) -> list[str]:
    """Markdown of one run: headline, verdict, tables and notes."""
    results = run.results
    layers, engines = layer_rows(results), int8_rows(results)
    parts = [f"## {place}. {name}", "", f"**{wording.headline(results)}**", ""]
    judged = wording.verdict_of(results)
    parts += [f"**{judged.told}.** {judged.sentence}", "", markdown_table(results)]
    if engines:
        parts += ["### What runs on integers", "", *markdown_lines(INT8_HEADER, engines), ""]
    if layers:
        parts += ["### Stored tensors", "", *markdown_lines(LAYER_HEADER, layers), ""]
    return [*parts, *(f"- {note}" for note in notes(results)), ""]


EXPORTS: dict[str, Callable[[Sequence[Run], Sequence[str]], str]] = {
    ".md": _markdown,
    ".csv": _csv,
}
