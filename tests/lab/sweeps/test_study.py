"""The study: it goes on where it stopped, and its front is the one a plain comparison finds."""

import json

import pytest
from filelock import FileLock

from lightning_compress.lab.sweeps.jobs import Outcome
from lightning_compress.lab.sweeps.study import StudyOptions, run_study

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")
GOALS = (("bytes", "minimize"), ("quality.loss", "minimize"))


def options(**changes):
    params = {"x": "interval(0,1)", "y": "interval(0,1)"}
    return StudyOptions(**{"n_trials": 6, "objectives": GOALS, "params": params, **changes})


def launcher(folder, *, states=None, stop_at=None, seen=None):
    """Launches jobs that are over at once: bytes x + y, loss 1 - x + y."""

    def launch(jobs, first):
        found = []
        for number, words in enumerate(jobs, first):
            if number == stop_at:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append((number, tuple(words)))
            values = {k: float(v) for k, v in (w.split("=") for w in words if w[0] in "xy")}
            home = folder / str(number)
            home.mkdir(exist_ok=True)
            x, y = values["x"], values["y"]
            results = {"bytes": x + y, "quality": {"loss": 1 - x + y}}
            (home / "results.json").write_text(json.dumps(results))
            state = (states or {}).get(number, "done")
            found.append(Outcome(number, list(words), str(home), "f", state=state))
        return found

    return launch


def stored(folder):
    return optuna.load_study(
        study_name="lightning_compress", storage=f"sqlite:///{folder / 'study.db'}"
    )


def test_the_front_is_what_a_plain_comparison_leaves(tmp_path):
    run_study(options(n_trials=12), ["model=vae"], tmp_path, launcher(tmp_path))
    written = json.loads((tmp_path / "pareto.json").read_text())
    points = {trial.number: tuple(trial.values) for trial in stored(tmp_path).trials}
    best = {
        number
        for number, (size, loss) in points.items()
        if not any(a <= size and b <= loss and (a, b) != (size, loss) for a, b in points.values())
    }
    assert {row["number"] for row in written["front"]} == best
    sizes = [row["values"]["bytes"] for row in written["front"]]
    assert sizes == sorted(sizes)
    assert written["trials"] == {"complete": 12}


def test_a_killed_study_goes_on_with_the_very_trials_it_had_asked_for(tmp_path):
    seen, again = [], []
    with pytest.raises(KeyboardInterrupt):
        run_study(options(), [], tmp_path, launcher(tmp_path, stop_at=3, seen=seen))
    open_trial = stored(tmp_path).trials[3]
    run_study(options(), [], tmp_path, launcher(tmp_path, seen=again))
    assert [number for number, _ in seen] == [0, 1, 2]
    assert [number for number, _ in again] == [3, 4, 5]
    assert again[0][1] == tuple(f"{key}={value:.5g}" for key, value in open_trial.params.items())
    assert all(trial.state.name == "COMPLETE" for trial in stored(tmp_path).trials)


def test_failed_and_hopeless_trials_stay_out_and_killed_ones_come_again(tmp_path):
    states = {0: "failed", 1: "pruned", 2: "killed"}
    run_study(options(), [], tmp_path, launcher(tmp_path, states=states))
    found = [trial.state.name for trial in stored(tmp_path).trials]
    assert found == ["FAIL", "PRUNED", "RUNNING", "COMPLETE", "COMPLETE", "COMPLETE"]
    again = []
    run_study(options(), [], tmp_path, launcher(tmp_path, seen=again))
    assert [number for number, _ in again] == [2]
    written = json.loads((tmp_path / "pareto.json").read_text())
    assert written["trials"] == {"fail": 1, "pruned": 1, "complete": 4}
    assert {0, 1}.isdisjoint(row["number"] for row in written["front"])


def test_more_trials_later_are_other_ones(tmp_path):
    run_study(options(n_trials=3), [], tmp_path, launcher(tmp_path))
    run_study(options(n_trials=6), [], tmp_path, launcher(tmp_path))
    drawn = [tuple(trial.params.values()) for trial in stored(tmp_path).trials]
    assert len(set(drawn)) == 6


def test_trials_are_asked_for_in_batches(tmp_path):
    batches = []

    def launch(jobs, first):
        batches.append((first, len(jobs)))
        return launcher(tmp_path)(jobs, first)

    run_study(options(n_trials=5, n_jobs=2), [], tmp_path, launch)
    assert batches == [(0, 2), (2, 2), (4, 1)]


def test_two_studies_in_one_folder_are_refused(tmp_path):
    with (
        FileLock(tmp_path / "study.lock"),
        pytest.raises(RuntimeError, match="another process runs the study"),
    ):
        run_study(options(), [], tmp_path, launcher(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_jobs": -1}, "n_jobs=-1"),
        ({"objectives": (("bytes", "down"),)}, "direction 'down'"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_an_objective_that_is_not_measured_is_named(tmp_path):
    goals = (("bytes", "minimize"), ("quality.charm", "minimize"))
    with pytest.raises(KeyError, match=r"'charm'.*results\.json.*'loss'"):
        run_study(options(objectives=goals), [], tmp_path, launcher(tmp_path))
