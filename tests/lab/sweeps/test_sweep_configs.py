"""The shipped sweep configs, from the command line to the last job, with quick jobs."""

import json
import sys

import pytest

from lightning_compress.lab.app import main
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.sweeps import jobs

JOB = """
import json, sys
words = dict(word.split("=", 1) for word in sys.argv[2:])
sparsity = float(words["compression.prune.final_sparsity"])
bits = int(words["compression.quantize.weight_bits"])
results = {
    "compressed": {"bytes": {"lcz": 1000 * bits * (1 - sparsity)}},
    "verdict": {"difference": sparsity / bits},
}
json.dump(results, open(sys.argv[1] + "/results.json", "w"))
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    def command(cfg, hydra, job):
        asked.append(cfg)
        return [sys.executable, "-c", JOB, job.folder, *job.overrides]

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_command", command)

    def call(*words):
        code = 0
        try:
            main(["-m", *words])
        except SystemExit as stop:
            code = stop.code
        out = capfd.readouterr()
        return code, out.out + out.err, asked

    return call


def test_grid_is_twelve_points(cli):
    code, out, asked = cli("sweep=grid")
    assert code == 0, out
    assert "12 jobs: 12 done" in out
    points = {
        (c.compression.prune.final_sparsity, c.compression.quantize.weight_bits) for c in asked
    }
    assert points == {(s, b) for s in (0.5, 0.8, 0.9, 0.95) for b in (4, 6, 8)}


def test_pareto_searches_writes_its_front_and_goes_on(cli, tmp_path):
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    code, out, asked = cli("sweep=pareto", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2")
    assert code == 0, out
    assert len(asked) == 4
    assert all(0.5 <= cfg.compression.prune.final_sparsity <= 0.98 for cfg in asked)
    assert all(cfg.hopeless.max_loss == "auto" for cfg in asked)
    (path,) = tmp_path.glob("multirun/pareto-*/pareto.json")
    front = json.loads(path.read_text())
    assert front["trials"] == {"complete": 4}
    assert {row["folder"] for row in front["front"]} <= {"0", "1", "2", "3"}
    sizes = [row["values"]["compressed.bytes.lcz"] for row in front["front"]]
    assert sizes == sorted(sizes)
    assert (path.parent / "study.db").is_file()

    assert cli("sweep=pareto", "hydra.sweeper.n_trials=4")[0] == 0
    assert len(asked) == 4  # nothing is left to do
    assert cli("sweep=pareto", "hydra.sweeper.n_trials=5")[0] == 0
    assert len(asked) == 5


def test_a_typo_in_what_is_searched_is_named_before_anything_runs(cli):
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    code, out, asked = cli("sweep=pareto", "compression.prune.final_sparsty=interval(0,1)")
    assert code == 1
    assert "final_sparsty" in out
    assert asked == []


def test_every_sweep_config_has_its_test():
    assert {path.stem for path in (config_dir() / "sweep").glob("*.yaml")} == {"grid", "pareto"}
    assert [path.stem for path in (config_dir() / "hydra/sweeper").glob("*.yaml")] == ["pareto"]
