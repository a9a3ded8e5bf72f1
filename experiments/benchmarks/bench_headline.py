"""Headline benchmark: methods, controls and peers on the same converged dense models.

Each row goes on from a dense model of `baselines.py` for equal compute (rows with a teacher, whose
forward pass costs too, for two thirds of the steps) and ships one artifact, whose bytes, speed and
quality, computed by ONNX Runtime, the row has. `validation` is the metric on the validation split:
settings are chosen by it. Finished rows are kept, so that a stopped command goes on.
`show_headline.py` makes the tables and figures.

python experiments/benchmarks/bench_headline.py [--set digits|fashion] [--seeds 0 1 ...]
    [--models vae ...] [--arms ...] [--minutes 120] [--out experiments/rows/headline]

Rows of MPEG's nncodec need an interpreter that has it, since it pins an older NumPy (`make bench`
makes one):
    python3 -m venv /tmp/nncodec && /tmp/nncodec/bin/pip install nncodec h5py
    export NNCODEC_PYTHON=/tmp/nncodec/bin/python
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from shared.baseline_plans import MADE
from shared.headline_arms import ARMS
from shared.headline_files import Row, measured
from shared.headline_runs import SETS, Runs
from shared.peers import NNCODEC, nncodec_python
from shared.rows import Rows, as_file_name

ROWS = Path(__file__).parents[1] / "rows" / "headline"


def home_of(runs: Runs, arm: str) -> Path:
    """The folder of a row's files."""
    return runs.folder / as_file_name(arm)


def row(runs: Runs, arm: str) -> Row:
    """Train, write the artifact and measure it; of the dense row also what measures it."""
    home, start = home_of(runs, arm), time.monotonic()
    home.mkdir(exist_ok=True)
    shipped = ARMS[arm](runs, home)
    trained = round(time.monotonic() - start, 1)
    about = runs.start.evaluator(shipped.model).describe() if arm == "dense" else None
    found = measured(runs, shipped, home_of(runs, "dense"))
    return found | {"train_seconds": trained} | ({} if about is None else {"measure": about})


def make_missing(runs: Runs, rows: Rows, arms: Sequence[str], until: float) -> None:
    """The rows of a model and seed that are not known yet, beside the dense one's artifact."""
    keys = {arm: {"model": runs.name, "seed": runs.seed, "arm": arm} for arm in ("dense", *arms)}
    missing = [arm for arm in arms if not rows.has(**keys[arm])]
    if missing and not (home_of(runs, "dense") / "model.lcz").exists():
        rows.drop(**keys["dense"])  # all others are timed beside its file
        missing = list(dict.fromkeys(["dense", *missing]))
    for arm in missing:
        if time.monotonic() > until:
            print("the time is over: the same command goes on")
            return
        if "nncodec" in arm and nncodec_python() is None:
            print(f"{arm!r} left out: {NNCODEC} names no interpreter, see the top")
        else:
            rows.make(partial(row, runs, arm), **keys[arm])


def main() -> None:
    """Makes the missing rows: all models of a seed before the next seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", default="digits", choices=list(SETS), dest="name")
    parser.add_argument("--seeds", type=int, nargs="+", help="each model's own, 0 to 4")
    parser.add_argument("--models", nargs="+", help="of the set; all")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), metavar="ARM", help="of each model"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="no row begins after them")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--files", type=Path, default=MADE.with_name("headline"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * args.minutes
    models = SETS[args.name]
    for seed in args.seeds or range(max(model.seeds for model in models.values())):
        for name in args.models or models:
            if args.seeds is None and seed >= models[name].seeds:
                continue
            runs = Runs(name, models[name], seed, args.files / args.name / f"{name}-{seed}")
            rows = Rows(args.out / args.name / f"{name}.jsonl", keys=("model", "seed", "arm"))
            make_missing(runs, rows, args.arms or models[name].plan(seed), until)


if __name__ == "__main__":
    main()
