"""One job of a sweep, with a process that is over at once in its place."""

import json
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from lightning_compress.lab.sweeps import jobs
from lightning_compress.lab.sweeps.jobs import read_outcome


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a job whose process is a line of Python; returns what became of it."""

    def call(code, **settings):
        monkeypatch.setattr(jobs, "_command", lambda *_: [sys.executable, "-c", code])
        hydra = SimpleNamespace(
            runtime=SimpleNamespace(output_dir=str(tmp_path), cwd=str(tmp_path)),
            job=SimpleNamespace(num=4),
            overrides=SimpleNamespace(task=["seed=0"]),
        )
        return jobs.run_sweep_job(OmegaConf.create({"seed": 0, **settings}), hydra)

    monkeypatch.chdir(tmp_path)
    return call


DONE = "open('results.json', 'w').write('{}'); open('runs', 'a').write('.')"


@pytest.mark.parametrize(
    ("code", "state", "message"),
    [
        (DONE, "done", ""),
        ("import os; os.kill(os.getpid(), 9)", "killed", "killed by SIGKILL"),
        ("import sys; print('error: no\\nway'); sys.exit(1)", "failed", "no way"),
        ("raise ValueError('odd')", "failed", "ValueError: odd"),
        ("import sys; print('pruned: hopeless'); sys.exit(3)", "pruned", "hopeless"),
        ("import sys; sys.exit(7)", "failed", "exit code 7"),
        ("pass", "failed", "ended without results.json"),
    ],
)
def test_each_end_has_its_state_and_reason(run, tmp_path, code, state, message):
    outcome = run(code)
    assert (outcome.state, outcome.message, outcome.number) == (state, message, 4)
    assert read_outcome(tmp_path) == outcome


def test_done_and_hopeless_jobs_are_not_run_again_and_others_are(run, tmp_path):
    run(DONE)
    assert run(DONE).again
    assert (tmp_path / "runs").read_text() == "."
    (tmp_path / "results.json").unlink()  # done, it says, but there is nothing
    assert not run(DONE).again
    assert not run(DONE, lr=2).again  # other settings
    assert (tmp_path / "runs").read_text() == "..."
    run("import sys; sys.exit(3)")
    assert run("import sys; sys.exit(3)").again
    run("import sys; sys.exit(1)", lr=3)
    assert not run("import sys; sys.exit(1)", lr=3).again


def test_checkpoints_of_other_settings_are_not_gone_on_from(run, tmp_path):
    checkpoint = tmp_path / "dense" / "last.ckpt"
    checkpoint.parent.mkdir()
    run("import sys; sys.exit(1)")
    checkpoint.touch()
    run("import sys; sys.exit(1)")
    assert checkpoint.exists()
    run("import sys; sys.exit(1)", lr=2)
    assert not checkpoint.exists()


def test_an_interrupted_job_ends_the_sweep_and_says_so(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("import sys; sys.exit(130)")
    assert json.loads((tmp_path / "job.json").read_text())["state"] == "interrupted"


def test_damaged_records_count_as_none(tmp_path):
    assert read_outcome(tmp_path) is None
    (tmp_path / "job.json").write_text("{")
    assert read_outcome(tmp_path) is None
    (tmp_path / "job.json").write_text('{"state": "done"}')
    assert read_outcome(tmp_path) is None
