"""Starts a job of this folder on several processes, and reads what each of them has saved."""

import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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


def work(fit):
    """The end of a job's script: its kinds one after the other, since a start takes its time."""
    torch.set_num_threads(1)
    for kind in sys.argv[3:]:
        fit(Path(sys.argv[1]), kind, int(sys.argv[2]))
    leave()


def leave():
    """Ends this process after all its work: torch's threads now and then abort a regular end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def alone(job, folder, *kinds):
    """The same by this process alone, without a start."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # as in a process of its own
        for kind in kinds:
            import_module(job).fit(folder, kind, 1)


def share_of(processes):
    """Every N-th row for each of N processes: together they see the batches of a single one."""
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data, rank = TensorDataset(rows), int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    return DataLoader(data, batch_size=8 // processes, sampler=sampler)


def on(processes, *, gan=True):
    """Arguments of a Trainer on so many processes, whose data are `share_of` them."""
    # A GAN's losses leave one network out each, which Lightning wants to be told.
    several = f"ddp{'_find_unused_parameters_true' * gan}"
    return {
        "devices": processes,
        "use_distributed_sampler": False,  # Lightning's own shuffles
        "strategy": "auto" if processes == 1 else several,
    }


def saved(folder, kind, processes):
    """What each process has."""
    paths = [folder / f"{kind}-{processes}-{rank}.pt" for rank in range(processes)]
    return [torch.load(path, weights_only=False) for path in paths]
