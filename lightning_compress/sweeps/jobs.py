"""Run one job of a sweep: in a process of its own, unless it is done already."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from lightning_compress.sweeps.outcomes import RESULTS, Outcome, read_outcome, state_of
from lightning_compress.sweeps.watching import WATCH
from lightning_compress.workflow.identity import config_hash

__all__ = ["run_sweep_job"]

LOG = "job.log"
DENSE_CACHE = ".cache/dense"
TAIL = 4096  # bytes at a log's end among which the reason is looked for


def run_sweep_job(cfg: DictConfig, hydra: Any) -> Outcome:
    """Run a job, or find that it is done; whatever becomes of it, the sweep goes on.

    The process is that of the same command without `-m`, so that a crash, a kill or a job of
    several devices, whose processes repeat the command line, concerns no other job.

    Args:
        cfg: the job's config.
        hydra: Hydra's own config of the job.

    Raises:
        KeyboardInterrupt: after Ctrl-C, which the job is told too.
    """
    folder = Path(hydra.runtime.output_dir)
    fresh = Outcome(
        number=int(hydra.job.num),
        overrides=[str(word) for word in hydra.overrides.task],
        folder=str(folder),
        config_hash=config_hash(cfg),
    )
    with FileLock(folder / "job.lock"):  # of another launch of the same sweep
        before = _before(folder, fresh)
        outcome = before if before.final else _run(before, _command(cfg, hydra, before))
    print(_line(outcome), flush=True)
    return outcome


def _before(folder: Path, fresh: Outcome) -> Outcome:
    """What an earlier try of the same job left, which is done or goes on, else a fresh start."""
    known = read_outcome(folder)
    if known is not None and known.config_hash == fresh.config_hash:
        if known.final and (known.state != "done" or (folder / RESULTS).is_file()):
            return replace(fresh, state=known.state, seconds=known.seconds,
                           message=known.message, again=True)  # fmt: skip
        return replace(fresh, seconds=known.seconds)
    for path in (*folder.glob("*/*.ckpt"), folder / RESULTS):  # of other settings
        path.unlink(missing_ok=True)
    return fresh


def _command(cfg: DictConfig, hydra: Any, job: Outcome) -> list[str]:
    folder = Path(job.folder)
    words = [*job.overrides, f"hydra.run.dir={_quoted(folder)}"]
    if cfg.ckpt_path is None and any(folder.glob("*/*.ckpt")):
        words.append(f"ckpt_path={_quoted(folder)}")
    if cfg.dense_cache is None:
        words.append(f"dense_cache={_quoted(Path(hydra.runtime.cwd) / DENSE_CACHE)}")
    words += [str(word) for word in hydra.overrides.hydra if "hydra.searchpath" in str(word)]
    sources = [one.path for one in hydra.runtime.config_sources if one.provider == "command-line"]
    flags = [f"--config-name={hydra.job.config_name}", *(f"--config-dir={one}" for one in sources)]
    return [sys.executable, "-m", "lightning_compress.app", *flags, *words]


def _quoted(path: Path) -> str:
    r"""A path as a value that Hydra's grammar takes for text.

    >>> print(_quoted(Path("it's (a) b")))
    'it\'s (a) b'
    """
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def _run(job: Outcome, command: Sequence[str]) -> Outcome:
    """Start the process, wait for it and record how it ended."""
    folder, start = Path(job.folder), time.monotonic()
    job.write()
    with (folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        code = _wait(command, log)
    state, message = state_of(code)
    if state == "done" and not (folder / RESULTS).is_file():
        state, message = "failed", f"ended without {RESULTS}"
    if state != "done":
        message = _reason(folder / LOG, begin) or message if code > 0 else message
    seconds = job.seconds + time.monotonic() - start
    ended = replace(job, state=state, message=message, seconds=round(seconds, 1))
    ended.write()
    if state == "interrupted":
        raise KeyboardInterrupt(f"job {job.number} was interrupted")
    return ended


def _wait(command: Sequence[str], log: Any) -> int:
    """The exit code; Ctrl-C here is passed on, so that the job saves where it is."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C must reach the job once, not twice
        env={**os.environ, WATCH: str(os.getpid())},
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return process.wait()


def _reason(path: Path, begin: int) -> str:
    """The error that a log ends with, else its last line."""
    with path.open("rb") as log:
        log.seek(max(begin, path.stat().st_size - TAIL))
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].startswith(("error: ", "pruned: ")):
            return " ".join(lines[place:]).split(": ", 1)[1]
    return lines[-1].strip() if lines else ""


def _line(job: Outcome) -> str:
    """One line on a job, for the terminal; what it runs, Hydra has said."""
    how = f"{job.state} before, not run again" if job.again else f"{job.state}, {job.seconds:.0f} s"
    return f"#{job.number}: {how}" + (f": {job.message}" if job.message else "")
