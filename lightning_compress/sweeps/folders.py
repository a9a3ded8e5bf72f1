"""Where a sweep lies: the same command always means the same folder, so that it can go on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["sweep_folder"]

NAME_LENGTH = 48
SWEPT = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(|,(?![^\[{(]*[\]})])")


def sweep_folder(words: Sequence[str], root: str = "multirun") -> Path:
    """The folder of a command's sweep: what it sweeps, and a hash of all its settings.

    What only says how jobs are run (`hydra...`) does not count.

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
    """What a reader would call the sweep: the keys with several values, else the sweep's file."""
    pairs = [word.lstrip("+~").split("=", 1) for word in settings if "=" in word]
    keys = [key.split(".")[-1] for key, value in pairs if SWEPT.search(value)]
    files = [value for key, value in pairs if key == "sweep"]
    return [re.sub(r"\W+", "-", name) for name in files + keys]
