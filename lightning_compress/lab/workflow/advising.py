"""Command `advise`: recipes with reasons, from a layer profile and a sensitivity scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress.budget.reference import part_bytes
from lightning_compress.budget.sensitivity import LayerScan, Sensitivity
from lightning_compress.callbacks.recipe import GOALS, compression_recipe
from lightning_compress.deployment import deployed_part
from lightning_compress.distillation.teachers import DENSE
from lightning_compress.files import write_atomically
from lightning_compress.lab.evaluation.cost import torch_bytes
from lightning_compress.lab.evaluation.profile import LayerProfile, profile_layers
from lightning_compress.lab.evaluation.sensitivity import check_scan
from lightning_compress.lab.workflow.quality import METRICS
from lightning_compress.lab.workflow.sensitivity import (
    Subject,
    find_subject,
    plot_sensitivity,
    print_sensitivity,
    scan_subject,
)

__all__ = [
    "Findings",
    "explain_recipes",
    "run_advise",
    "write_recipe",
]
_GROUPS = ("model", "data")


@dataclass(frozen=True)
class Findings:
    """Profile, sensitivities and recipe of a dense model.

    Args:
        kind: of the model, such as "vae".
        overrides: that lead to it.
        source: where its weights are from.
        metric: name of the quality metric in print.
        dense_bytes: of the `torch.save` file.
        ratio: target compression ratio.
        layers: the profile.
        scan: the sensitivities.
        recipe: sparsity and bits of each layer, by path.
    """

    kind: str
    overrides: Sequence[str]
    source: str
    metric: str
    dense_bytes: int
    ratio: float
    layers: Sequence[LayerProfile]
    scan: Sensitivity
    recipe: dict[str, tuple[float, int]]


def write_recipe(found: Findings) -> str:
    """The text of an experiment's config file."""
    return "\n".join(
        [*_head(found), *_choices(found), *_values(found), *_prune(found), *_quantize(found), ""]
    )


def _head(found: Findings) -> list[str]:
    time, size = _busiest(found)
    aim = found.dense_bytes / found.ratio
    return [
        "# @package _global_",
        f"# Proposed by `lightning-compress advise` for the dense model of {found.source}:",
        f"# {found.dense_bytes:,} bytes as torch.save writes it, to be {found.ratio:g}x smaller, "
        f"{aim:,.0f} bytes.",
        f"# {found.metric} of the dense model on the validation split: {found.scan.dense:.5g}.",
        f"# Most bytes are in {size}, most time in {time}.",
        "# Zeros and few bits make the file small, but no dense runtime is faster for zeros. For",
        "# speed: qat with 8 bits and export.int8=true, or student.width_multiplier=0.5.",
    ]


def _busiest(found: Findings) -> tuple[str, str]:
    size = max(found.layers, key=lambda one: one.bytes)
    time = max(found.layers, key=lambda one: one.ms)
    all_bytes = sum(one.bytes for one in found.layers)
    all_time = max(sum(one.ms for one in found.layers), 1e-12)
    return (
        f"{time.path} ({time.ms / all_time:.0%})",
        f"{size.path} ({size.bytes / max(all_bytes, 1):.0%})",
    )


def _choices(found: Findings) -> list[str]:
    chosen = dict(word.split("=", 1) for word in found.overrides if "=" in word)
    lines = ["defaults:"]
    lines += [f"  - override /{group}: {chosen[group]}" for group in _GROUPS if group in chosen]
    names = ["prune", "qat"]
    if found.kind == "gan":
        lines += [
            "  # A pruned generator alone loses to a discriminator at full strength: the dense one",
            "  # teaches it, as the discriminator sees their images.",
        ]
        names = ["distill_gan", *names]
    return [*lines, f"  - override /compression: [{', '.join(names)}]", ""]


def _values(found: Findings) -> list[str]:
    """The run's own settings of model, data and training."""
    tree: dict[str, dict[str, str]] = {}
    for word in found.overrides:
        key, _, value = word.partition("=")
        group, _, name = key.lstrip("+").partition(".")
        if group in ("model", "data", "trainer") and name and "." not in name:
            tree.setdefault(group, {})[name] = value
    lines = []
    for group, values in tree.items():
        lines += [f"{group}:", *(f"  {name}: {value}" for name, value in values.items())]
    return lines


