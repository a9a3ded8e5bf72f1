"""Flower's simulation engine itself, on Ray, and a run that is killed in it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray", reason="the extra federated is not installed")

pytestmark = pytest.mark.slow
WORDS = [
    "federated",
    "model.width=8",
    "data.batch_size=32",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
    "federated.clients=3",
    "federated.rounds=4",
    "federated.local_epochs=1",
    "federated.cpus=2",
]


def begin(folder, *words):
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_compress.lab.app", *WORDS, *words],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def test_a_run_on_ray_that_is_killed_between_rounds_goes_on(tmp_path):
    first = begin(tmp_path, "hydra.run.dir=one")
    end = time.monotonic() + 900
    while "round 2/4" not in (tmp_path / "log").read_text(errors="replace"):
        assert first.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)  # Ray's processes too
    first.wait()
    again = begin(tmp_path, "hydra.run.dir=two", "ckpt_path=one")
    assert again.wait(timeout=900) == 0, (tmp_path / "log").read_text()[-2000:]
    text = (tmp_path / "log").read_text()
    assert "round 2/4" not in text
    assert "round 4/4: 3 clients" in text
    rounds = json.loads((tmp_path / "two" / "results.json").read_text())["federated"]["rounds"]
    assert [row["clients"] for row in rounds] == [3, 3, 3, 3]
    assert all(row["refused"] == {} for row in rounds)
