"""Sweeps from the command line: what is done stays done, what breaks is told, the rest runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_compress.lab.app import main

SMALL = [
    "model.width_multiplier=0.25",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
    "compression=[prune]",
    "threads=1",
]
ONCE = """
import os, signal
from lightning.pytorch import Callback
class Once(Callback):
    '''Does harm to the process in the compressed run's second epoch, the first time.'''
    def __init__(self, marker, harm):
        self.marker, self.harm = marker, harm
    def on_train_epoch_start(self, trainer, pl_module):
        here = trainer.current_epoch == 1 and "compressed" in str(trainer.default_root_dir)
        if here and self.harm != "none" and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("harm was done")
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd, tmp_path_factory):
    """Runs a sweep in an empty folder; returns exit code and all output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once.py").write_text(ONCE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    cache = tmp_path_factory.getbasetemp() / "features"

    def call(*words):
        code = 0
        try:
            main(["-m", *SMALL, f"evaluate.cache_dir={cache}", *words])
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call


def jobs(tmp_path):
    """State and seconds of every job, by its number."""
    found = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/*/*/job.json")]
    return {job["number"]: job for job in found}


HARM = [
    "+callbacks.once._target_=once.Once",
    "+callbacks.once.marker='marker-${seed}'",
    "+callbacks.once.harm=none,kill",
]


def test_killed_jobs_are_told_and_the_same_command_goes_on(cli, tmp_path):
    code, out = cli(*HARM)
    assert code == 1
    found = jobs(tmp_path)
    assert [found[number]["state"] for number in (0, 1)] == ["done", "killed"], out
    assert "+callbacks.once.harm=kill: killed by SIGKILL" in out
    assert "2 jobs: 1 done, 1 killed" in out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/*/*/results.json")}

    code, out = cli(*HARM)
    assert code == 0, out
    assert "2 jobs: 2 done" in out
    assert out.count("done before, not run again") == 1
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    log = next(tmp_path.glob("multirun/*/1/job.log")).read_text()
    again = log[log.rindex("\n$ ") :]
    assert "ckpt_path=" in again
    assert "compressed: epoch 2/2" in again
    assert "epoch 1/2" not in again  # neither of the dense model nor of the compressed one
    results = [
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("multirun/*/*/results.json"))
    ]
    quality = [one["compressed"]["quality"] for one in results]
    assert quality[0] == quality[1]  # the killed one went on bit for bit
    with pytest.raises(SystemExit, match="0"):
        main(["report", "multirun", "--out", "page.html"])
    assert (tmp_path / "page.html").stat().st_size > 10_000  # of both
    assert len(list(tmp_path.glob(".cache/dense/*/dense/final.ckpt"))) == 2  # callbacks count


@pytest.mark.slow
def test_a_job_that_raises_is_told_with_its_reason(cli, tmp_path):
    code, out = cli("seed=0,1", "compression.prune.final_sparsity=1.5")
    assert code == 1
    assert "2 jobs: 2 failed" in out
    assert "final_sparsity=1.5: a sparsity lies in [0, 1)" in out
    assert "#1 seed=1: " in out


@pytest.mark.slow
def test_changed_settings_in_the_same_folder_run_again(cli, tmp_path):
    words = ("seed=0", "hydra.sweep.dir=s", "hydra.sweep.subdir=a")
    assert cli(*words)[0] == 0
    first = json.loads((tmp_path / "s/a/results.json").read_text())
    code, out = cli(*words, "compression.prune.final_sparsity=0.5")
    assert code == 0
    assert "not run again" not in out
    second = json.loads((tmp_path / "s/a/results.json").read_text())
    assert second["config_hash"] != first["config_hash"]
    assert second["dense"]["quality"] == first["dense"]["quality"]
    assert len(list(tmp_path.glob(".cache/dense/*.lock"))) == 1


@pytest.mark.slow
def test_a_killed_sweep_takes_its_jobs_along_and_goes_on(tmp_path):
    words = [*SMALL, "trainer.max_epochs=400", "seed=0,1"]
    command = [sys.executable, "-m", "lightning_compress.lab.app", "-m", *words]
    sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".cache/dense/*/dense/last.ckpt")):
        assert time.monotonic() < deadline
        assert sweep.poll() is None
        time.sleep(0.2)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    last, written = next(tmp_path.glob(".cache/dense/*/dense/last.ckpt")), 0
    # Until nobody trains any more. Python may drop an interrupt: the next is half a minute later.
    deadline = time.monotonic() + 150
    while last.stat().st_mtime_ns != written:
        assert time.monotonic() < deadline
        written = last.stat().st_mtime_ns
        time.sleep(5)
    short = [word for word in command if word != "seed=0,1"]
    done = subprocess.run([*short, "seed=0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = Path(next(tmp_path.glob("multirun/*/0/job.log"))).read_text()
    assert "waiting for the dense model" not in log


LAUNCHERS = {
    "basic": ("hydra", []),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", []),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_runs_four_jobs_and_outlives_a_killed_one(tmp_path, launcher):
    module, extra = LAUNCHERS[launcher]
    pytest.importorskip(module, reason=f"no extra for {launcher} is installed")
    (tmp_path / "once.py").write_text(ONCE)
    words = [*SMALL, *HARM, "seed=0,1", *extra]
    command = [sys.executable, "-m", "lightning_compress.lab.app", "-m", *words]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, f"hydra/launcher={launcher}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "4 jobs: 2 done, 2 killed" in done.stdout, done.stderr
    assert done.returncode == 1
    states = {number: job["state"] for number, job in jobs(tmp_path).items()}
    assert states == {0: "done", 1: "done", 2: "killed", 3: "killed"}


@pytest.mark.slow
def test_a_job_of_two_devices_is_two_processes_of_that_job_alone(cli, tmp_path):
    code, out = cli("seed=0,1", "trainer.devices=2", "+trainer.strategy=ddp")
    assert code == 0, out
    assert sorted(jobs(tmp_path)) == [0, 1]
    for path in tmp_path.glob("multirun/*/*/job.log"):
        assert path.read_text().count("GLOBAL_RANK: 1, MEMBER: 2/2") == 2  # dense, compressed
