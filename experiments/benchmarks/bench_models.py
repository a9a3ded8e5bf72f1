"""Generative models beyond 28 pixels: dense and compressed, one row a model and seed.

Each model is an experiment of conf/experiment/; a run that was stopped goes on where it was, and
finished rows are kept. Rows of an unconverged dense model are marked so.

python experiments/benchmarks/bench_models.py [rows.jsonl] [--only NAME] [--words key=value ...]
python experiments/benchmarks/bench_models.py rows.jsonl --page docs/models.md
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import warnings
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from hydra import compose, initialize_config_dir
from shared.pages import insert
from shared.rows import Rows, mean_and_spread, read_rows

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.workflow.experiment import run_experiment
from lightning_compress.lab.workflow.quality import METRICS

KEYS = ("model", "seed", "words")
MARKS = ("<!-- models -->", "<!-- /models -->")
POINTS = 12  # of a curve; a shorter one says nothing of convergence
STILL = 0.02  # of the validation metric: a dense model that improves more in its last third goes on


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Args:
        experiment: file of conf/experiment/.
        metrics: of the table, the first of which the verdict is on.
        watched: the curve on the validation split that says whether a dense model converged.
        kind: what it generates, in words.
    """

    experiment: str
    metrics: tuple[str, ...]
    watched: str
    kind: str


MODELS = {
    "vocoder": Model(
        "vocoder",
        ("mel_distance", "stft_distance", "fid"),
        "val/mel_loss",
        "speech prompts, 8 kHz",
    ),
    "pix2pix": Model(
        "pix2pix", ("l1", "ssim", "fid"), "val/l1", "glyphs in two typefaces, 32 x 32"
    ),
    "flow_matching": Model(
        "flow_matching", ("fid", "kid", "precision", "recall"), "val/flow_loss", "digits, 16 steps"
    ),
    "flow_matching_steps": Model(
        "flow_matching_steps",
        ("fid", "kid", "precision", "recall"),
        "val/flow_loss",
        "digits, from 16 steps to 8",
    ),
    "autoencoder_kl": Model(
        "autoencoder_kl",
        ("psnr", "ssim", "perceptual", "fid"),
        "val/l1",
        "colour icons, the decoder",
    ),
    "vq_vae": Model(
        "vq_vae",
        ("psnr", "ssim", "perceptual", "fid", "code_perplexity"),
        "val/l1",
        "colour icons, codebook and decoder",
    ),
}


def improvement(curves: Path, metric: str) -> float | None:
    """How much of its value a dense model's metric fell in the last third of its run.

    The best value after two thirds is compared with the best before; None without a curve of
    enough points: such a run counts as not converged.
    """
    with curves.open(newline="", encoding="utf-8") as file:
        values = [
            float(row["value"])
            for row in csv.DictReader(file)
            if row["run"] == "dense" and row["metric"] == metric
        ]
    before = len(values) - len(values) // 3
    if len(values) < POINTS:
        return None
    return 1 - min(values) / min(values[:before])


