"""Identity of a run: hashes of its config, and the recorded overrides of its folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lightning_compress.files import write_atomically
from lightning_compress.lab.config import override_key
from lightning_compress.lab.trust import check_targets, read_words, recorded_fault

__all__ = [
    "CKPT_PATH",
    "RECORDS",
    "check_record",
    "check_same_run",
    "config_hash",
    "dense_recipe",
    "recipe_hash",
    "recorded_overrides",
    "run_folder",
    "with_recorded",
    "write_run_records",
]
DIGITS = 16
PASSING = ("ckpt_path", "dense_cache")  # these do not change the result
OWN_CODE = ("models", "data", "workflow/training.py")  # of this package, behind a dense model


def recipe_hash(recipe: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain data, whatever the order of its keys.

    >>> recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def config_hash(cfg: DictConfig) -> str:
    """Hash of the settings of a config that determine its results.

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


RECORDS = ".hydra"
CKPT_PATH = "ckpt_path="

# Keys that do not change training: paths, and later measurements.
_FREE = re.compile(
    r"(threads|ckpt_path|baseline|dense_cache|baseline_seeds|hopeless|callbacks|logger|evaluate"
    r"|export)\b|data\.(folder|file|download|num_workers)$"
    r"|federated\.(timeout|cpus|cpus_each|gpus_each|evaluate_every)$"
    r"|trainer\.(?!max_epochs|max_steps|limit_train_batches|accumulate|gradient_clip|precision)"
)


def with_recorded(words: Sequence[str]) -> list[str]:
    """Command line that resumes a run: its recorded overrides, then the present words.

    Args:
        words: overrides and flags; without a `ckpt_path=` they stay as they are.
    """
    paths = [word for word in words if word.startswith(CKPT_PATH)]
    folder = run_folder(_text(paths[-1])) if paths else None
    recorded = recorded_overrides(folder) if folder is not None else []
    if fault := recorded_fault(recorded):
        raise ValueError(f"{folder}: its recorded overrides cannot be used: {fault}")
    keys = {override_key(word) for word in words}
    return [*(one for one in recorded if override_key(one) not in {*keys, "ckpt_path"}), *words]


def check_record(cfg: DictConfig, folder: Path, said: Sequence[str] = ()) -> None:
    """Check that the config of a resumed run names allowed targets only.

    Args:
        cfg: composed of the recorded overrides and the present ones.
        folder: of the earlier run.
        said: the words of the present command; the targets they name are allowed.

    Raises:
        ValueError: naming the target and how to allow it.
    """
    typed = re.findall(r"_target_['\"]?[=:] *['\"]?([\w.]+)", "\n".join(said))
    check_targets(OmegaConf.to_container(cfg, resolve=True), str(folder), typed)


def run_folder(ckpt_path: str) -> Path:
    """The folder of the run that a folder or one of its checkpoints belongs to."""
    path = Path(ckpt_path)
    return path if path.is_dir() else path.parent.parent


def recorded_overrides(folder: Path) -> list[str]:
    """The recorded overrides of a run's command; empty without a record."""
    try:
        return read_words(folder, f"{RECORDS}/overrides.yaml")
    except FileNotFoundError:
        return []


def _text(word: str) -> str:
    return str(OverridesParser.create().parse_override(word).value())


def check_same_run(cfg: DictConfig, folder: Path) -> None:
    """Check that a resumed run has the settings that it had before.

    Args:
        cfg: of now.
        folder: of the earlier run; one without a record is not checked.

    Raises:
        ValueError: naming what differs.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return
    before, now = (dict(_leaves(one)) for one in (OmegaConf.load(file), cfg))
    keys = [key for key in {**before, **now} if not _FREE.match(key)]
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{CKPT_PATH}{cfg.ckpt_path} goes on with a run of other settings: "
            f"{'; '.join(changed)}. Leave these out, or leave ckpt_path out for a new run"
        )


def _leaves(cfg: Any) -> Iterator[tuple[str, object]]:
    def walk(node: object, at: str) -> Iterator[tuple[str, object]]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                yield from walk(value, f"{at}.{key}" if at else str(key))
        else:
            yield at, node

    return walk(OmegaConf.to_container(cfg, resolve=True), "")


def write_run_records(cfg: DictConfig, folder: Path) -> None:
    """Write the overrides, the config and Hydra's config, as Hydra itself does at the start.

    Hydra's would be there before the folder is locked, so that a second run, which is then refused,
    leaves its own in place of the first one's: `hydra.output_subdir` is null in our configs.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # seconds; sweeps need none

    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
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
