"""Going on with an interrupted run: what is finished is reused, what is not goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_compress.workflow.training import FINAL, INTERRUPTED, LAST

__all__ = ["Earlier", "resume_command"]


@dataclass(frozen=True)
class Earlier:
    """An earlier run's folder, or none.

    >>> Earlier.at(None).unfinished("dense") is None
    True
    """

    folder: Path | None

    @classmethod
    def at(cls, ckpt_path: str | None) -> Earlier:
        """The run that a folder or one of its checkpoints belongs to.

        Raises:
            FileNotFoundError: when there is nothing at the path, or no checkpoint in the folder.
        """
        if ckpt_path is None:
            return cls(None)
        path = Path(ckpt_path)
        if not path.exists():
            raise FileNotFoundError(f"ckpt_path={ckpt_path!r}: there is nothing to resume from")
        folder = path if path.is_dir() else path.parent.parent
        if not any(folder.glob("*/*.ckpt")):
            raise FileNotFoundError(
                f"ckpt_path={ckpt_path!r}: {folder} is no run folder, it holds no */*.ckpt"
            )
        return cls(folder)

    def finished(self, phase: str) -> Path | None:
        """The final checkpoint of a phase that came to its end."""
        return self._found(phase, FINAL)

    def unfinished(self, phase: str) -> Path | None:
        """The checkpoint to go on from: the last whole epoch, else where it was interrupted."""
        return self._found(phase, LAST) or self._found(phase, INTERRUPTED)

    def _found(self, phase: str, name: str) -> Path | None:
        if self.folder is None or not (path := self.folder / phase / name).is_file():
            return None
        return path


def resume_command(folder: Path, overrides: list[str]) -> str:
    """The command line that goes on with an interrupted run.

    >>> resume_command(Path("outputs/a b"), ["model=vae"])
    "lightning-compress model=vae 'ckpt_path=outputs/a b'"
    """
    import shlex

    kept = [one for one in overrides if not one.startswith("ckpt_path=")]
    return shlex.join(["lightning-compress", *kept, f"ckpt_path={folder}"])
