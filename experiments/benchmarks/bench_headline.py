"""Headline benchmark: every method and its peers on the same dense models, for equal steps.

Each row goes on from the same dense model (the dense row too), is measured on the test split, and
ships a file. Seeds 1, 2 ... make a model's main rows alone: their spread is the noise. Finished
rows are kept, so that a stopped command goes on. `show_headline.py` makes the tables and figure.

python experiments/benchmarks/bench_headline.py [--set fashion|digits] [--seeds 0 1 ...]
    [--models vae ...] [--again speed|quality|controls]

Rows of MPEG's nncodec need an interpreter that has it, since it pins an older NumPy (`make bench`
makes one):
    python3 -m venv /tmp/nncodec && /tmp/nncodec/bin/pip install nncodec h5py
    export NNCODEC_PYTHON=/tmp/nncodec/bin/python
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared.headline_arms import ARMS
from shared.headline_files import Row, controls, loaded, measured, speeds_of, speeds_of_all
from shared.headline_runs import SETS, Runs
from shared.peers import NNCODEC, nncodec_python
from shared.rows import Rows, as_file_name

from lightning_compress.lab.workflow.costs import int8_bytes, write_int8_files

ROUNDS = 100


def home_of(runs: Runs, arm: str) -> Path:
    """The folder of a row's files."""
    return runs.folder / as_file_name(arm)


def row(runs: Runs, arm: str) -> Row:
    """Train, write the file and measure."""
    home = home_of(runs, arm)
    home.mkdir(exist_ok=True)
    shipped = ARMS[arm](runs, home)
    found = measured(runs, shipped, home_of(runs, "dense"), ROUNDS)
    return found | controls(runs, arm, shipped.model) | all_parts(runs, arm)


def all_parts(runs: Runs, arm: str) -> Row:
    """Speed of all deployed parts together, of a main row of a model of several parts."""
    home, dense = home_of(runs, arm), home_of(runs, "dense")
    there = (home / "model.lcz").exists() and (dense / "model.lcz").exists()
    if arm == "dense" or arm not in runs.model.main or not there or len(runs.fresh().parts()) < 2:
        return {}
    return {"speed_of_all": speeds_of_all(runs, home, dense, ROUNDS)}


def make_missing(runs: Runs, rows: Rows, arms: Sequence[str]) -> None:
    """The rows of a model and seed that are not known yet, beside the dense one's files."""
    keys = {arm: {"model": runs.name, "seed": runs.seed, "arm": arm} for arm in ("dense", *arms)}
    missing = [arm for arm in arms if not rows.has(**keys[arm])]
    if missing and not any(home_of(runs, "dense").glob("*.onnx")):
        rows.drop(**keys["dense"])  # all others are measured beside its files
        missing = list(dict.fromkeys(["dense", *missing]))
    for arm in missing:
        if "nncodec" in arm and nncodec_python() is None:
            print(f"{arm!r} left out: {NNCODEC} names no interpreter, see the top")
        else:
            rows.make(partial(row, runs, arm), **keys[arm])


def speed_again(runs: Runs, arm: str) -> Row | None:
    """On a host that is quieter now, say; int8 files as they are written today."""
    home = home_of(runs, arm)
    if not any(home.glob("*.onnx")):
        return None
    written: Row = {}
    if (home / "model.lcz").exists() and any(home.glob("*.int8.onnx")):
        files = write_int8_files(loaded(runs, home), home, runs.start.data)
        written["int8_bytes"] = int8_bytes(files)
    speed = {"speed": speeds_of(runs, home, home_of(runs, "dense"), ROUNDS)}
    return written | speed | all_parts(runs, arm)


def model_of(runs: Runs, arm: str) -> Any:
    """The model of a main row's file; None of other rows, whose sizes may not be ours."""
    home = home_of(runs, arm)
    main = arm in runs.model.main and (home / "model.lcz").exists()
    return loaded(runs, home) if main else None


def quality_again(runs: Runs, arm: str) -> Row | None:
    """Of main rows, where the measure itself has changed."""
    model = model_of(runs, arm)
    return None if model is None else runs.start.quality(model)


def controls_again(runs: Runs, arm: str) -> Row | None:
    """Of main rows that were made before there were any."""
    model = model_of(runs, arm)
    return None if model is None else controls(runs, arm, model)


AGAIN = {"speed": speed_again, "quality": quality_again, "controls": controls_again}


def measure_again(runs: Runs, rows: Rows, what: str) -> None:
    """A part of what finished rows of a seed say."""
    for one in rows.known.values():
        if one["seed"] == runs.seed:
            found = AGAIN[what](runs, one["arm"])
            rows.amend(one, **(found or {}))
            print(one["arm"], "left as it is" if found is None else found, flush=True)


def main() -> None:
    """Makes the missing rows: all models of a seed before the next seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", default="fashion", choices=list(SETS), dest="name")
    parser.add_argument("--seeds", type=int, nargs="+", help="each model's own, 0 1 2 or more")
    parser.add_argument("--models", nargs="+", help="of the set; all")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), metavar="ARM", help="of each model"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/headline"))
    parser.add_argument(
        "--again", choices=list(AGAIN), help="only measure this anew, where rows' files are there"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, models = args.out / args.name, SETS[args.name]
    for seed in args.seeds or range(max(model.seeds for model in models.values())):
        for name in args.models or models:
            if args.seeds is None and seed >= models[name].seeds:
                continue
            runs = Runs(name, models[name], seed, folder / f"{name}-{seed}")
            rows = Rows(folder / f"{name}.jsonl", keys=("model", "seed", "arm"))
            if args.again:
                measure_again(runs, rows, args.again)
            else:
                plan = runs.model.plan(first=seed == 0)
                make_missing(runs, rows, args.arms or plan)


if __name__ == "__main__":
    main()
