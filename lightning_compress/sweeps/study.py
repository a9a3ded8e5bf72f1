"""A study of several goals by Optuna's ask and tell; what was asked is never forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lightning_compress.errors import require
from lightning_compress.sweeps.fronts import write_front
from lightning_compress.sweeps.outcomes import Outcome
from lightning_compress.sweeps.space import search_space, words_of

__all__ = ["StudyOptions", "run_study"]

STUDY, NAME = "study.db", "lightning_compress"
DIRECTIONS = ("minimize", "maximize")
Launch = Callable[[Sequence[Sequence[str]], int], list[Outcome]]


@dataclass(frozen=True)
class StudyOptions:
    """What a study is told; see `conf/hydra/sweeper/pareto.yaml`.

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
    """Ask, launch and tell until the study has its trials; `pareto.json` follows every batch.

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
    # With the same seed as before, a study that goes on would draw its first trials again.
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
    """Tell what became of a trial; one that was killed stays open, to be tried again."""
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
