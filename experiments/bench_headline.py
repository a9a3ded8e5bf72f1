"""The headline: every method and its peers on the same dense models, for equal steps.

Each row goes on from the same dense model (the dense row too), is measured on the test split, and
ships a file. Seeds 1, 2 ... make a model's main rows alone: their spread is the noise. Finished
rows are kept, so that a stopped command goes on. `show_headline.py` makes the tables and picture.

python experiments/bench_headline.py [--set fashion|digits] [--seeds 0 1 2] [--models vae ...]
    [--speeds]

Rows of MPEG's nncodec need an interpreter that has it, since it pins an older NumPy (`make bench`
makes one):
    python3 -m venv /tmp/nncodec && /tmp/nncodec/bin/pip install nncodec h5py
    export NNCODEC_PYTHON=/tmp/nncodec/bin/python
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch
from bench_rows import Rows, as_file_name
from headline_arms import ARMS
from headline_files import Row, measured, speeds_of
from headline_runs import SETS, Runs
from peers import NNCODEC, nncodec_python

ROUNDS = 100


def home_of(runs: Runs, arm: str) -> Path:
    """The folder of a row's files."""
    return runs.folder / as_file_name(arm)


def row(runs: Runs, arm: str) -> Row:
    """Trains, ships and measures."""
    home = home_of(runs, arm)
    home.mkdir(exist_ok=True)
    shipped = ARMS[arm](runs, home)
    return measured(runs, shipped, runs.folder / "dense", ROUNDS)


def measure_again(runs: Runs, rows: Rows) -> None:
    """Speeds of finished rows of a seed, on a host that is quieter now, say."""
    dense = home_of(runs, "dense")
    for one in rows.known.values():
        home = home_of(runs, one["arm"])
        if one["seed"] != runs.seed:
            continue
        there = any(home.glob("*.onnx"))
        if there:
            rows.amend(one, speed=speeds_of(runs, home, dense, ROUNDS))
        print(one["arm"], one["speed"] if there else "no files", flush=True)


def main() -> None:
    """Makes the missing rows: all models of a seed before the next seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", default="fashion", choices=list(SETS), dest="name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", help="of the set; all")
    parser.add_argument("--arms", nargs="+", help=f"of {list(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/headline"))
    parser.add_argument(
        "--speeds",
        action="store_true",
        help="only measure rows' speeds anew, where files are there",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = args.out / args.name
    for seed in args.seeds:
        for name in args.models or SETS[args.name]:
            runs = Runs(name, SETS[args.name][name], seed, folder / f"{name}-{seed}")
            rows = Rows(folder / f"{name}.jsonl", keys=("model", "seed", "arm"))
            if args.speeds:
                measure_again(runs, rows)
                continue
            for arm in args.arms or (ARMS if seed == args.seeds[0] else runs.model.main):
                if runs.kind == "recurrent_vae" and "MACs" in arm and "Torch" in arm:
                    continue  # it cuts no recurrent layers
                if "nncodec" in arm and nncodec_python() is None:
                    print(f"{arm!r} left out: {NNCODEC} names no interpreter, see the top")
                    continue
                rows.make(partial(row, runs, arm), model=name, seed=seed, arm=arm)


if __name__ == "__main__":
    main()
