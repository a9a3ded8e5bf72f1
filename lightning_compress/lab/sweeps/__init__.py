"""Sweeps: many resumable runs from one command, each in a process of its own.

`jobs` runs one job, `study` is the Optuna search, `summary` names the folder and sums up the
results. Nothing here imports PyTorch, so that launching is fast.
"""

from lightning_compress.lab.sweeps.jobs import Outcome, run_sweep_job
from lightning_compress.lab.sweeps.summary import SweepSummary, sweep_folder

__all__ = ["Outcome", "SweepSummary", "run_sweep_job", "sweep_folder"]
