"""Table and plot of the rows of bench_pruning_quality.py.

python experiments/benchmarks/show_pruning_quality.py rows.jsonl docs
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from shared.pages import insert
from shared.rows import mean_and_spread, read_rows

METRICS = {"vae": ("neg_elbo", "−ELBO, nats"), "dcgan": ("fid", "Fréchet distance")}
TITLES = {"vae": "VAE, Fashion-MNIST", "dcgan": "DCGAN, Fashion-MNIST"}
Cells = dict[tuple[str, str, float], list[dict[str, Any]]]


def main(path: Path, folder: Path) -> None:
    """Writes pruning_quality.png, and the tables into pruning.md."""
    cells: Cells = defaultdict(list)
    for row in read_rows(path):
        cells[row["model"], row["variant"], row["sparsity"]].append(row)
    models = [name for name in METRICS if any(key[0] == name for key in cells)]
    text = "\n\n".join(table(cells, name) for name in models)
    insert(folder / "pruning.md", text)
    plot(cells, models, folder / "pruning_quality.png")


def sparsities(cells: Cells) -> list[float]:
    return sorted({sparsity for _, _, sparsity in cells if sparsity})


def variants(cells: Cells, model: str) -> list[str]:
    """By how well they do at 90 %."""
    metric = METRICS[model][0]
    found = {v: cells[model, v, 0.9] for _, v, _ in list(cells) if cells.get((model, v, 0.9))}
    return sorted(found, key=lambda one: mean(row[metric] for row in found[one]))


def shown(rows: list[dict[str, Any]], metric: str) -> str:
    if not rows:
        return "–"
    values = [row[metric] for row in rows]
    return mean_and_spread(values) + (f" (n={len(values)})" if len(values) > 1 else "")


def table(cells: Cells, model: str) -> str:
    """Markdown: a row a criterion, a column a sparsity; further metrics at 90 %."""
    metric, label = METRICS[model]
    extra = {"vae": ["active_units"], "dcgan": ["precision", "recall"]}[model]
    columns = sparsities(cells)
    names = [
        *(f"{one:.0%}" for one in columns),
        *(f"{one.replace('_', ' ')} at 90 %" for one in extra),
    ]
    dense = cells[model, "dense", 0.0]
    lines = [
        f"**{TITLES[model]}: {label}, lower is better.** Dense baseline, equal steps: "
        f"{shown(dense, metric)}; "
        + ", ".join(f"{one.replace('_', ' ')} {shown(dense, one)}" for one in extra)
        + ".",
        "",
        "| criterion | " + " | ".join(names) + " | s a run |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for variant in variants(cells, model):
        at = [shown(cells.get((model, variant, one), []), metric) for one in columns]
        at += [shown(cells[model, variant, 0.9], one) for one in extra]
        seconds = mean(row["seconds"] for row in cells[model, variant, 0.9])
        lines.append(f"| {variant.replace('_', ' ')} | " + " | ".join(at) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def plot(cells: Cells, models: list[str], path: Path) -> None:
    """One panel a model, a line a criterion."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter

    figure, axes = plt.subplots(1, len(models), figsize=(5.6 * len(models), 4.2), squeeze=False)
    order = sorted({v for model in models for v in variants(cells, model)})
    colors = [*mpl.color_sequences["tab10"], "black", "tan"]
    styles = {v: (colors[i], "os^vD<>pXdP*"[i]) for i, v in enumerate(order)}
    for axis, model in zip(axes[0], models, strict=True):
        metric, label = METRICS[model]
        for variant in variants(cells, model):
            columns = [one for one in sparsities(cells) if cells.get((model, variant, one))]
            values = [mean(row[metric] for row in cells[model, variant, one]) for one in columns]
            color, marker = styles[variant]
            axis.plot(
                [sparsities(cells).index(one) for one in columns],
                values,
                marker=marker,
                color=color,
                label=variant.replace("_", " "),
            )
        dense = mean(row[metric] for row in cells[model, "dense", 0.0])
        axis.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense, equal steps")
        axis.set_xticks(range(len(sparsities(cells))), [f"{one:.0%}" for one in sparsities(cells)])
        axis.set(
            title=TITLES[model],
            xlabel="zeros in the pruned layers",
            ylabel=f"{label} (lower is better)",
        )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FormatStrFormatter("%.4g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%.4g"))
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=3 * len(models), frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
