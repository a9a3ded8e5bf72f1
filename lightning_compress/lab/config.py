"""Folder of the Hydra configs, and error messages with the closest valid keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

__all__ = ["check_types", "config_dir", "explain", "override_key"]

_NUMBERS = (int, float, bool, type(None))


def config_dir() -> Path:
    """The folder of the Hydra groups: beside the package in a checkout, inside it in a wheel.

    >>> (config_dir() / "train.yaml").is_file()
    True
    """
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """One message for what Hydra raised: what is wrong, and the closest valid names.

    Args:
        error: what Hydra raised.
        overrides: the command line's `key=value` words.
    """
    chain, current = [], error
    while current is not None and len(chain) < 4:
        chain.append(current)
        current = current.__cause__
    text = "\n".join(dict.fromkeys(str(one).strip() for one in chain))
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        return _unknown_choice(*missing.groups()) or text
    if wrong := re.search(r"Could not override '([^']+)'", text):
        key = override_key(wrong[1])
        return f"{_unknown_key(key, overrides)}; +{key}=... adds a new one"
    if wrong := re.search(r"Could not delete from config\. .*?'([^']+)' does not exist", text):
        return _unknown_key(override_key(wrong[1]), overrides)
    if type(chain[0]).__name__ == "InstantiationException" and len(chain) > 1:
        place = re.search(r"full_key: (\S+)", text)  # the constructor's own words say more
        return f"{place[1]}: {chain[1]}" if place else str(chain[1])
    text = re.sub(r"\nSee https://hydra\.cc\S* for details", "", text)
    if override := getattr(chain[0], "override", None):  # whose grammar is Hydra's
        return f"cannot read {override!r} (quote values with brackets or commas): {text}"
    return re.sub(r"\n\s*(?:reference_type|object_type)=.*", "", text)


def check_types(cfg: Any, place: str = "") -> None:
    """Refuse a word where the constructor that a config names takes numbers alone.

    Args:
        cfg: a config, with `_target_` wherever an object is described.
        place: key of the config.

    Raises:
        ValueError: naming the key, its value and the types.

    >>> check_types({"trainer": {"_target_": "lightning.pytorch.Trainer", "max_epochs": "few"}})
    Traceback (most recent call last):
    ValueError: trainer.max_epochs='few': expected int or None
    """
    numeric = _numeric_arguments(cfg["_target_"]) if "_target_" in cfg else {}
    for key in cfg:
        value, at = cfg[key], f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            check_types(value, at)
        elif isinstance(value, str) and (kinds := numeric.get(key)):
            named = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{at}={value!r}: expected {named}")


def _numeric_arguments(target: str) -> dict[str, tuple[type, ...]]:
    """The types of those arguments of a class or function that take numbers alone."""
    from hydra.utils import get_object

    try:
        called = get_object(target)
        hints = get_type_hints(called.__init__ if isinstance(called, type) else called)
    except (ImportError, NameError, TypeError, ValueError):  # its own message comes when it is made
        return {}
    types = {name: get_args(hint) or (hint,) for name, hint in hints.items()}
    return {name: found for name, found in types.items() if set(found) <= set(_NUMBERS)}


def _unknown_choice(group: str, choice: str) -> str:
    """The message for a choice that a group does not have; empty for a group of others."""
    folder = config_dir() / group
    valid = sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []
    if not valid:
        return ""
    close = difflib.get_close_matches(choice, valid, n=1)
    hint = f" Closest: {close[0]}." if close else ""
    return f"{group}={choice}: there is no such choice.{hint} Valid are {', '.join(valid)}"


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """The message for a key that the config does not have."""
    said = f"there is no key {key!r}"
    known = list(dict.fromkeys(_keys(overrides)))
    if key in known:  # of a group that the defaults list does not have
        return f"{key!r} cannot be set here: give its group a choice"
    for path in _files_with(key):
        group, name = path.parent.name, path.stem
        return f"{said}: it belongs to {group}={name}, which is not chosen: {group}=[...,{name}]"
    close = _closest(key, known)
    hint = f". Closest: {', '.join(close)}" if close else ""
    return f"{said}{hint}"


def _closest(key: str, known: Sequence[str]) -> list[str]:
    """Up to four names near a key: beside it first, then of the same group, then of others."""
    parent, _, last = key.rpartition(".")
    top = key.partition(".")[0]
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == parent}
    if not parent:
        beside |= {one: one for one in groups}
    names = difflib.get_close_matches(last, list(beside), n=4, cutoff=0.5)
    near = [beside[one] for one in names]
    if len(names) < 2:
        same = [one for one in known if one.startswith(f"{top}.")]
        near += difflib.get_close_matches(key, same, n=3, cutoff=0.6)
    if not near:
        near += difflib.get_close_matches(key, [*groups, *known], n=4, cutoff=0.5)
        ends = {one for one in known if one.rpartition(".")[2] == last}
        near += sorted(ends, key=len)[:2]
    if not near and beside:
        near += list(beside.values())[:8]  # all that stand there
    return list(dict.fromkeys(near))[:8]


def _files_with(key: str) -> Iterator[Path]:
    """Files of multi-choice groups that hold a key."""
    for path in sorted((config_dir() / "compression").glob("*.yaml")):
        if key in _flat(path, "compression"):
            yield path


def override_key(word: str) -> str:
    """The key of an override of the command line.

    >>> override_key("+compression.prune.end=0.5"), override_key("logger@all=csv")
    ('compression.prune.end', 'logger')
    """
    return re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]


def _keys(overrides: Sequence[str]) -> Iterator[str]:
    """All dotted keys of the configs; of a group with a choice, those of the chosen files."""
    root = config_dir()
    chosen = _defaults(root / "train.yaml")
    chosen |= dict(word.split("=", 1) for word in overrides if "=" in word)
    if (experiment := root / "experiment" / f"{chosen.get('experiment')}.yaml").is_file():
        chosen = {**chosen, **_defaults(experiment)}
    for path in sorted(root.glob("*.yaml")):
        yield from _flat(path, "")
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        choice = chosen.get(group.name, "")
        names = [name for name in re.split(r"[\[\],\s']+", choice) if name]
        for path in sorted(group.glob("*.yaml")):
            if not names or path.stem in names:
                yield from _flat(path, group.name)


def _defaults(path: Path) -> dict[str, str]:
    """The choices of a file's defaults list, as on the command line."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    pairs = [one for one in content.get("defaults", []) if isinstance(one, dict)]
    return {
        str(group).removeprefix("override ").lstrip("/"): str(choice)
        for one in pairs
        for group, choice in one.items()
        if choice
    }


def _flat(path: Path, prefix: str) -> Iterator[str]:
    """The dotted keys of a file."""

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
