"""Interleaved timing of training steps: several set-ups in one process, batch by batch.

A busy moment of the machine so meets all of them. Where a run's memory happens to lie makes its
steps up to a tenth slower or faster than the baseline's: so each set-up runs in several copies,
mixed with the others', and the spread of the copies stands beside the result as the noise.
"""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from statistics import mean, median, stdev

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

__all__ = ["measure_steps"]

SetUp = Callable[[], tuple[LightningModule, list[Callback]]]


class Turns(Callback):
    """Lets one run train one batch at a time, and measures it."""

    def __init__(self, me: int, turns: list[threading.Semaphore]) -> None:
        self.mine, self.next = turns[me], turns[(me + 1) % len(turns)]
        self.times: list[float] = []
        self.arrived = threading.Event()

    def on_train_batch_start(self, *_: object) -> None:  # pyright: ignore
        self.arrived.set()
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:  # pyright: ignore
        self.times.append(time.perf_counter() - self.start)
        self.next.release()


def measure_steps(setups: dict[str, SetUp], *, steps: int, copies: int, rows: int = 64) -> None:
    """Print the time of a step of each set-up against the first one's.

    Two epochs of random images (rows, 1, 28, 28) are trained on one thread, and the second one is
    measured: some tools begin their work when the first one ends.

    Args:
        setups: name -> what makes a fresh model and its callbacks.
        steps: of an epoch.
        copies: of each set-up, two or more.
        rows: of a batch.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    batches = [(torch.rand(rows, 1, 28, 28), torch.zeros(rows)) for _ in range(steps)]
    runs = [name for name in setups for _ in range(copies)]
    random.Random(0).shuffle(runs)
    turns = [threading.Semaphore(0) for _ in runs]
    clocks = [Turns(index, turns) for index in range(len(runs))]
    threads = [
        _thread(setups[name], clock, batches) for name, clock in zip(runs, clocks, strict=True)
    ]
    for thread, clock in zip(threads, clocks, strict=True):
        thread.start()
        clock.arrived.wait()  # setting up may trace modules, which nobody may run meanwhile
    turns[0].release()
    for thread in threads:
        thread.join()
    found = {name: [] for name in setups}
    for name, clock in zip(runs, clocks, strict=True):
        found[name].append(median(clock.times[steps:]))
    _show(found)


def _thread(setup: SetUp, clock: Turns, batches: list) -> threading.Thread:
    seed_everything(0, verbose=False)
    model, callbacks = setup()
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[*callbacks, clock],
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # pyright: ignore
    return threading.Thread(target=_fit, args=(trainer, model, loader))


def _fit(trainer: Trainer, model: LightningModule, loader: object) -> None:
    try:
        trainer.fit(model, loader)
    except BaseException:  # the others would wait for this one's turn for ever
        traceback.print_exc()
        os._exit(1)


def _show(found: dict[str, list[float]]) -> None:
    base = mean(next(iter(found.values())))
    for name, times in found.items():
        ratios = [time / base for time in times]
        error = stdev(ratios) / len(ratios) ** 0.5
        print(
            f"{name:40} {1e3 * mean(times):7.1f} ms a step, {mean(ratios):.3f}x +- {error:.3f} "
            f"(copies {min(ratios):.3f} to {max(ratios):.3f})"
        )
