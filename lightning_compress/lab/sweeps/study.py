"""Multi-objective Optuna study by ask and tell, resumable from its storage."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from lightning_compress.errors import require
from lightning_compress.files import write_atomically
from lightning_compress.lab.sweeps.jobs import Outcome

__all__ = [
    "FRONT",
    "StudyOptions",
    "run_study",
    "search_space",
    "words_of",
    "write_front",
]


def search_space(
    params: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Search space, key -> Optuna distribution, and the overrides that every trial shares.

    Args:
        params: the sweeper's own, key -> value in Hydra's grammar.
        arguments: the command line's; one with the same key takes the place of a parameter.

    Raises:
        ValueError: when nothing is left to search.

    >>> space, fixed = search_space({"bits": "range(4,9)"}, ["model=vae"])
    >>> space["bits"].low, space["bits"].high, fixed
    (4, 8, ['model=vae'])
    """
    words = [f"{key}={value}" for key, value in params.items()]
    parsed = OverridesParser.create().parse_overrides([*words, *arguments])
    latest = {one.get_key_element(): one for one in parsed}
    space = {key: _distribution(one) for key, one in latest.items() if one.is_sweep_override()}
    if not space:
        raise ValueError(
            "nothing is swept: give at least one key several values, such as "
            "'compression.prune.final_sparsity=interval(0.5,0.98)', or sweep=pareto"
        )
    return space, [one.input_line or "" for key, one in latest.items() if key not in space]


def _distribution(override: Override) -> Any:
    optuna = require("optuna", extra="sweep")
    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kinds = optuna.distributions
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(value.start, value.end, log=log)
    if isinstance(value, RangeSweep):
        found: list[Any] = list(override.sweep_iterator())
        whole = all(isinstance(one, int) for one in found)
        if whole and len(found) > 1:
            return optuna.distributions.IntDistribution(found[0], found[-1], step=value.step)
    return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def words_of(params: Mapping[str, Any]) -> list[str]:
    """A trial's parameters as overrides; numbers with five digits, as one would type them.

    >>> words_of({"compression.prune.final_sparsity": 0.8123456789, "model": "vae"})
    ['compression.prune.final_sparsity=0.81235', 'model=vae']
    """
    return [
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    ]


FRONT = "pareto.json"


def write_front(study: Any, objectives: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Write the front, best in the first objective first, and how many trials ended how.

    Args:
        study: Optuna's.
        objectives: (path into results.json, direction) each.
        folder: of the sweep; a trial's own folder in there is named by its number.
    """
    sign = -1 if objectives[0][1] == "maximize" else 1
    best = sorted(study.best_trials, key=lambda trial: (sign * trial.values[0], trial.number))
    names = [path for path, _ in objectives]
    content = {
        "objectives": [{"path": path, "direction": direction} for path, direction in objectives],
        "trials": dict(Counter(trial.state.name.lower() for trial in study.trials)),
        "front": [
            {
                "number": trial.number,
                "folder": str(trial.number),
                "values": dict(zip(names, trial.values, strict=True)),
                "overrides": words_of(trial.params),
            }
            for trial in best
        ],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return write_atomically(folder / FRONT, text, what="the Pareto front")


STUDY, NAME = "study.db", "lightning_compress"
DIRECTIONS = ("minimize", "maximize")
Launch = Callable[[Sequence[Sequence[str]], int], list[Outcome]]


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study; see `conf/hydra/sweeper/pareto.yaml`.

    Raises:
        ValueError: for a value out of its range.
    """

    n_trials: int = 20
    n_jobs: int = 1
    seed: int = 0
    objectives: tuple[tuple[str, str], ...] = (("compressed.bytes.lcz", "minimize"),)
    sampler: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_trials", "n_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"hydra.sweeper.{name}={getattr(self, name)!r} must be 1 or more")
        for path, direction in self.objectives:
            if direction not in DIRECTIONS:
                raise ValueError(f"objective {path}: direction {direction!r} is not {DIRECTIONS}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> StudyOptions:
        """From Hydra's config of the sweeper."""
        given: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }
        given["objectives"] = tuple((o["path"], o["direction"]) for o in given["objectives"])
        return cls(**given)


