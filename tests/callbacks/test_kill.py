"""kill -9 at any moment of a pruned run loses no more than the epoch under way."""

import multiprocessing
import os
import random
import sys
import time

import torch
from kill_job import EPOCHS, train


def started(monkeypatch, job, *arguments):
    # A server that has imported everything once: each run begins at once, and so dies soon. It
    # does not have this process's path, and keeps silent on what it cannot import.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_job"])
    process = context.Process(target=job, args=tuple(map(str, arguments)))
    process.start()
    return process


def epochs_saved(folder):
    last = folder / "last.ckpt"
    return torch.load(last, weights_only=False)["epoch"] + 1 if last.exists() else 0


def stamp(folder):
    last = folder / "last.ckpt"
    return last.stat().st_mtime_ns if last.exists() else 0


def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    started(monkeypatch, os.getpid).join()  # the server's own start is no part of a run
    start = time.monotonic()
    process = started(monkeypatch, train, whole)
    process.join(240)
    assert process.exitcode == 0
    usual = time.monotonic() - start
    moments, kills = random.Random(0), 0
    for turn in range(5):  # of 12 epochs each turn but the first saves one, and perhaps two more
        before, seen = epochs_saved(parts), stamp(parts)
        process = started(monkeypatch, train, parts)
        while turn and process.is_alive() and stamp(parts) == seen:
            time.sleep(0.002)
        process.join(usual / EPOCHS * moments.uniform(0, 1))
        kills += process.exitcode is None
        process.kill()
        process.join()
        assert epochs_saved(parts) >= before + bool(
            turn
        )  # whole files only, and never an older one
    assert kills >= 2
    process = started(monkeypatch, train, parts)
    process.join(240)
    assert process.exitcode == 0
    assert epochs_saved(parts) == EPOCHS
    final = torch.load(parts / "final.pt")
    for name, value in torch.load(whole / "final.pt").items():
        assert torch.equal(value, final[name]), name