def measured(name: str, seed: int, words: Sequence[str], home: Path) -> dict[str, Any]:
    """Run or resume an experiment, and take the figures of the table from its results."""
    tag = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    folder = home / f"{name}-{tag}-seed{seed}"
    overrides = [f"experiment={MODELS[name].experiment}", f"seed={seed}", "threads=1", *words]
    if (folder / "config.yaml").exists():
        overrides.append(f"ckpt_path={folder}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    results = run_experiment(cfg, folder)
    dense, compressed = results["dense"], results["compressed"]
    watched = improvement(folder / "curves.csv", MODELS[name].watched)
    return {
        "start": results["start"],
        "steps": results["steps"],
        "train_seconds": [round(side["train_seconds"]) for side in (dense, compressed)],
        "last_third": watched,
        "converged": watched is not None and watched < STILL,
        "quality": {side: results[side]["quality"] for side in ("dense", "compressed")},
        "evaluator": {key: results["evaluator"][key] for key in ("feature", "feature_accuracy")},
        "floor": results["evaluator"]["floor"],
        "params": [side["params"] for side in (dense, compressed)],
        "macs": [side["macs"] for side in (dense, compressed)],
        "bytes": {side: results[side]["bytes"] for side in ("dense", "compressed")},
        "ratio": results["ratio"],
        "ms": one_thread(dense, compressed),
        "seconds_a_sample": sound_seconds(folder, results["samples"]),
        "int8_ops": compressed["int8_ops"],
    }


def sound_seconds(folder: Path, samples: dict[str, str]) -> float | None:
    """Length of a sample that is sound; None for images."""
    if (name := samples.get("real_0.wav")) is None:
        return None
    with wave.open(str(folder / name)) as file:
        return file.getnframes() / file.getframerate()


def one_thread(dense: dict[str, Any], compressed: dict[str, Any]) -> dict[str, float]:
    """Medians in ms of ONNX Runtime, batch 1: dense fp32, and the compressed int8 file."""
    key = "onnxruntime int8, 1 thread, batch 1"
    if key not in compressed["latency_ms"]:
        return {}
    fp32, int8 = dense["latency_ms"][key], compressed["latency_ms"][key]
    return {"dense": fp32["median"], "int8": int8["median"], "ratio": int8["ratio"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model: dense against compressed, over its seeds."""
    lines = [
        "| model | data | smaller (`.lcz`) | MACs | ONNX Runtime, 1 thread | quality, dense → "
        "compressed | dense model |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["words"]), []).append(row)
    for (name, _), of in groups.items():
        model, first = MODELS[name], of[0]
        fewer = first["macs"][0] / first["macs"][1]
        quality = "; ".join(
            f"{METRICS[metric].label} "
            + " → ".join(
                mean_and_spread([row["quality"][side][metric] for row in of], ".3g")
                for side in ("dense", "compressed")
            )
            for metric in model.metrics
        )
        lines.append(
            f"| `{name}`, {first['params'][0]:,} parameters | {model.kind} "
            f"| {mean_and_spread([row['ratio'] for row in of], '.1f')}× | {fewer:.1f}× fewer "
            f"| {_speed(of)} | {quality} | {_baseline(of)} |"
        )
    return "\n".join(lines)


def _speed(rows: Sequence[dict[str, Any]]) -> str:
    timed = [row for row in rows if row["ms"]]
    if not timed:
        return "no int8 file"
    dense, int8 = (mean(row["ms"][side] for row in timed) for side in ("dense", "int8"))
    text = f"{dense:.3g} → {int8:.3g} ms"
    if (seconds := timed[0]["seconds_a_sample"]) is None:
        return text
    return f"{text}: {1000 * seconds / dense:.0f} → {1000 * seconds / int8:.0f}× real time"


def _baseline(rows: Sequence[dict[str, Any]]) -> str:
    steps, seeds = rows[0]["steps"]["dense"], len(rows)
    text = f"{steps:,} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    if rows[0].get("start", "seed") == "dense":
        text += "; the compressed one goes on from it for as many again"
    if all(row["converged"] for row in rows):
        return text
    fell = [row["last_third"] for row in rows if row["last_third"] is not None]
    told = f": still {mean(fell):.0%} better in the last third" if fell else ""
    return f"{text}, **not converged**{told}"


def render(rows: Path, page: Path) -> None:
    """Write the table between the marks of a page; the section is added where it lacks one."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Models\n"
    if MARKS[0] not in text:
        text += (
            "\n## Beyond 28 pixels\n\n`make bench-models` trains each dense and compressed, for "
            f"equal steps, and puts its rows here.\n\n{MARKS[0]}\n{MARKS[1]}\n"
        )
        page.write_text(text, encoding="utf-8")
    insert(page, table(read_rows(rows)), *MARKS)


def main() -> None:
    """Make the missing rows, or the table of a page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("rows", nargs="?", type=Path, default=Path("outputs/bench/models.jsonl"))
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--page", type=Path, help="write the table of the rows into this page")
    parser.add_argument("--words", nargs="*", default=[], help="overrides of the experiment")
    chosen = parser.parse_args()
    if chosen.page is not None:
        return render(chosen.rows, chosen.page)
    warnings.simplefilter("ignore")
    rows = Rows(chosen.rows, keys=KEYS)
    home = chosen.rows.parent / "models"
    for name in chosen.only:
        for seed in chosen.seeds:
            run = partial(measured, name, seed, chosen.words, home)
            rows.make(run, model=name, seed=seed, words=" ".join(chosen.words))
    return None


if __name__ == "__main__":
    main()
