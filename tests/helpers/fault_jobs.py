"""What the tests in faults/ run in processes of their own, to be killed, starved and interrupted.

A server imports this file once, and each process is forked from it: one begins at once, and so
dies at the moment that the test means.
"""

import contextlib
import itertools
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer imports it: seconds in which nothing can go wrong
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ArtifactCallback,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    save_compressed,
    write_tensors,
)
from lightning_compress.callbacks import EpochCheckpoint, StopOnNonFinite
from lightning_compress.conversion.export import export_onnx
from lightning_compress.files import write_atomically
from lightning_compress.lab.app import main
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.evaluation.cost import file_sizes
from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.workflow import experiment

EPOCHS = 6
SMALL = [
    "model.width_multiplier=0.25",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=3",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "evaluate.monitor_every=1",
    "export.onnx=false",
    "compression.prune.end=1.0",
    "threads=1",
]


def quiet():
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def fit(folder, kind, *more, data=None, **arguments):
    """Pruned and quantized; goes on from the last checkpoint, if there is one."""
    quiet()
    torch.manual_seed(5)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder()
    last = Path(folder) / "last.ckpt"
    callbacks = [
        GradualPruning(final_sparsity=0.8, end=0.9, criterion="taylor"),
        QuantizationAwareTraining(weight_bits=4, activation_bits=None, begin=0.2),
        StopOnNonFinite(),
        RandomState(),
        EpochCheckpoint(last, Path(folder) / "broken.ckpt"),
    ]
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, **arguments}
    trainer = quiet_trainer(folder, *more, *callbacks, **options)
    resumed = last if last.exists() else None
    trainer.fit(model, batches(count=12) if data is None else data, ckpt_path=resumed)
    return model


def train(folder, kind):
    model = fit(folder, kind)
    write_tensors(model.state_dict(), Path(folder) / "final.lcz")


def module(fill):
    """A quarter of a megabyte of weights that differ between two fills."""
    layers = nn.Sequential(nn.Linear(256, 240), nn.ReLU(), nn.Linear(240, 16))
    generator = torch.Generator().manual_seed(fill)
    for weight in layers.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 16
    return layers.eval()


def save_in_turn(folder):
    quiet()
    pair = module(0), module(1)
    while True:
        for one in pair:
            save_compressed(one, Path(folder) / "model.lcz", "raw")
            (Path(folder) / "begun").touch()


def report(folder):
    quiet()
    while True:
        write_report([folder])


def run(folder, cache, *overrides):
    """An experiment and its report, as the command line runs them."""
    quiet()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            words = [*SMALL, f"evaluate.cache_dir={cache}", *overrides]
            cfg = compose("train", overrides=words)
        experiment.run_experiment(cfg, Path(folder), names={"model": "vae", "data": "digits"})
        write_report([folder])


def app(here, words):
    """The command line in a folder; what it prints goes to files there."""
    os.chdir(here)
    torch.set_num_threads(1)
    name = f"{os.getpid()}"
    sys.stdout = open(f"{name}.out", "w", buffering=1)  # noqa: PTH123, SIM115
    sys.stderr = open(f"{name}.err", "w", buffering=1)  # noqa: PTH123, SIM115
    main(words)


def app_with_odd_clock(here, words):
    """Each look at the clock of the day finds it a day ahead or a day behind, in turn."""
    real, turns = time.time, itertools.cycle((86_400, -86_400))
    time.time = lambda: real() + next(turns)
    app(here, words)


class Slow(Callback):
    """Time to strike between two batches; `begun` says that there are some."""

    def __init__(self, seconds=0.2):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, *_):
        (Path(trainer.default_root_dir) / "begun").touch()
        time.sleep(self.seconds)


class NanBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            batch[0][0] = float("nan")


class NanWeight(Callback):
    def __init__(self, name="generator.2.weight"):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2:
            with torch.no_grad():
                pl_module.get_parameter(self.name).view(-1)[-1] = float("nan")


def results(folder, fill):
    """What run_experiment does when all is measured; the measuring itself is tested elsewhere."""
    path = Path(folder) / "results.json"
    text = f'{{"fill": {fill}, "pad": "{"x" * 4000}"}}'
    write_atomically(path, text, what="the results", parents=True)


def fit_with_artifact(folder, fill):
    model = TinyAutoencoder()
    model.shipped = module(fill)
    artifact = ArtifactCallback("model.lcz", submodule="shipped", codec="raw")
    trainer = quiet_trainer(folder, artifact, max_epochs=1)
    trainer.fit(model, batches(count=2))


def spooled(folder, fill):
    from lightning_compress.lcz import write

    write._IN_MEMORY = 0  # as a large module's payloads
    save_compressed(module(fill), Path(folder) / "model.lcz", "raw")


def checkpoint(folder, fill):
    (Path(folder) / "last.ckpt").unlink(missing_ok=True) if not fill else None
    fit(folder, "autoencoder", max_epochs=1 + fill)


WRITES = {
    "save_compressed": lambda f, i: save_compressed(module(i), Path(f) / "model.lcz", "raw"),
    "save_compressed, spooled": spooled,
    "write_tensors": lambda f, i: write_tensors(
        module(i).state_dict(), Path(f) / "model.lcz", "raw"
    ),
    "export_onnx": lambda f, i: export_onnx(module(i), Path(f) / "m.onnx", torch.randn(2, 256)),
    "export_onnx int8": lambda f, i: export_onnx(
        module(i), Path(f) / "m.onnx", torch.randn(2, 256), int8=True,
        calibration=[torch.randn(16, 256)],
    ),
    "report": lambda f, i: write_report([f]),
    "EpochCheckpoint": checkpoint,
    "ArtifactCallback": fit_with_artifact,
    "results.json": results,
    "ArtifactCallback, elsewhere": lambda f, i: fit(
        f, "gan", ArtifactCallback(f"{i}/m.lcz"), Slow()
    ),
    "file_sizes": lambda f, i: file_sizes(module(i)),
}  # fmt: skip


def write(connection, what, folder, fill, limit=None, temporary=None):
    """Write something and send what came of it.

    `limit`: bytes that a file may have; `temporary`: the system's folder for such files.
    """
    quiet()
    tempfile.tempdir = temporary or tempfile.tempdir
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        WRITES[what](folder, fill)
        connection.send(None)
    except Exception as error:
        connection.send((type(error).__name__, isinstance(error, OSError), str(error)))


def rank(folder, number, port):
    """One of two processes of a DDP run, as torchrun starts them."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(number),
    }
    own = Path(folder) / str(number)
    sys.stderr = (own / "err").open("w", buffering=1)
    fit(
        folder, "autoencoder", Slow(0.1), default_root_dir=own, devices=2, strategy="ddp",
        max_epochs=100,
    )  # fmt: skip
