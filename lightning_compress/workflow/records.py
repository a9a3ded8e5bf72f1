"""What a run was told, in the files where Hydra would write it: `.hydra/` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_compress.files import write_atomically

__all__ = ["RECORDS", "write_records"]

RECORDS = ".hydra"


@rank_zero_only
def write_records(cfg: DictConfig, folder: Path) -> None:
    """Write the overrides, the config and Hydra's own, as Hydra does before any program begins.

    Hydra's would be there before the folder is locked, so that a second run, which is then refused,
    leaves its own in place of the first one's: `hydra.output_subdir` is null in our configs.
    """
    known: Any = HydraConfig.instance().cfg
    contents: dict[str, Any] = {
        "config.yaml": cfg,
        "hydra.yaml": known,
        "overrides.yaml": None if known is None else known.hydra.overrides.task,
    }
    for name, content in contents.items():
        if content is not None:
            text = OmegaConf.to_yaml(content)
            write_atomically(folder / RECORDS / name, text, what="the command", parents=True)
