"""kill -9 at random moments: 60 times, of training, saving, reports, whole runs and sweeps."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import fault_jobs
import pytest
import torch

from lightning_compress import read_tensors, save_compressed
from lightning_compress.lab.report.page import write_report

pytestmark = pytest.mark.faults


def rests(folder):
    return [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]


def strike(process, seconds):
    """Whether the process was still at work when it was killed."""
    process.join(seconds)
    alive = process.exitcode is None
    process.kill()
    process.join()
    return alive


@pytest.mark.parametrize("kind", ["autoencoder", "gan"])
def test_training(tmp_path, start, finish, kind):
    whole, folder = tmp_path / "whole", tmp_path / "0"
    whole.mkdir()
    finish(os.getpid)  # the server's own start is no part of a run
    begin = time.monotonic()
    finish(fault_jobs.train, whole, kind)
    usual, expected = time.monotonic() - begin, read_tensors(whole / "final.lcz")
    moments, kills, runs = random.Random(1), 0, 0
    folder.mkdir()
    while kills < 12:
        before = epochs(folder)
        kills += strike(start(fault_jobs.train, folder, kind), usual * moments.uniform(0.1, 0.8))
        assert epochs(folder) >= before  # whole files only, never an older one
        assert len(rests(folder)) <= 2  # one a file, and two files are written
        if (folder / "final.lcz").exists():
            same(expected, folder / "final.lcz")
            folder = tmp_path / str(runs := runs + 1)
            folder.mkdir()
    finish(fault_jobs.train, folder, kind)
    same(expected, folder / "final.lcz")
    assert epochs(folder) == fault_jobs.EPOCHS
    assert not rests(folder)


def epochs(folder):
    last = folder / "last.ckpt"
    return torch.load(last, weights_only=False)["epoch"] + 1 if last.exists() else 0


def same(expected, path):
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_saving_in_turn(tmp_path, start, wait):
    path, begun = tmp_path / "model.lcz", tmp_path / "begun"
    pair = [fault_jobs.module(fill) for fill in (0, 1)]
    valid = [{name: value.tolist() for name, value in one.state_dict().items()} for one in pair]
    save_compressed(pair[0], path, "raw")
    moments, left, kills = random.Random(2), 0, 0
    while kills < 14 or not left:  # until some came in the middle of a write
        assert kills < 200, "no kill came in the middle of a write"
        begun.unlink(missing_ok=True)
        process = start(fault_jobs.save_in_turn, tmp_path)
        wait(begun.exists, process)
        assert strike(process, moments.uniform(0, 0.3))
        kills += 1
        found = {name: value.tolist() for name, value in read_tensors(path).items()}
        assert found in valid
        left += len(rests(tmp_path))
        assert len(rests(tmp_path)) <= 1  # each write removes what a killed one left
    save_compressed(pair[1], path, "raw")
    assert not rests(tmp_path)


def test_reports(tmp_path, start, whole_run):
    home = tmp_path / "run"
    shutil.copytree(whole_run, home)
    write_report([home])
    expected = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    moments = random.Random(3)
    for _ in range(8):
        assert strike(start(fault_jobs.report, home), moments.uniform(0.2, 3))
        for path, content in expected.items():
            assert path.read_bytes() == content, path
        assert set(home.rglob("*")) - set(rests(home)) == set(expected) | {home / "dense"} | {
            path.parent for path in expected if path.parent != home
        }
        assert len(rests(home)) <= len(list(home.rglob("*.svg"))) + 1
    write_report([home])
    assert not rests(home)


def test_whole_runs_that_go_on_from_folder_to_folder(tmp_path, start, finish, cache, whole_run):
    """Each resumed run has a folder of its own, as Hydra gives it one, and is killed too."""
    begin = time.monotonic()
    finish(fault_jobs.run, tmp_path / "timed", cache)
    usual = time.monotonic() - begin
    moments, kills, words = random.Random(4), 0, []
    dense = None
    while kills < 8:
        folder = tmp_path / str(kills)
        process = start(fault_jobs.run, folder, cache, *words)
        killed = strike(process, usual * moments.uniform(0.2, 0.9))
        if not killed:
            assert process.exitcode == 0
            check(whole_run, folder)
            shutil.rmtree(folder)
            words, dense = [], None
            continue
        kills += 1
        if dense is not None:  # what was finished is never trained again
            assert (folder / "dense" / "final.ckpt").read_bytes() == dense
        if (folder / "dense" / "final.ckpt").exists():
            dense = (folder / "dense" / "final.ckpt").read_bytes()
        words = [f"ckpt_path={folder}"] if (folder / "config.yaml").exists() else words
    finish(fault_jobs.run, tmp_path / "last", cache, *words)
    check(whole_run, tmp_path / "last")


def test_sweeps(tmp_path, start, cache):
    """The launcher is killed, or the job that it runs; the same command goes on each time."""
    words = ["-m", *fault_jobs.SMALL, f"evaluate.cache_dir={cache}", "seed=0,1"]
    homes = tmp_path / "whole", tmp_path / "killed"
    for home in homes:
        home.mkdir()
    begin = time.monotonic()
    sweep(start, homes[0], words)
    usual, moments, done, killed = time.monotonic() - begin, random.Random(6), {}, []
    while len(killed) < 6:
        process = start(fault_jobs.app, homes[1], words)
        process.join(usual * moments.uniform(0.1, 0.7))
        if process.exitcode == 0:  # all done before six kills: once more from nothing
            compare_sweeps(*homes)
            shutil.rmtree(homes[1])
            homes[1].mkdir()
            done = {}
            continue
        victim = "job" if len(killed) % 2 else "launcher"
        for pid in children(process.pid) if victim == "job" else [process.pid]:
            os.kill(pid, signal.SIGKILL)
            killed.append(victim)
        process.join(300)
        assert process.exitcode is not None
        kept = {path: path.read_bytes() for path in homes[1].glob("multirun/*/*/results.json")}
        assert done.keys() <= kept.keys()
        # What is recorded as done is not done again; without the record it is measured once more.
        assert all(kept[path] == content for path, content in done.items() if content)
        for path, content in kept.items():
            assert json.loads(content)["ratio"] > 1, path
            recorded = json.loads((path.parent / "job.json").read_text())["state"] == "done"
            done[path] = content if recorded else None
    sweep(start, homes[1], words)
    compare_sweeps(*homes)


def compare_sweeps(*homes):
    one, two = (sorted(home.glob("multirun/*/[0-9]")) for home in homes)
    assert len(one) == len(two) == 2
    for whole, other in zip(one, two, strict=True):
        check(whole, other, sides=("compressed",))
        assert json.loads((other / "job.json").read_text())["state"] == "done"
    assert not rests(homes[1])


def sweep(start, home, words):
    process = start(fault_jobs.app, home, words)
    process.join(600)
    assert process.exitcode == 0, (home / f"{process.pid}.out").read_text()


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def check(whole, other, sides=("dense", "compressed")):
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, other))
    for key in ("ratio", "layers", "verdict", "steps"):
        assert one[key] == two[key], key
    for side in ("dense", "compressed"):
        assert one[side]["quality"] == two[side]["quality"]
    for side in sides:
        states = [state(folder / side / "final.ckpt") for folder in (whole, other)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert (whole / "curves.csv").read_text() == (other / "curves.csv").read_text()
    assert (other / "report.html").read_text().rstrip().endswith("</html>")


def state(path):
    return torch.load(path, weights_only=True)["state_dict"]
