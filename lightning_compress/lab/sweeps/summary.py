"""Summary of a sweep: its folder, a line for each job that was not done, the exit code."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_compress.lab.sweeps.jobs import JOB_RECORD, Outcome, read_outcome

__all__ = [
    "SweepSummary",
    "sweep_folder",
    "sweep_lines",
]
NAME_LENGTH = 48
SWEPT = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(|,(?![^\[{(]*[\]})])")


def sweep_folder(words: Sequence[str], root: str = "multirun") -> Path:
    """The folder of a command's sweep: what it sweeps, and a hash of all its settings.

    Settings of the launcher (`hydra...`) do not count.

    >>> sweep_folder(["model=dcgan", "compression.prune.final_sparsity=0.5,0.8"])
    PosixPath('multirun/final_sparsity-320fdac1')
    >>> sweep_folder(["sweep=pareto", "hydra/launcher=joblib"]) == sweep_folder(["sweep=pareto"])
    True
    """
    settings = [word for word in words if not word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]
    name = "_".join(_swept(settings)) or "runs"
    return Path(root) / f"{name[:NAME_LENGTH]}-{digest}"


def _swept(settings: Sequence[str]) -> list[str]:
    """Short names of a sweep: the keys with several values, and the sweep's file."""
    pairs = [word.lstrip("+~").split("=", 1) for word in settings if "=" in word]
    keys = [key.split(".")[-1] for key, value in pairs if SWEPT.search(value)]
    files = [value for key, value in pairs if key == "sweep"]
    return [re.sub(r"\W+", "-", name) for name in files + keys]


class SweepSummary(Callback):
    """Hydra's callback that counts a sweep's jobs and names those that failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the sums.

        Raises:
            SystemExit: with code 1 when a job failed or was killed.
        """
        folder = Path(str(config.hydra.sweep.dir))
        found = [read_outcome(path.parent) for path in folder.glob(f"*/{JOB_RECORD}")]
        jobs = sorted((job for job in found if job is not None), key=lambda job: job.number)
        if not jobs:
            return
        print("\n".join(sweep_lines(jobs, folder)), flush=True)
        if not all(job.final for job in jobs):
            print("The same command again runs what is not done.", file=sys.stderr)
            raise SystemExit(1)


def sweep_lines(jobs: Sequence[Outcome], folder: Path) -> list[str]:
    """The sums of a sweep, a line for each job that was not done, and how to see the others.

    >>> killed = Outcome(1, ["seed=1"], "m/1", "f3", state="killed", message="killed by SIGKILL")
    >>> done = Outcome(0, ["seed=0"], "m/0", "e0", state="done")
    >>> for line in sweep_lines([done, killed], Path("m")):
    ...     print(line)
    2 jobs: 1 done, 1 killed
    #1 seed=1: killed by SIGKILL (m/1/job.log)
    lightning-compress report m
    """
    counts = Counter(job.state for job in jobs)
    sums = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: {sums}"]
    common = set.intersection(*(set(job.overrides) for job in jobs))
    for job in jobs:
        if job.state != "done":
            words = " ".join(word for word in job.overrides if word not in common)
            lines.append(f"#{job.number} {words}: {job.message} ({job.folder}/job.log)")
    return [*lines, f"lightning-compress report {folder}"] if counts["done"] else lines
