"""What a result depends on, as a content hash: equal hashes may share one result."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["config_hash", "dense_recipe", "recipe_hash"]

DIGITS = 16
PASSING = ("ckpt_path", "dense_cache")  # how a result is come by, not what it is
OWN_CODE = ("models", "data", "workflow/training.py")  # of this package, behind a dense model


def recipe_hash(recipe: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain data, whatever the order of its keys.

    >>> recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def config_hash(cfg: DictConfig) -> str:
    """The hash of all that a config says of its results.

    >>> one, other = (OmegaConf.create({"seed": 0, "ckpt_path": path}) for path in (None, "a"))
    >>> config_hash(one) == config_hash(other)
    True
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    for key in PASSING:
        plain.pop(key, None)
    if isinstance(plain.get("evaluate"), dict):
        plain["evaluate"].pop("cache_dir", None)
    return recipe_hash(plain)


def dense_recipe(cfg: DictConfig, *, seed: int, dims: dict[str, int], content: str) -> Any:
    """All that determines a dense model and its curve, as plain data.

    Args:
        cfg: the whole config.
        seed: of weights and noise.
        dims: the sizes that the model takes from the data.
        content: the data's fingerprint.
    """
    import lightning
    import torch

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {
        **{key: plain.get(key) for key in ("model", "data", "trainer", "callbacks", "threads")},
        "seed": seed,
        "dims": dims,
        "content": content,
        "monitor": [plain["evaluate"][key] for key in ("feature", "monitor_every")],
        "code": _code(cfg.model._target_, cfg.data._target_),
        "versions": [torch.__version__, lightning.__version__],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def _code(*targets: str) -> str:
    """The hash of the source behind a dense model: this package's, and the user's own classes."""
    from hydra.utils import get_class

    root = Path(__file__).parent.parent
    files = {path for part in OWN_CODE for path in _sources(root / part)}
    files |= {Path(inspect.getfile(get_class(target))) for target in targets}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:DIGITS]


def _sources(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]
