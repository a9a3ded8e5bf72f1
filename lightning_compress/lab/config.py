"""Folder of the Hydra configs, and error messages with the closest valid keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

__all__ = ["config_dir", "explain", "override_key"]


def config_dir() -> Path:
    """The folder of the Hydra groups: beside the package in a checkout, inside it in a wheel.

    >>> (config_dir() / "train.yaml").is_file()
    True
    """
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Hydra's message, and the closest valid keys or groups for each unknown override.

    Args:
        error: what Hydra raised.
        overrides: the command line's `key=value` words.
    """
    chain, current = [], error
    while current is not None and len(chain) < 3:
        chain.append(str(current).strip())
        current = current.__cause__
    text = "\n".join(dict.fromkeys(chain))
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    known = [*groups, *_keys(overrides)]
    for word in overrides:
        key = override_key(word)
        if word.startswith(("-", "+", "hydra")) or "=" not in word or key in known:
            continue
        if close := difflib.get_close_matches(key, known, n=4, cutoff=0.4):
            text += f"\n{key!r} is no key of the config. Closest: {', '.join(close)}"
    return text


def override_key(word: str) -> str:
    """The key of an override of the command line.

    >>> override_key("+compression.prune.end=0.5"), override_key("logger@all=csv")
    ('compression.prune.end', 'logger')
    """
    return re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]


def _keys(overrides: Sequence[str]) -> Iterator[str]:
    """All dotted keys of the configs; of a group with a choice, those of the chosen files."""
    root = config_dir()
    chosen = dict(word.split("=", 1) for word in overrides if "=" in word)
    for path in sorted(root.glob("*.yaml")):
        yield from _flat(path, "")
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        choice = chosen.get(group.name, "")
        names = [name for name in re.split(r"[\[\],\s]+", choice) if name]
        for path in sorted(group.glob("*.yaml")):
            if not names or path.stem in names:
                yield from _flat(path, group.name)


def _flat(path: Path, prefix: str) -> Iterator[str]:
    def walk(node: object, at: str) -> Iterator[str]:
        if at:
            yield at
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{at}.{key}" if at else str(key))

    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    content.pop("defaults", None)
    for key, value in content.items():
        if key not in ("hydra", "_target_"):
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))
