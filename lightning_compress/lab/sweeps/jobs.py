"""Jobs of a sweep: each runs in a process of its own, unless it is done already."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from lightning_compress.files import write_atomically
from lightning_compress.lab.workflow.run_identity import config_hash

__all__ = [
    "JOB_RECORD",
    "PRUNED_EXIT_CODE",
    "RESULTS",
    "WATCH",
    "Outcome",
    "read_outcome",
    "run_sweep_job",
    "state_of",
    "stop_with_launcher",
]
JOB_RECORD, RESULTS = "job.json", "results.json"
PRUNED_EXIT_CODE = 3  # of a run that was pruned
FINAL = ("done", "pruned")  # states that another try would not change


@dataclass(frozen=True)
class Outcome:
    """Outcome of one job.

    Attributes:
        number: of the job in its sweep.
        overrides: its words of the command line.
        folder: where its files lie.
        config_hash: of what it ran.
        state: "running", "done", "pruned", "failed", "killed" or "interrupted".
        seconds: that it took, all tries together.
        message: the reason, if it was not done.
        again: whether it was done before and not run.
    """

    number: int
    overrides: list[str]
    folder: str
    config_hash: str
    state: str = "running"
    seconds: float = 0.0
    message: str = ""
    again: bool = False

    @property
    def final(self) -> bool:
        """Whether running it again would change nothing.

        >>> Outcome(0, [], "a", "f3", state="pruned").final
        True
        """
        return self.state in FINAL

    def write(self) -> None:
        """Record it in the job's folder."""
        text = json.dumps(asdict(replace(self, again=False)), indent=1, ensure_ascii=False)
        write_atomically(
            Path(self.folder) / JOB_RECORD, text, what="the job's record", parents=True
        )

    def results(self) -> dict[str, Any]:
        """What the job measured.

        Raises:
            OSError: when it left no `results.json`.
        """
        return json.loads((Path(self.folder) / RESULTS).read_text("utf-8"))


def read_outcome(folder: Path) -> Outcome | None:
    """The recorded outcome of a folder; None without a readable one."""
    try:
        return Outcome(**json.loads((folder / JOB_RECORD).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def state_of(code: int) -> tuple[str, str]:
    """State and message of an exit code.

    >>> state_of(0), state_of(-9), state_of(1)
    (('done', ''), ('killed', 'killed by SIGKILL'), ('failed', 'exit code 1'))
    """
    if code < 0:
        return "killed", f"killed by {_name(-code)}"
    known = {0: ("done", ""), PRUNED_EXIT_CODE: ("pruned", ""), 130: ("interrupted", "interrupted")}
    return known.get(code, ("failed", f"exit code {code}"))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


WATCH = "LIGHTNING_COMPRESS_LAUNCHER"  # the process id that a sweep's job belongs to
SECONDS = 1.0
PATIENCE = 30.0  # seconds to save and end in, before the next interrupt


def stop_with_launcher() -> None:
    """Interrupt this process, as Ctrl-C would, once the one that launched it is gone.

    Does nothing in a process that no sweep launched. The job's own children do not watch
    the launcher: they belong to the job.
    """
    launcher = os.environ.pop(WATCH, None)
    if launcher is not None and os.name == "posix":
        watch = threading.Thread(target=_watch, args=(int(launcher),), daemon=True)
        watch.start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS)
    while True:  # Python drops an interrupt that comes while it collects garbage
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)


LOG = "job.log"
DENSE_CACHE = ".cache/dense"
TAIL = 4096  # bytes at a log's end that are searched for the reason


def run_sweep_job(cfg: DictConfig, hydra: Any) -> Outcome:
    """Run a job unless it is done; a failure does not end the sweep.

    The process is that of the same command without `-m`, so that a crash, a kill or a job of
    several devices, whose processes repeat the command line, concerns no other job.

    Args:
        cfg: the job's config.
        hydra: Hydra's own config of the job.

    Raises:
        KeyboardInterrupt: after Ctrl-C, which is forwarded to the job.
    """
    folder = Path(hydra.runtime.output_dir)
    fresh = Outcome(
        number=int(hydra.job.num),
        overrides=[str(word) for word in hydra.overrides.task],
        folder=str(folder),
        config_hash=config_hash(cfg),
    )
    with FileLock(folder / "job.lock"):  # of another launch of the same sweep
        before = _earlier_outcome(folder, fresh)
        outcome = before if before.final else _run(before, _command(cfg, hydra, before))
    print(_line(outcome), flush=True)
    return outcome


def _earlier_outcome(folder: Path, fresh: Outcome) -> Outcome:
    """The outcome of an earlier try of the same job, else a fresh one."""
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
    return [sys.executable, "-m", "lightning_compress.lab.app", *flags, *words]


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
    """One line on a job, for the terminal."""
    how = f"{job.state} before, not run again" if job.again else f"{job.state}, {job.seconds:.0f} s"
    return f"#{job.number}: {how}" + (f": {job.message}" if job.message else "")
