"""`lightning-compress sensitivity`: a scan of a dense model as a table, a file and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_compress.adaptive.curves import Sensitivity
from lightning_compress.evaluation.sensitivity import check_scan, scan_sensitivity
from lightning_compress.files import write_atomically
from lightning_compress.report.drawing import draw, grid, shorten
from lightning_compress.workflow.quality import METRICS
from lightning_compress.workflow.subjects import Subject, find_subject

__all__ = ["plot_sensitivity", "print_sensitivity", "run_sensitivity", "scan_subject"]


def run_sensitivity(
    words: Sequence[str],
    folder: Path,
    *,
    sparsities: Sequence[float],
    bits: Sequence[int],
    rows: int,
) -> Sensitivity:
    """Scan, print, and write `sensitivity.json` and `sensitivity.png` into a folder.

    Args:
        words: what to scan, see `find_subject`.
        folder: of the files.
        sparsities: to try.
        bits: to try.
        rows: of the validation split that each score is measured on.
    """
    check_scan(sparsities, bits)
    found = scan_subject(find_subject(words, folder), sparsities=sparsities, bits=bits, rows=rows)
    print_sensitivity(found)
    print(found.save(folder / "sensitivity.json"))
    print(plot_sensitivity(found, folder / "sensitivity.png"))
    return found


def scan_subject(
    subject: Subject, *, sparsities: Sequence[float], bits: Sequence[int], rows: int
) -> Sensitivity:
    """Scan a dense model; arguments as `run_sensitivity`."""
    return scan_sensitivity(
        subject.model,
        subject.score(rows),
        metric=subject.metric,
        better=subject.better,
        sparsities=sparsities,
        bits=bits,
        progress=lambda path: print(f"scanning {path}", flush=True),
    )


def print_sensitivity(found: Sensitivity, console: Console | None = None) -> None:
    """A row a layer: what the metric loses at each sparsity and number of bits."""
    label = METRICS[found.metric].label if found.metric in METRICS else found.metric
    table = Table(title=f"Loss of {label} (dense: {found.dense:.5g}), one layer at a time")
    first = found.layers[0]
    heads = [f"{one:.0%} zeros" for one in first.sparsities] + [f"{one} bits" for one in first.bits]
    for head in ("layer", "weights", *heads):
        table.add_column(head, overflow="fold", justify="left" if head == "layer" else "right")
    for one in found.layers:
        losses = [f"{loss:.3g}" for loss in (*one.sparse_loss, *one.bits_loss)]
        table.add_row(one.path, f"{one.weights:,}", *losses)
    (console or Console(soft_wrap=False)).print(table)


def plot_sensitivity(found: Sensitivity, path: Path) -> Path:
    """Draw a line a layer, over density and over bits, as a PNG file."""
    buffer = io.BytesIO()
    with draw(9.0, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for index, one in enumerate(found.layers):
            style = {"marker": "osv^D"[index % 5], "ms": 4, "color": f"C{index % 10}"}
            label = f"{shorten(one.path, 28)} ({one.weights:,})"
            densities = [1 - sparsity for sparsity in one.sparsities]
            left.plot(densities, one.sparse_loss, label=label, **style)
            right.plot(one.bits, one.bits_loss, **style)
        left.set_xscale("log")
        left.invert_xaxis()
        left.set_yscale("symlog", linthresh=_small(found))
        left.set_xlabel("density of the layer that is pruned")
        right.set_xlabel("bits of the layer that is rounded")
        right.invert_xaxis()
        left.set_title(f"loss of {found.metric}, dense {found.dense:.4g}")
        grid(left, "y")
        grid(right, "y")
        figure.legend(loc="outside right upper", fontsize=7)
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return write_atomically(path, buffer.getvalue(), what="the plot", parents=True)


def _small(found: Sensitivity) -> float:
    """Losses below this are drawn on a straight scale: a thousandth of the dense value."""
    return max(1e-3 * abs(found.dense), 1e-9)
