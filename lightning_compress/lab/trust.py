"""Safe reading of untrusted run folders: text only, and configs with allowed targets only.

A config names objects (`_target_`), so a run folder is code. A config may name classes of this
package, of torch, torchvision, torchmetrics and lightning, and what the user allows by name;
nothing else is imported or called.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_compress.lab.config import config_dir

__all__ = ["ALLOW", "PACKAGES", "check_targets", "read_inside", "read_words", "recorded_fault"]

PACKAGES = ("lightning_compress", "torch", "torchvision", "torchmetrics", "lightning")
ALLOW = "LIGHTNING_COMPRESS_ALLOW"  # environment variable: names, separated by commas
_MOST_WORDS = 1 << 20  # bytes of a record of overrides


def read_inside(folder: Path, name: str, *, most: int) -> str:
    """The text of a file of a run folder.

    Raises:
        FileNotFoundError: without such a file.
        ValueError: for one that is no regular file, lies elsewhere, is above `most` bytes, or is no
            UTF-8.
        OSError: when it cannot be read.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is a link out of the folder")
    if not path.is_file():
        raise ValueError(f"{name} is no regular file")
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name} takes more than {most} bytes")
    return content.decode("utf-8")


def read_words(folder: Path, name: str) -> list[str]:
    """The overrides that Hydra recorded: a YAML list of words, nothing of which is resolved.

    Raises:
        FileNotFoundError: without such a file.
        ValueError: for anything but a list of plain words.
        OSError: when it cannot be read.
    """
    text = read_inside(folder, name, most=_MOST_WORDS)
    try:  # nodes only: building objects would follow merges and aliases, however many they make
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{name} is no valid YAML: {why}") from None
    if node is None:
        return []
    words = node.value if isinstance(node, yaml.SequenceNode) else None
    if words is None or not all(isinstance(word, yaml.ScalarNode) for word in words):
        raise ValueError(f"{name} must hold a list of words")
    return [word.value for word in words]


def recorded_fault(words: Iterable[str]) -> str | None:
    """Why recorded overrides are unsafe to repeat on the reader's machine; None: they are safe.

    >>> recorded_fault(["model=vae", "seed=1"])
    >>> recorded_fault(["hydra.searchpath=[file:///tmp]"])
    "'hydra.searchpath=[file:///tmp]' changes where Hydra looks and what it runs"
    """
    for word in words:
        if word.startswith("-"):
            return f"{word!r} is an option"
        if word.lstrip("+~").startswith(("hydra.", "hydra/", "hydra=", "hydra@")):
            return f"{word!r} changes where Hydra looks and what it runs"
    return None


def check_targets(config: Any, source: str, allowed: Iterable[str] = ()) -> None:
    """Check that an untrusted config names allowed targets only.

    Args:
        config: plain containers, resolved.
        source: where it is from, for the message.
        allowed: names of modules, classes or functions that the user allows besides; those of the
            environment variable `LIGHTNING_COMPRESS_ALLOW` are allowed too.

    Raises:
        ValueError: naming the target and how to allow it.

    >>> check_targets({"model": {"_target_": "torch.nn.Linear"}}, "run")
    >>> check_targets({"model": {"_target_": "joblib.load"}}, "run")
    Traceback (most recent call last):
    ValueError: run: _target_ 'joblib.load' is not of lightning_compress, torch, ...
    """
    named = [*allowed, *filter(None, os.environ.get(ALLOW, "").split(","))]
    for target in dict.fromkeys(map(str, _targets(config))):
        if any(target == name or target.startswith(f"{name}.") for name in named):
            continue
        if (fault := _fault(target)) is not None:
            raise ValueError(
                f"{source}: _target_ {target!r} {fault}, and a config runs what it names. If you "
                f"trust it, allow it by name: {ALLOW}={target} (or --allow {target})"
            )


def _targets(node: Any) -> Iterator[object]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from _targets(one)


def _fault(target: str) -> str | None:
    if target.split(".")[0] not in PACKAGES:
        return f"is not of {', '.join(PACKAGES)}"
    if target in _shipped():
        return None
    found = _located(target)
    if found is None:
        return "cannot be found"
    if not inspect.isclass(found):
        return "is no class"
    home = found.__module__.split(".")[0]
    return None if home in PACKAGES else f"is {found.__module__}.{found.__qualname__}"


def _located(target: str) -> Any:
    """The object of a dotted name in one of `PACKAGES`; None if there is none."""
    first, *names = target.split(".")
    found, path = importlib.import_module(first), first
    for name in names:
        path = f"{path}.{name}"
        if not hasattr(found, name):
            with contextlib.suppress(Exception):  # a submodule, which may need what is not there
                importlib.import_module(path)
        if not hasattr(found, name):
            return None
        found = getattr(found, name)
    return found


@cache
def _shipped() -> frozenset[str]:
    """The targets of this package's own configs, some of which are functions."""
    texts = (path.read_text(encoding="utf-8") for path in config_dir().rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_: *([\w.]+)", text))
