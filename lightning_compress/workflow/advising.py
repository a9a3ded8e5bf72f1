"""`lightning-compress advise`: from a profile and a scan to a recipe with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_compress.adaptive.curves import Sensitivity
from lightning_compress.adaptive.sizes import part_bytes
from lightning_compress.evaluation.cost import torch_bytes
from lightning_compress.evaluation.profile import LayerProfile, profile_layers
from lightning_compress.evaluation.sensitivity import check_scan
from lightning_compress.files import write_atomically
from lightning_compress.targets import deployed_part
from lightning_compress.workflow.quality import METRICS
from lightning_compress.workflow.recipes import Findings, write_recipe
from lightning_compress.workflow.scanning import (
    plot_sensitivity,
    print_sensitivity,
    scan_subject,
)
from lightning_compress.workflow.subjects import Subject, find_subject

__all__ = ["run_advise"]


def run_advise(
    words: Sequence[str],
    folder: Path,
    *,
    ratio: float,
    sparsities: Sequence[float],
    bits: Sequence[int],
    rows: int,
) -> Path:
    """Profile, scan, and write a recipe that runs; prints how.

    Args:
        words: the model, see `find_subject`.
        folder: of `experiment/advised.yaml`, `sensitivity.json` and `sensitivity.png`.
        ratio: how much smaller than the dense `torch.save` file the model is to be.
        sparsities: to try in the scan.
        bits: to try.
        rows: of the validation split that each score is measured on.

    Returns:
        The recipe's path.

    Raises:
        ValueError: for a ratio that is none, or out of reach.
    """
    if not ratio > 1:
        raise ValueError(f"ratio={ratio!r} must be above 1: how much smaller the file is to be")
    check_scan(sparsities, bits)
    subject = find_subject(words, folder)
    model: Any = subject.model.cpu()
    layers = profile_layers(model.parts())
    print_profile(layers)
    scan = scan_subject(subject, sparsities=sparsities, bits=bits, rows=rows)
    print_sensitivity(scan)
    scan.save(folder / "sensitivity.json")
    plot_sensitivity(scan, folder / "sensitivity.png")
    findings = _findings(subject, layers, scan, ratio)
    text = write_recipe(findings)
    path = folder / "experiment" / "advised.yaml"
    write_atomically(path, text, what="the recipe", parents=True)
    print(f"{path}\nTo run it:\n  lightning-compress --config-dir {folder} experiment=advised")
    return path


def _findings(
    subject: Subject, layers: list[LayerProfile], scan: Sensitivity, ratio: float
) -> Findings:
    model: Any = subject.model
    dense = torch_bytes(model.deployed_module())
    stored = part_bytes(model, deployed_part(model))
    rest = sum(size for path, size in stored.items() if path not in {x.path for x in scan.layers})
    left = dense / ratio - rest
    least = sum(min(choice.size for _, _, choice in one.choices()) for one in scan.layers)
    if left < least:
        reach = dense / (rest + least)
        raise ValueError(
            f"ratio={ratio:g} is out of reach of pruning and rounding: biases and norms need "
            f"{rest:,.0f} bytes and the weights {least:,.0f} at least, which is {reach:.0f}x; "
            "give a smaller ratio, higher sparsities, or a narrower student (model width)"
        )
    return Findings(
        kind=subject.kind,
        overrides=subject.overrides,
        source=subject.source,
        metric=METRICS[subject.metric].label,
        dense_bytes=dense,
        ratio=ratio,
        rest_bytes=rest,
        layers=layers,
        scan=scan,
        recipe=scan.recipe(left),
    )


def print_profile(layers: Sequence[LayerProfile], console: Console | None = None) -> None:
    """A row a layer: where the bytes, the operations and the time are."""
    table = Table(title="Where the bytes and the time are")
    for head in ("layer", "kind", "bytes", "share", "MACs", "ms", "share"):
        table.add_column(head, justify="left" if head in ("layer", "kind") else "right")
    size, time = sum(one.bytes for one in layers), sum(one.ms for one in layers)
    for one in layers:
        if one.bytes or one.ms > 0.02 * time:
            shares = one.bytes / max(size, 1), one.ms / max(time, 1e-12)
            table.add_row(
                one.path,
                one.kind,
                f"{one.bytes:,}",
                f"{shares[0]:.1%}",
                f"{one.macs:,}",
                f"{one.ms:.3f}",
                f"{shares[1]:.1%}",
            )
    (console or Console(soft_wrap=False)).print(table)
