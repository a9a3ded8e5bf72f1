"""How a job of a sweep went, as its folder records it."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_compress.files import write_atomically

__all__ = ["HOPELESS", "RECORD", "RESULTS", "Outcome", "read_outcome", "state_of"]

RECORD, RESULTS = "job.json", "results.json"
HOPELESS = 3  # the exit code of a run that was given up
FINAL = ("done", "pruned")  # states that another try would not change


@dataclass(frozen=True)
class Outcome:
    """One job's fate.

    Attributes:
        number: of the job in its sweep.
        overrides: its words of the command line.
        folder: where its files lie.
        config_hash: of what it ran.
        state: "running", "done", "pruned", "failed", "killed" or "interrupted".
        seconds: that it took, all tries together.
        message: what it said last, if it was not done.
        again: whether it was found done, not run.
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
        write_atomically(Path(self.folder) / RECORD, text, what="the job's record", parents=True)

    def results(self) -> dict[str, Any]:
        """What the job measured.

        Raises:
            OSError: when it left no `results.json`.
        """
        return json.loads((Path(self.folder) / RESULTS).read_text("utf-8"))


def read_outcome(folder: Path) -> Outcome | None:
    """What is recorded in a folder; None where nothing readable is."""
    try:
        return Outcome(**json.loads((folder / RECORD).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def state_of(code: int) -> tuple[str, str]:
    """The state that an exit code stands for, and what is to be said of it.

    >>> state_of(0), state_of(-9), state_of(1)
    (('done', ''), ('killed', 'killed by SIGKILL'), ('failed', 'exit code 1'))
    """
    if code < 0:
        return "killed", f"killed by {_name(-code)}"
    known = {0: ("done", ""), HOPELESS: ("pruned", ""), 130: ("interrupted", "interrupted")}
    return known.get(code, ("failed", f"exit code {code}"))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