def _prune(found: Findings) -> list[str]:
    layers = {one.path: one for one in found.scan.layers}
    pruned = {path: s for path, (s, _) in found.recipe.items() if s > 0}
    spared = [path for path in found.recipe if path not in pruned]
    if not pruned:
        pruned = dict.fromkeys(found.recipe, 0.5)
        spared = []
    total = sum(one.weights for one in layers.values())
    zeros = sum(s * layers[path].weights for path, s in pruned.items())
    lines = [
        "compression:",
        "  prune:",
        f"    # {zeros / total:.1%} of all weights, shared out so that the losses of single",
        "    # layers, as measured, add up to the least within the bytes.",
        "    final_sparsity:",
    ]
    for path, sparsity in pruned.items():
        one = layers[path]
        lines.append(f"      {path}: {sparsity:g} # {_why(one, sparsity, found)}")
    if spared:
        lines.append("    # Left dense, as they cost more than they save:")
    lines += [
        f"    #   {path}: {_why(layers[path], layers[path].sparsities[0], found)}"
        for path in spared
    ]
    return [
        *lines,
        "    begin: 0.1 # the first tenth trains dense, the last 40 % recovers",
        "    end: 0.6",
    ]


def _why(one: LayerScan, sparsity: float, found: Findings) -> str:
    total = sum(layer.weights for layer in found.scan.layers)
    return (
        f"{one.weights / total:.1%} of the weights; loses {one.loss_at(sparsity):.3g} at "
        f"{sparsity:.0%} zeros without training"
    )


def _quantize(found: Findings) -> list[str]:
    layers = {one.path: one for one in found.scan.layers}
    lines = [
        "  quantize:",
        "    # One grid a tensor: in small layers a channel's own scales cost more than they gain.",
        "    scheme: symmetric",
        "    per_channel: false",
        "    activation_bits: null # rounding activations does not make the file smaller",
        "    begin: 0.6 # when the masks stand still",
        "    freeze: 0.95",
        "    weight_bits:",
    ]
    for path, (_, bits) in found.recipe.items():
        one = layers[path]
        loss = dict(zip(one.bits, one.bits_loss, strict=True))[bits]
        lines.append(f"      {path}: {bits} # loses {loss:.3g} without training")
    return lines


def run_advise(
    words: Sequence[str],
    folder: Path,
    *,
    ratio: float,
    sparsities: Sequence[float],
    bits: Sequence[int],
    rows: int,
    allowed: Sequence[str] = (),
) -> Path:
    """Profile, scan, and write a recipe that runs; prints how.

    Args:
        words: the model, see `find_subject`.
        folder: of `experiment/advised.yaml`, `sensitivity.json` and `sensitivity.png`.
        ratio: how much smaller than the dense `torch.save` file the model is to be.
        sparsities: to try in the scan.
        bits: to try.
        rows: of the validation split that each score is measured on.
        allowed: what a run's config may name, see `find_subject`.

    Returns:
        The recipe's path.

    Raises:
        ValueError: for a ratio that is none, or out of reach.
    """
    if not ratio > 1:
        raise ValueError(f"ratio={ratio!r} must be above 1: how much smaller the file is to be")
    check_scan(sparsities, bits)
    subject = find_subject(words, folder, allowed)
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
    print(explain_recipes(model, layers, subject.overrides))
    return path


def explain_recipes(
    model: nn.Module, layers: Sequence[LayerProfile], overrides: Sequence[str] = ()
) -> str:
    """The callbacks of `compression_recipe` for each goal, why, and the command that runs them.

    Args:
        model: dense.
        layers: its profile.
        overrides: that lead to the model, as on the command line.
    """
    largest = sorted(layers, key=lambda one: one.bytes, reverse=True)[:2]
    total = max(sum(one.bytes for one in layers), 1)
    where = " and ".join(f"{one.path} ({one.bytes / total:.0%})" for one in largest)
    lines = [f"\nReady-made recipes for this model, whose bytes are mostly in {where}:"]
    words = " ".join(one for one in overrides if not one.startswith("compression"))
    for goal in GOALS:
        recipe = compression_recipe(goal, teacher=DENSE, model=model)
        skipped = sorted({path for one in recipe for path in getattr(one, "exclude", ())})
        lines += ["", repr(recipe)]
        if skipped:
            lines.append(f"  left dense, the smallest: {', '.join(map(str, skipped))}")
        lines.append(f"  {' '.join(['lightning-compress', words, f'compression={goal}'])}")
    return "\n".join(lines)


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
        layers=layers,
        scan=scan,
        recipe=scan.recipe(left),
    )


def print_profile(layers: Sequence[LayerProfile], console: Console | None = None) -> None:
    """Print a row a layer: bytes, operations and time."""
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
