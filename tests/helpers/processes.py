"""Starts a job of this folder on several processes, and reads what each of them has saved."""

import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch

HELPERS = Path(__file__).parent


def start(job, folder, processes, *words, timeout=480):
    """Run a job's script to its end; Lightning starts the other processes."""
    path = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])])
    done = subprocess.run(
        [sys.executable, HELPERS / f"{job}.py", folder, str(processes), *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def alone(job, folder, *kinds):
    """The same by this process alone, without a start."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # as in a process of its own
        for kind in kinds:
            import_module(job).fit(folder, kind, 1)


def saved(folder, kind, processes):
    """What each process has."""
    paths = [folder / f"{kind}-{processes}-{rank}.pt" for rank in range(processes)]
    return [torch.load(path, weights_only=False) for path in paths]
