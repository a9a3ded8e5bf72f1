"""Run by test_waits.py: trains on tensors that say `cuda:0`, and prints what waited in each step.

Counted are steps without an event (prune, re-cluster): these may wait, a plain step may not.
"""

import json
import logging
import sys
import tempfile
import traceback
import warnings

import pretend
import torch
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    KnowledgeDistillation,
    ProjectedEMA,
    QuantizationAwareTraining,
    ThresholdPruning,
)
from lightning_compress.callbacks import StopOnNonFinite

STEPS = 24


def qat(scheme="symmetric", **more):
    return QuantizationAwareTraining(scheme=scheme, **{"freeze": 1.0, **more})


CASES = {
    "nothing": list,
    "pruning": lambda: [GradualPruning(final_sparsity=0.5, end=1.0, frequency=STEPS // 2)],
    "threshold": lambda: [ThresholdPruning(threshold=0.01, end=1.0, frequency=STEPS // 2)],
    "symmetric": lambda: [qat()],
    "affine": lambda: [qat("affine")],
    "moving average": lambda: [qat(observer="moving_average")],
    "percentile": lambda: [qat(observer="percentile")],
    "mse": lambda: [qat(observer="mse")],
    "learned step": lambda: [qat("learned_step")],
    "codebook": lambda: [qat("codebook", activation_bits=None)],
    "codebook, frozen": lambda: [qat("codebook", activation_bits=None, freeze=0.3)],
    "entropy": lambda: [qat("entropy")],
    "entropy, rate": lambda: [qat("entropy", entropy=EntropyGrid(rate=0.1))],
    "entropy, frozen": lambda: [qat("entropy", freeze=0.3)],
    "rate and distortion": lambda: [qat("rate_distortion", lmbda=0.1)],
    "frozen": lambda: [qat(freeze=0.3)],
    "non-finite guard": lambda: [StopOnNonFinite()],
    "projected average": lambda: [ProjectedEMA(decay=0.9), qat("entropy")],
    "distillation": lambda: [
        KnowledgeDistillation(pretend.away(TinyAutoencoder("SGD")), pairs=["decoder"])
    ],
    "all": lambda: [
        GradualPruning(final_sparsity=0.5, end=1.0, frequency=STEPS // 2),
        qat("entropy", entropy=EntropyGrid(rate=0.1)),
        ProjectedEMA(decay=0.9),
        StopOnNonFinite(),
    ],
}


class Model(TinyAutoencoder):
    """Four weights; its batches go where its weights are."""

    def __init__(self):
        super().__init__("SGD")
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))

    def transfer_batch_to_device(self, batch, device, index):
        return [pretend.Away(one) for one in batch]

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[0]).square().mean()


class Steps(Callback):
    """Sorts what waited by whether the step had an event."""

    def __init__(self, callbacks):
        self.watched = [one for one in callbacks if hasattr(one, "events")]
        self.plain, self.events = {}, 0

    def on_train_start(self, *_):
        for one in self.watched:
            self._wrap(one.events)

    def _wrap(self, events):
        due = events.due

        def asked(*, unfinished):
            found = due(unfinished=unfinished)
            self.event = self.event or found
            return found

        events.due = asked

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.event = batch_idx < 2  # the first steps make what the others use
        self.frozen = [getattr(one, "frozen", False) for one in self.watched]
        pretend.WAITS.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.event |= self.frozen != [getattr(one, "frozen", False) for one in self.watched]
        self.events += self.event
        if not self.event:
            for (what, place), count in pretend.WAITS.items():
                if place != "elsewhere":
                    key = f"{what} at {place}"
                    self.plain[key] = self.plain.get(key, 0) + count


def train(name):
    torch.manual_seed(0)
    model, callbacks = pretend.away(Model()), CASES[name]()
    for one in callbacks:
        if isinstance(one, QuantizationAwareTraining):
            one.events.frequency = STEPS // 2
    steps = Steps(callbacks)
    trainer = quiet_trainer(tempfile.mkdtemp(), *callbacks, steps, max_epochs=1)
    trainer.fit(model, batches(STEPS))
    assert trainer.global_step == STEPS
    return {"waits": steps.plain, "steps": STEPS - steps.events}


def tried(name):
    try:
        return train(name)
    except Exception as error:
        return {"error": "".join(traceback.format_exception(error)[-4:])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {}
    with pretend.pretended():
        for name in sys.argv[1:] or CASES:
            found[name] = tried(name)
    print(json.dumps(found))
