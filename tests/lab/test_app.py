"""The command line: what it prints for mistakes, and that interrupted runs go on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

APP = [sys.executable, "-m", "lightning_compress.lab.app"]
SMALL = [
    "model.width_multiplier=0.25",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
    "compression.prune.end=1.0",
]


def test_a_run_leaves_all_files_and_a_second_one_another_folder(cli, tmp_path):
    code, out, _ = cli()
    assert code == 0
    assert "report: outputs/digits-vae/" in out
    cli()
    folders = list((tmp_path / "outputs" / "digits-vae").iterdir())
    assert len(folders) == 2
    for name in (
        "results.json",
        "report.html",
        "samples.png",
        "curves.csv",
        "config.yaml",
        "compressed/model.lcz",
        "compressed/last.ckpt",
        "dense/final.ckpt",
    ):
        assert (folders[0] / name).stat().st_size > 0
    results = json.loads((folders[0] / "results.json").read_text())
    assert (results["model"], results["data"]) == ("vae", "digits")
    assert not list(folders[0].rglob("*.tmp"))


@pytest.mark.slow  # two jobs of a sweep and their report: sweeps/test_sweep_jobs.py has them too
def test_a_sweep_makes_one_folder_a_job_and_one_report_of_all(cli, tmp_path):
    code, _, err = cli("-m", "compression.prune.final_sparsity=0.5,0.8", "threads=1")
    assert code == 0, err
    jobs = sorted((tmp_path / "multirun").glob("*/*/results.json"))
    asked = [
        json.loads(path.read_text())["compression"]["prune"]["final_sparsity"] for path in jobs
    ]
    assert asked == [0.5, 0.8]
    code, out, _ = cli("report", "multirun", "--out", "page.html", small=False)
    assert code == 0
    assert "report: page.html" in out
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.max_epoch=3"], "Closest: trainer.max_epochs"),
        (["compression.prune.final_sparsty=0.5"], "compression.prune.final_sparsity"),
        (["modle=vae"], "Closest: model"),
        (["model=vea"], "vae"),
        (["experiment=fashon_dcgan"], "fashion_dcgan_small"),
        (["sweep=grit"], "grid"),
        (["threads=0"], "threads=0 must be an integer from 1 on"),
        (["threads=zero"], "threads='zero' must be an integer from 1 on"),
        (["trainer.max_epochs=few"], "trainer.max_epochs='few': expected int or None"),
        (["model.latent_dim=large"], "model.latent_dim='large': expected int"),
        (["ckpt_path=nowhere"], "nothing to resume from"),
        (["compression=[prone]"], "prune"),
        (["compression.prune.final_sparsity=1.0"], "final_sparsity=1.0: a sparsity lies in [0, 1)"),
        (["compression.prune.final_sparsity=-0.5"], "final_sparsity=-0.5"),
        (["compression.prune.begin=0.9", "compression.prune.end=0.5"], "begin=0.9 must be smaller"),
        (["compression.prune.include=[decodr.*]"], "'decodr.*' matches no parameter; closest"),
        (["compression.quantize.weight_bits=9"], "weight_bits=9"),
        (["model.lr=1e30", "trainer.limit_train_batches=9"], "training has diverged"),
        (["data=image_folder", "data.folder=nowhere"], "nowhere"),
        (["data=mnist", "data.folder=nowhere"], "mnist was not found"),
        (["hydra.run.dir=taken/run"], "taken"),
        (["export.codec=zip"], "export.codec='zip': valid are"),
        (["export.float_dtype=fp8"], "export.float_dtype='fp8': valid are"),
        (["export.rdoq=much"], "export.rdoq='much' must be a finite number"),
        (["evaluate.latency_repeats=0"], "evaluate.latency_repeats=0: expected an integer from 1"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_with_one_clear_message(cli, tmp_path, words, expected):
    (tmp_path / "taken").write_text("a file where the output folder should be")
    code, out, err = cli(*words, small=words[0] != "report")
    assert code not in (0, None)
    assert expected in out + err
    assert "Traceback" not in out + err
    if words[0].startswith(("export.", "evaluate.")):  # before anything trains, not after
        assert "epoch 1" not in out + err


def test_configs_serve_another_projects_hydra_app(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(
        "defaults:\n  - compression: [prune]\n  - _self_\n"
        "hydra:\n  searchpath: [pkg://lightning_compress.conf]\n"
    )
    (tmp_path / "mine.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='mine')\n"
        "def main(cfg):\n"
        "    print(hydra.utils.instantiate(cfg.compression.prune).schedule)\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "mine.py", "compression.prune.final_sparsity=0.77"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Polynomial(final_sparsity=0.77" in done.stdout


@pytest.mark.parametrize("model", ["vae", pytest.param("dcgan", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_checkpoint_and_the_resumed_run_is_the_same(
    tmp_path, model, cache_dir, cli, monkeypatch
):
    """The interrupted run is a process of its own; the others run in this one, to the same bits."""
    words = [
        *SMALL,
        f"model={model}",
        f"evaluate.cache_dir={cache_dir}",
        "trainer.max_epochs=6",
        "trainer.limit_train_batches=4",
    ]
    code, _, errors = cli(*words, "hydra.run.dir=whole", small=False)
    assert code == 0, errors

    (tmp_path / "slow.py").write_text(
        "import time\nfrom lightning.pytorch import Callback\n"
        "class Slow(Callback):\n"
        "    def on_train_batch_end(self, *a):\n        time.sleep(0.25)\n"
    )
    cut = subprocess.Popen(
        [*APP, *words, "hydra.run.dir=cut", "+callbacks.slow._target_=slow.Slow"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Background jobs of a plain shell ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "compressed" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert cut.poll() is None, cut.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    cut.send_signal(signal.SIGINT)
    _, errors = cut.communicate()
    assert cut.returncode == 130, errors
    command = shlex.split(errors.splitlines()[-1])
    assert command[-1] == "ckpt_path=cut"
    assert {*words, "hydra.run.dir=cut"} <= {*command}

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LIGHTNING_COMPRESS_ALLOW", "slow.Slow")  # a class of the user's own
    code, _, errors = cli("hydra.run.dir=other", "ckpt_path=cut", "seed=7", small=False)
    assert code not in (0, None)
    assert "seed was 0 and is 7" in errors
    # All else as it was told before.
    code, _, errors = cli("hydra.run.dir=resumed", "ckpt_path=cut", small=False)
    assert code == 0, errors
    one, other = (
        torch.load(tmp_path / name / "compressed" / "final.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "resumed")
    ]
    assert results[0]["compressed"]["quality"] == results[1]["compressed"]["quality"]
    assert results[0]["ratio"] == results[1]["ratio"]
    lines = [(tmp_path / name / "curves.csv").read_text() for name in ("whole", "resumed")]
    assert lines[0] == lines[1]


@pytest.fixture
def cache_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "features"


def test_the_wheel_of_the_sdist_carries_the_configs(tmp_path):
    root = Path(__file__).parents[2]
    subprocess.run(  # the wheel is made of the sdist
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, root],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            tmp_path / "site",
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    away = tmp_path / "elsewhere"
    away.mkdir()
    done = subprocess.run(
        [*APP, "--cfg", "job", "model=dcgan"],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lightning_compress.lab.models.DCGAN" in done.stdout
    assert (tmp_path / "site" / "hydra_plugins" / "lightning_compress_sweeper").is_dir()
    shipped = {path.relative_to(root / "conf") for path in (root / "conf").rglob("*.yaml")}
    inside = tmp_path / "site" / "lightning_compress" / "conf"
    assert {path.relative_to(inside) for path in inside.rglob("*.yaml")} == shipped
