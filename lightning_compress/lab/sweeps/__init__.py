"""Many runs from one command: each in a process of its own, each resumable, all accounted for.

`folders` says where a sweep lies, `jobs` runs one of its jobs, `summary` tells at the end how
they went. Nothing here imports PyTorch: whoever launches the jobs starts quickly.
"""

from lightning_compress.lab.sweeps.jobs import Outcome, run_sweep_job
from lightning_compress.lab.sweeps.summary import SweepSummary, sweep_folder

__all__ = ["Outcome", "SweepSummary", "run_sweep_job", "sweep_folder"]
