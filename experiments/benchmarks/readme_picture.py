"""README's picture: samples, bytes and speed of a run, dense above compressed, dark and light.

python experiments/benchmarks/readme_picture.py RUN [--docs docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from PIL import Image

ROWS = 3  # of the run's grid of samples
COLOURS = {"samples": ("#ffffff", "#1f2328"), "samples_dark": ("#0d1117", "#e6edf3")}
SPEED = "onnxruntime int8, 1 thread, batch {}"


def labels(results: dict[str, Any]) -> tuple[str, str]:
    """What stands beside the samples of either side: of the compressed one the file that runs."""
    sizes = results["compressed"]["bytes"]
    dense, small = results["dense"]["bytes"]["torch"], sizes.get("lcz_graph") or sizes["lcz"]
    times = results["compressed"]["latency_ms"]
    ratios = [1 / times[name]["ratio"] for one in (1, 16) if (name := SPEED.format(one)) in times]
    faster = " / ".join(f"{one:.1f}×" for one in ratios)
    speed = f"\nint8, batch 1 / 16:\n{faster} the speed" if ratios else ""
    return (
        f"dense\n{dense / 1000:,.0f} kB",
        f"compressed\n{small / 1000:,.0f} kB\n{dense / small:.0f}× smaller{speed}",
    )


def strip(path: Path) -> Image.Image:
    """The first rows of a square grid of samples, eight in a row."""
    grid = Image.open(path).convert("L")
    return grid.crop((0, 0, grid.width, ROWS * grid.width // 8))


def draw(run: Path, docs: Path) -> None:
    """Write `samples.png` and `samples_dark.png`."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    grids = [strip(run / results["samples"][side]) for side in ("dense", "compressed")]
    mpl.use("agg")
    for name, (back, ink) in COLOURS.items():
        figure, axes = plt.subplots(2, 1, figsize=(8, 4.6), facecolor=back, layout="constrained")
        for axis, grid, text in zip(axes, grids, labels(results), strict=True):
            axis.imshow(grid, cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_ylabel(
                text, rotation=0, ha="right", va="center", color=ink, fontsize=12, labelpad=12
            )
        figure.savefig(docs / f"{name}.png", dpi=150, facecolor=back, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as that of `make demo`")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    draw(args.run, args.docs)


if __name__ == "__main__":
    main()
