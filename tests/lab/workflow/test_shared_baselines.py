"""Shared dense models: trained once, whoever asks, and no killed holder stands in the way."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra import compose, initialize_config_dir

from lightning_compress.callbacks import HopelessRunError
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.workflow.experiment import run_experiment
from lightning_compress.lab.workflow.resume import shared_checkpoint
from lightning_compress.lab.workflow.run_identity import config_hash, dense_recipe, recipe_hash

CONTEXT = multiprocessing.get_context("spawn")


def _train(store, log, seconds, *, die=False):
    """Ask for the one model; a line in the log for each training that begins."""

    def train(folder, ckpt_path):
        with log.open("a") as file:
            file.write(f"from {'nothing' if ckpt_path is None else ckpt_path.name}\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.ckpt").touch()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        (folder / "final.ckpt").write_text("weights")

    path, took = shared_checkpoint(store, {"model": "vae"}, train)
    assert path.read_text() == "weights"
    assert took >= seconds


def test_jobs_that_race_train_once(tmp_path):
    log = tmp_path / "log"
    with ThreadPoolExecutor(3) as pool:  # the lock is one of open files, not of processes
        jobs = [pool.submit(_train, tmp_path / "s", log, 0.5) for _ in range(3)]
    assert [job.exception() for job in jobs] == [None] * 3
    assert log.read_text() == "from nothing\n"


def test_a_killed_holder_leaves_its_last_epoch_and_no_lock(tmp_path):
    log = tmp_path / "log"
    holder = CONTEXT.Process(target=_train, args=(tmp_path / "s", log, 0.0), kwargs={"die": True})
    holder.start()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    _train(tmp_path / "s", log, 0.0)
    assert log.read_text() == "from nothing\nfrom last.ckpt\n"


def _composed(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def _dense_hash(*overrides, seed=0, content="c"):
    return recipe_hash(
        dense_recipe(_composed(*overrides), seed=seed, dims={"channels": 1}, content=content)
    )


@pytest.mark.parametrize(
    "change",
    [
        "model.latent_dim=5",
        "data.batch_size=7",
        "trainer.max_epochs=3",
        "threads=1",
        "evaluate.monitor_every=2",
        "+callbacks.a._target_=lightning.pytorch.Callback",
        "data=digit_rows",
        "model=dcgan",
    ],
)
def test_what_changes_the_dense_model_changes_its_hash(change):
    assert _dense_hash(change) != _dense_hash()


@pytest.mark.parametrize(
    "change",
    ["compression.prune.final_sparsity=0.1", "export.onnx=false", "ckpt_path=a", "logger=[csv]"],
)
def test_what_does_not_touch_the_dense_model_leaves_its_hash(change):
    assert _dense_hash(change) == _dense_hash()


def test_seed_and_data_belong_to_the_dense_model():
    assert len({_dense_hash(), _dense_hash(seed=1), _dense_hash(content="d")}) == 3


def test_a_results_hash_is_of_all_settings_but_those_of_the_way_there():
    plain = config_hash(_composed())
    assert config_hash(_composed("ckpt_path=a", "dense_cache=b", "evaluate.cache_dir=c")) == plain
    for change in ("seed=1", "export.onnx=false", "compression.prune.final_sparsity=0.1"):
        assert config_hash(_composed(change)) != plain


SMALL = [
    "model.width_multiplier=0.25",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
    "compression=[prune]",
]


def test_runs_share_a_dense_model_bit_for_bit_and_a_hopeless_one_is_ended(
    tmp_path, tmp_path_factory
):
    cache = tmp_path_factory.getbasetemp() / "features"
    words = [*SMALL, f"evaluate.cache_dir={cache}"]
    shared = [*words, f"dense_cache={tmp_path / 'store'}", "baseline_seeds=[1]"]
    alone = run_experiment(_composed(*words, "baseline_seeds=[1]"), tmp_path / "alone")
    first = run_experiment(_composed(*shared), tmp_path / "first")
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/*/dense/final.ckpt")}
    assert len(stored) == 2  # seeds 0 and 1
    second = run_experiment(_composed(*shared), tmp_path / "second")
    assert all(path.stat().st_mtime_ns == at for path, at in stored.items())
    for results in (first, second):
        assert results["dense"]["quality"] == alone["dense"]["quality"]
        assert results["baseline_spread"] == alone["baseline_spread"]
        assert results["compressed"]["quality"] == alone["compressed"]["quality"]
        assert results["dense"]["train_seconds"] > 0
        assert results["config_hash"] == alone["config_hash"]
    curves = [(tmp_path / name / "curves.csv").read_text() for name in ("alone", "second")]
    assert curves[0] == curves[1]

    hopeless = ["hopeless.max_loss=1e-6", "hopeless.patience=1"]
    with pytest.raises(HopelessRunError, match=r"val/elbo is .* worse than the dense model"):
        run_experiment(_composed(*shared, *hopeless), tmp_path / "hopeless")
