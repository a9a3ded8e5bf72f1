"""Time of a training step under pruning, against no callback and against Lightning's own.

All runs train the same DCGAN in one process and take turns batch by batch, so that a busy moment
of the machine meets each of them. The second of two epochs is measured: Lightning's ModelPruning
prunes when the first one ends. Usage: python experiments/bench_pruning.py [steps of an epoch]
"""

import sys
import threading
import time
import warnings
from statistics import median, quantiles

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_compress import Constant, GradualPruning
from lightning_compress.models import DCGAN

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60


class Turns(Callback):
    """Lets one run train one batch at a time, and measures it."""

    def __init__(self, me: int, turns: list[threading.Semaphore]) -> None:
        self.mine, self.next = turns[me], turns[(me + 1) % len(turns)]
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:  # pyright: ignore
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:  # pyright: ignore
        self.times.append(time.perf_counter() - self.start)
        self.next.release()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    batches = [(torch.rand(64, 1, 28, 28), torch.zeros(64)) for _ in range(STEPS)]
    callbacks = {
        "no callback": lambda _: [],
        "GradualPruning 90 %": lambda _: [
            GradualPruning(schedule=Constant(final_sparsity=0.9, begin=0, end=1))
        ],
        "GradualPruning, an event every 25 steps": lambda _: [
            GradualPruning(final_sparsity=0.9, begin=0, end=2 * STEPS, frequency=25)
        ],
        "no callback, again: the noise": lambda _: [],
        "Lightning ModelPruning": lambda model: [
            ModelPruning("l1_unstructured", parameters_to_prune=weights(model), amount=0.9)
        ],
        "torch.nn.utils.prune": pruned_by_torch,
    }
    turns = [threading.Semaphore(int(index == 0)) for index in range(len(callbacks))]
    clocks = [Turns(index, turns) for index in range(len(callbacks))]
    threads = []
    for clock, make in zip(clocks, callbacks.values(), strict=True):
        seed_everything(0, verbose=False)
        model = DCGAN(image_size=28)
        trainer = Trainer(
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[*make(model), clock],
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # pyright: ignore
        threads.append(threading.Thread(target=trainer.fit, args=(model, loader)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = clocks[0].times[STEPS:]
    for name, clock in zip(callbacks, clocks, strict=True):
        ratios = [mine / base for mine, base in zip(clock.times[STEPS:], plain, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{name:40} {1e3 * median(clock.times[STEPS:]):8.1f} ms a step, "
            f"{median(ratios):.3f}x (quartiles {low:.3f} to {high:.3f}), "
            f"all steps {sum(clock.times[STEPS:]) / sum(plain):.3f}x"
        )


def pruned_by_torch(model: DCGAN) -> list[Callback]:
    prune.global_unstructured(weights(model), prune.L1Unstructured, amount=0.9)
    return []


def weights(model: DCGAN) -> list[tuple[nn.Module, str]]:
    kinds = (nn.Linear, nn.ConvTranspose2d, nn.Conv2d)
    return [(part, "weight") for part in model.generator.modules() if isinstance(part, kinds)]


if __name__ == "__main__":
    main()
