"""After a fit in processes of its own the main process knows what it ended with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_compress.callbacks import base
from lightning_compress.callbacks.spawned import bring_results_back

TESTS = Path(__file__).parents[1] / "helpers"


def run(folder, strategy, processes=1):
    done = subprocess.run(
        [sys.executable, TESTS / "spawn_job.py", folder, strategy, str(processes)],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parents[1]}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{strategy}.pt")


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("ddp_spawn", 1),
        ("ddp_notebook", 1),
        pytest.param("ddp_fork", 1, marks=pytest.mark.slow),
        pytest.param("ddp_fork", 2, marks=pytest.mark.slow),
    ],
)
def test_the_main_process_knows_masks_grids_and_sparsity(tmp_path, strategy, processes):
    found = run(tmp_path, strategy, processes)
    reported, counted = found["sparsity"]
    assert reported == pytest.approx(0.75, abs=0.03)
    assert counted == pytest.approx(0.75, abs=0.06)
    inside, outside = found["file"]
    assert inside == outside
    assert found["state"] == found["saved"]
    assert found["flags"] == (True, 6, 3)
    if processes == 1:
        assert found["after"] == pytest.approx(found["inside"], rel=1e-5)


def test_the_launcher_is_extended_once():
    bring_results_back()
    first = _MultiProcessingLauncher.get_extra_results
    bring_results_back()
    assert _MultiProcessingLauncher.get_extra_results is first


def test_a_launcher_that_brings_nothing_back_is_told(monkeypatch):
    class Spawned:
        class strategy:  # noqa: N801
            launcher = _MultiProcessingLauncher.__new__(_MultiProcessingLauncher)

    monkeypatch.setattr(base, "results_come_back", lambda: False)
    with pytest.warns(UserWarning, match=r"restore_compression\(module, checkpoint\)"):
        base._warn_of_spawned(Spawned)
