"""Loader of run folders: `results.json`, `curves.csv`, Hydra's record of the call."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.lab.report.wording import scalar
from lightning_compress.lab.trust import read_inside, read_words

__all__ = [
    "Curves",
    "Run",
    "Unreadable",
    "common_root",
    "find_results",
    "load_run",
    "load_runs",
    "run_name",
]
RESULTS, CURVES = "results.json", "curves.csv"
MOST_BYTES = {RESULTS: 1 << 24, CURVES: 1 << 26, "config.yaml": 1 << 20}
Curves = dict[str, dict[str, list[tuple[float, float]]]]  # metric -> run -> (step, value)


@dataclass(frozen=True)
class Run:
    """One run folder as read.

    Attributes:
        folder: where it lies.
        results: the content of `results.json`, checked for its shape.
        curves: metric -> "dense" or "compressed" -> [(step, value)].
        command: the command line, where Hydra recorded it.
        config: the composed config as YAML text, where Hydra recorded it.
        notes: what is missing, one sentence each.
    """

    folder: Path
    results: dict[str, Any]
    curves: Curves = field(default_factory=dict)
    command: str | None = None
    config: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A `results.json` that could not be used, and why."""

    path: Path
    reason: str


def find_results(folders: Sequence[str | Path]) -> list[Path]:
    """Return every `results.json` in or beneath the folders, each once, sorted by path.

    Raises:
        FileNotFoundError: when a folder does not exist or holds none.
        ValueError: when no folder is given.
    """
    if not folders:
        raise ValueError(f"no run folder given; name at least one folder that holds {RESULTS}")
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; looked for {RESULTS} beneath it")
        below = sorted(folder.rglob(RESULTS))
        if not below:
            raise FileNotFoundError(f"no {RESULTS} in {folder} or in any folder beneath it")
        found.update((path.parent.resolve(), path) for path in below if not path.is_dir())
    return sorted(found.values())


def load_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[Unreadable]]:
    """Read all runs in or beneath the folders; damaged ones are returned with their reason.

    Raises:
        FileNotFoundError: as `find_results`.
    """
    read = [_try_run(path) for path in find_results(folders)]
    runs = [item for item in read if isinstance(item, Run)]
    return runs, [item for item in read if isinstance(item, Unreadable)]


def _try_run(path: Path) -> Run | Unreadable:
    try:
        return load_run(path.parent)
    except Exception as error:  # untrusted files may raise anything: the other runs are shown
        return Unreadable(path, str(error) or type(error).__name__)