def run_study(
    options: StudyOptions, arguments: Sequence[str], folder: str | Path, launch: Launch
) -> list[Outcome]:
    """Run a study until it has its trials; `pareto.json` is written after every batch.

    Trials that an earlier launch left unfinished come first, in their own folders.

    Args:
        options: of the study.
        arguments: the command line's overrides.
        folder: of the sweep; holds the study.
        launch: runs jobs, given as overrides, numbered from the second argument on.

    Raises:
        RuntimeError: when another process runs a study in the folder.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    space, fixed = search_space(options.params, arguments)
    try:
        with FileLock(home / "study.lock", timeout=0):
            study, done = _open(options, home), []
            for batch in _batches(study, options, space):
                done += _run(study, options, batch, fixed, launch)
                write_front(study, options.objectives, home)
            write_front(study, options.objectives, home)
            return done
    except Timeout as error:
        raise RuntimeError(f"another process runs the study in {home}") from error


def _open(options: StudyOptions, home: Path) -> Any:
    optuna = require("optuna", extra="sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{(home / STUDY).absolute()}",
        study_name=NAME,
        directions=[direction for _, direction in options.objectives],
        load_if_exists=True,
    )
    # With the same seed as before, a resumed study would draw its first trials again.
    seed = options.seed + len(study.trials)
    study.sampler = _sampler(options.sampler, seed) or optuna.samplers.TPESampler(seed=seed)
    return study


def _sampler(config: Any, seed: int) -> Any:
    from hydra.utils import instantiate

    if not isinstance(config, (Mapping, DictConfig)):
        return config
    return instantiate({"seed": seed, **config})


def _batches(study: Any, options: StudyOptions, space: dict[str, Any]) -> Iterator[list[Any]]:
    """Trials to run: those left unfinished, then new ones; numbers in a batch follow each other."""
    states = require("optuna", extra="sweep").trial.TrialState
    left = study.get_trials(states=[states.RUNNING])
    while left:
        batch = [left.pop(0)]
        while left and len(batch) < options.n_jobs and left[0].number == batch[-1].number + 1:
            batch.append(left.pop(0))
        yield batch
    while (missing := options.n_trials - len(study.trials)) > 0:
        yield [study.ask(space) for _ in range(min(missing, options.n_jobs))]


def _run(
    study: Any, options: StudyOptions, batch: list[Any], fixed: list[str], launch: Launch
) -> list[Outcome]:
    jobs = [[*fixed, *words_of(trial.params)] for trial in batch]
    outcomes = launch(jobs, batch[0].number)
    for trial, outcome in zip(batch, outcomes, strict=True):
        _tell(study, options, trial, outcome)
    return outcomes


def _tell(study: Any, options: StudyOptions, trial: Any, outcome: Outcome) -> None:
    """Tell Optuna the outcome of a trial; a killed one stays open and is tried again."""
    states = require("optuna", extra="sweep").trial.TrialState
    if outcome.state == "done":
        values = [_value(outcome.results(), path) for path, _ in options.objectives]
        if all(map(math.isfinite, values)):
            study.tell(trial.number, values)
        else:
            study.tell(trial.number, state=states.FAIL)
    elif outcome.state == "pruned":
        study.tell(trial.number, state=states.PRUNED)
    elif outcome.state == "failed":
        study.tell(trial.number, state=states.FAIL)


def _value(results: Mapping[str, Any], path: str) -> float:
    """A number in results.json.

    Raises:
        KeyError: naming the path and what there is instead.
    """
    found: Any = results
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            valid = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise KeyError(f"objective {path!r}: no {key!r} in results.json; there are {valid}")
        found = found[key]
    return math.nan if found is None else float(found)
