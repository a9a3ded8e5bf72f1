"""Going on with an interrupted run: what is finished is reused, what is not goes on."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_compress.files import atomic_file
from lightning_compress.workflow.records import CKPT_PATH, run_folder
from lightning_compress.workflow.training import FINAL, INTERRUPTED, LAST

__all__ = ["Earlier", "resume_command"]

RECORD = "config.yaml"  # written when a run starts: its folder may hold no checkpoint yet


@dataclass(frozen=True)
class Earlier:
    """An earlier run's folder, or none.

    >>> Earlier.at(None).unfinished("dense") is None
    True
    """

    folder: Path | None
    midway: str | None = None  # the phase that goes on from the middle of an epoch

    @classmethod
    def at(cls, ckpt_path: str | None) -> Earlier:
        """The run that a folder or one of its checkpoints belongs to.

        Its phases go on from their last whole epoch, so that they end as if nothing had happened.
        An `interrupted.ckpt` that is named is gone on from as it is: nothing is lost, but the data
        of the rest of its epoch come in another order.

        Raises:
            FileNotFoundError: when there is nothing at the path, or what is there is no run.
        """
        if ckpt_path is None:
            return cls(None)
        path = Path(ckpt_path)
        if not path.exists():
            raise FileNotFoundError(f"ckpt_path={ckpt_path!r}: there is nothing to resume from")
        folder = run_folder(ckpt_path)
        if not any(folder.glob("*/*.ckpt")) and not (folder / RECORD).is_file():
            raise FileNotFoundError(
                f"ckpt_path={ckpt_path!r}: {folder} is no run folder, it holds neither {RECORD} "
                "nor a */*.ckpt"
            )
        return cls(folder, path.parent.name if path.name == INTERRUPTED else None)

    def carried_to(self, folder: Path) -> Earlier:
        """The same state in another folder, so that what is interrupted there goes on from there.

        Files are copied, as what writes to the new folder need not leave a linked one alone.
        """
        if self.folder is None or self.folder.resolve() == folder.resolve():
            return self
        for path in self._kept(self.folder) if not getattr(rank_zero_only, "rank", 0) else ():
            target = folder / path.relative_to(self.folder)
            with (
                path.open("rb") as source,
                atomic_file(target, what="the earlier run's checkpoint", parents=True) as stream,
            ):
                shutil.copyfileobj(source, stream)
        return Earlier(folder, self.midway)

    @staticmethod
    def _kept(folder: Path) -> list[Path]:
        return [path for name in (FINAL, LAST, INTERRUPTED) for path in folder.glob(f"*/{name}")]

    def finished(self, phase: str) -> Path | None:
        """The final checkpoint of a phase that came to its end."""
        return self._found(phase, FINAL)

    def unfinished(self, phase: str) -> Path | None:
        """The checkpoint to go on from: the last whole epoch's, if there is one."""
        return self._found(phase, INTERRUPTED if phase == self.midway else LAST)

    def _found(self, phase: str, name: str) -> Path | None:
        if self.folder is None or not (path := self.folder / phase / name).is_file():
            return None
        return path


def resume_command(folder: Path, words: Sequence[str]) -> str:
    """The command line that goes on with an interrupted run.

    Args:
        folder: of the run.
        words: overrides and flags of its command.

    >>> resume_command(Path("outputs/a b"), ["--config-dir=mine", "model=vae"])
    "lightning-compress --config-dir=mine model=vae 'ckpt_path=outputs/a b'"
    """
    kept = [one for one in words if not one.startswith(CKPT_PATH)]
    return shlex.join(["lightning-compress", *kept, f"{CKPT_PATH}{_value(str(folder))}"])


def _value(text: str) -> str:
    r"""A text as Hydra's grammar takes it; only plain ones go without quotes.

    >>> print(_value("outputs/a b"), _value("it's (a)"))
    outputs/a b 'it\'s (a)'
    """
    if re.fullmatch(r"[\w./:-]+( [\w./:-]+)*", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"