def load_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        ValueError: when `results.json` is damaged; the message names the place.
        OSError: when it cannot be read at all.
    """
    results = _read_results(folder)
    notes: list[str] = []
    curves: Curves = {}
    try:
        curves = _read_curves(folder)
    except FileNotFoundError:
        notes.append(f"{CURVES} is missing: no training curves.")
    except (ValueError, OSError, csv.Error) as error:
        notes.append(f"{CURVES} could not be read: {error}.")
    command, config, note = _read_hydra(folder)
    if isinstance(results.get("command"), str):
        command = results["command"]
    return Run(folder, results, curves, command, config, (*notes, *note))


def _is_number(value: object) -> bool:
    return value is None or scalar(value) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _mappings(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_mapping, value.values()))


def _names(value: object) -> bool:
    return isinstance(value, dict) and all(v is None or _is_name(v) for v in value.values())


def _rows(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_mapping, value))


Check = tuple[Callable[[object], bool], str]
NUMBER: Check = (_is_number, "a number or null")
NUMBERS: Check = (_numbers, "an object of numbers")
MAPPINGS: Check = (_mappings, "an object of objects")
NAME: Check = (_is_name, "a string")
MAPPING: Check = (_is_mapping, "an object")
REQUIRED: dict[str, Check] = {"model": NAME, "data": NAME, "dense": MAPPING, "compressed": MAPPING}
OPTIONAL: dict[str, Check] = {
    "compression": MAPPING,
    "start": NAME,
    "steps": NUMBERS,
    "evaluator": MAPPING,
    "ratio": NUMBER,
    "entropy_bound_bytes": NUMBER,
    "baseline_spread": MAPPINGS,
    "verdict": MAPPING,
    "layers": (_rows, "a list of objects"),
    "samples": (_names, "an object of file names"),
    "metric_info": MAPPINGS,
    "federated": MAPPING,
}
SIDE: dict[str, Check] = {
    "quality": NUMBERS,
    "bytes": NUMBERS,
    "params": NUMBER,
    "nonzero_params": NUMBER,
    "macs": NUMBER,
    "latency_ms": MAPPINGS,
    "train_seconds": NUMBER,
}


def _check(values: dict[str, Any], checks: dict[str, Check], where: str = "") -> None:
    for key, (valid, wanted) in checks.items():
        if values.get(key) is not None and not valid(values[key]):
            raise ValueError(f"{where}{key} must be {wanted}, got {values[key]!r:.80}")


def _read_results(folder: Path) -> dict[str, Any]:
    try:
        results = _whole_text(json.loads(read_inside(folder, RESULTS, most=MOST_BYTES[RESULTS])))
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"must hold one JSON object, got {type(results).__name__}")
    missing = [key for key in REQUIRED if results.get(key) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; required are {', '.join(REQUIRED)}")
    _check(results, REQUIRED | OPTIONAL)
    _check(results.get("evaluator") or {}, {"floor": NUMBERS}, "evaluator.")
    for side in ("dense", "compressed"):
        _check(results[side], SIDE, f"{side}.")
    return results


def _whole_text(value: Any) -> Any:
    """JSON with its lone surrogates, which no file can hold, written as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_whole_text(key): _whole_text(one) for key, one in value.items()}
    return [_whole_text(one) for one in value] if isinstance(value, list) else value


def _read_curves(folder: Path) -> Curves:
    curves: Curves = {}
    text = read_inside(folder, CURVES, most=MOST_BYTES[CURVES])
    with io.StringIO(text, newline="") as stream:
        rows = csv.DictReader(stream)
        lacking = {"run", "step", "metric", "value"} - set(rows.fieldnames or ())
        if lacking:
            raise ValueError(f"the column(s) {', '.join(sorted(lacking))} are missing")
        for row in rows:
            try:
                point = (float(row["step"]), float(row["value"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {rows.line_num}: {error}") from error
            curves.setdefault(str(row["metric"]), {}).setdefault(str(row["run"]), []).append(point)
    return curves


def _read_hydra(folder: Path) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return (command, config as YAML, notes) from Hydra's `.hydra` folder, if there is one.

    Both are shown as they stand: to resolve `${oc.env:...}` would print the reader's environment.
    """
    text = None
    try:
        with contextlib.suppress(FileNotFoundError):
            text = read_inside(folder, ".hydra/config.yaml", most=MOST_BYTES["config.yaml"])
        words = read_words(folder, ".hydra/overrides.yaml")
        command = shlex.join(["lightning-compress", *map(_whole_text, words)])
    except FileNotFoundError:
        return None, text, ()
    except (ValueError, OSError) as error:
        return None, None, (f"Hydra's record of the call could not be read: {error}.",)
    return command, text, ()


def common_root(run_dirs: Sequence[str | Path]) -> Path:
    """The folder that all given ones lie in; for one, itself.

    >>> common_root(["/a/b/c", "/a/b/d"]).as_posix()
    '/a/b'
    """
    return Path(os.path.commonpath([Path(folder).absolute() for folder in run_dirs]))


def run_name(folder: Path, root: Path) -> str:
    """A folder relative to the root; the root itself by its own name.

    >>> run_name(Path("/a/b/c"), Path("/a")), run_name(Path("/a"), Path("/a"))
    ('b/c', 'a')
    """
    relative = os.path.relpath(folder.absolute(), root)
    return folder.absolute().name if relative == "." else Path(relative).as_posix()
