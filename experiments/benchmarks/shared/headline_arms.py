"""Arms of the headline table: this package's methods, and peers."""

from __future__ import annotations

import copy
import gzip
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_compress import (
    ChannelPruning,
    EntropyGrid,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
    initialize_from_teacher,
)
from lightning_compress.conversion.export import export_onnx
from lightning_compress.errors import require
from lightning_compress.lab.workflow.costs import inputs_in_use
from lightning_compress.lab.workflow.training import build_model
from lightning_compress.targets import select

from .headline_files import OnnxPart, Shipped, lcz, loaded
from .headline_runs import Runs
from .peers import NNCODEC, calibrate, teacher, torch_pruned
from .rows import as_file_name

__all__ = ["ARMS", "PEERS", "Arm"]

HELPER = Path(__file__).with_name("nncodec_model.py")

Arm = Callable[[Runs, Path], Shipped]


def pruning(runs: Runs, sparsity: float, begin: float = 0.02, end: float = 0.5) -> GradualPruning:
    """By the change of the loss, each layer by the same fraction, the smallest left dense."""
    return GradualPruning(
        final_sparsity=sparsity,
        begin=begin,
        end=end,
        criterion="taylor",
        scope="layer",
        exclude=list(runs.model.spared),
    )


def grids(runs: Runs, step: float) -> QuantizationAwareTraining:
    """For the entropy coder."""
    return QuantizationAwareTraining(
        activation_bits=None,
        scheme="entropy",
        entropy=EntropyGrid(step=step, rate=runs.model.rate),
        begin=0.35,
    )


def taught(runs: Runs) -> KnowledgeDistillation:
    """Distillation from the dense model of the same steps.

    A VAE's leaves: taught to the end it comes out worse, see `docs/channels.md`.
    """
    return teacher(runs.dense(), leaves=0.5)


def int8(begin: float = 0.0) -> QuantizationAwareTraining:
    """For integer engines."""
    return QuantizationAwareTraining(weight_bits=8, activation_bits=8, begin=begin, freeze=0.9)


def trained(*make: Callable[[Runs], Any], codec: str = "auto", whole: bool = False) -> Arm:
    """The dense start, trained on with callbacks; with `whole` also as int8 files."""

    def arm(runs: Runs, home: Path) -> Shipped:
        model = runs.fit(runs.fresh(), [one(runs) for one in make])
        return lcz(model, home, codec=codec, int8=runs.start.data if whole else None)

    return arm


def together(sparsity: float, step: float) -> Arm:
    """Masks and grids for the coder in one run."""
    return trained(lambda runs: pruning(runs, sparsity), lambda runs: grids(runs, step))


def channels(runs: Runs, left: float, end: float = 0.4) -> ChannelPruning:
    """Smaller layers, in the way that the model tolerates best."""
    return ChannelPruning(budget={"macs": left}, **{"end": end, **runs.model.channels})


def everything(left: float, sparsity: float, step: float) -> Arm:
    """Smaller layers first, then zeros in them, then grids for the coder, beside a teacher."""
    return trained(
        lambda runs: channels(runs, left, end=0.25),
        lambda runs: pruning(runs, sparsity, begin=0.3, end=0.6),
        lambda runs: grids(runs, step),
        taught,
    )


def post_training(runs: Runs, home: Path) -> Shipped:
    """8 bits for the weights and activations of the dense row's model, found after training."""
    model = runs.dense()
    calibrate(model, runs.start.data, weight_bits=8)
    return lcz(model, home, int8=runs.start.data)


def narrow(runs: Runs, home: Path) -> Shipped:
    """A student of a quarter of the width that begins with its teacher's channels."""
    cfg = copy.deepcopy(runs.start.cfg)
    cfg.model.width_multiplier = 0.25
    student: Any = build_model(cfg, runs.start.data, seed=runs.seed)
    dense = runs.dense()
    for name in student.parts():
        initialize_from_teacher(getattr(student, name), getattr(dense, name))
    return lcz(runs.fit(student, [taught(runs)]), home)


def channels_int8(left: float) -> Arm:
    """Smaller layers and integers, beside a teacher: the fastest file."""
    return trained(lambda r: channels(r, left), lambda _: int8(begin=0.5), taught, whole=True)


def matrices(runs: Runs, model: Any) -> list[tuple[nn.Module, str]]:
    """What others prune: the weights that `GradualPruning` would, a recurrent layer's too, by name.

    Lightning's callback finds parameters called `weight` alone: a GRU has none.
    """
    targets = select(model, exclude=runs.model.spared).targets
    return [(one.layer, one.name) for one in targets]


def lightning_pruning(runs: Runs, home: Path) -> Shipped:
    """Lightning's callback, torch.save and gzip."""
    model = runs.fresh()
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=matrices(runs, model),
        amount=lambda epoch: 0.9 if epoch == 0 else 0,
        use_lottery_ticket_hypothesis=False,
    )
    runs.fit(model, [callback])
    torch.save(model.deployed_module().state_dict(), home / "model.pt")
    data = gzip.compress((home / "model.pt").read_bytes(), 9)
    (home / "model.pt.gz").write_bytes(data)
    return Shipped(model, "torch.save + gzip", len(data), home)


def torch_and_ort(runs: Runs, home: Path) -> Shipped:
    """torch.nn.utils.prune with some training, then ONNX Runtime's static quantization."""
    model = runs.fresh()
    pruned = matrices(runs, model)
    for layer, name in pruned:
        prune.l1_unstructured(layer, name, 0.9)
    runs.fit(model)
    for layer, name in pruned:
        prune.remove(layer, name)
    return _quantized_by_ort(runs, model, home)


def _quantized_by_ort(runs: Runs, model: Any, home: Path) -> Shipped:
    quantization: Any = require("onnxruntime.quantization", extra="onnx")
    size = 0
    for name, (part, sample) in model.parts().items():
        file, small = home / f"{name}.fp32.onnx", home / f"{name}.int8.onnx"
        export_onnx(part, file, sample)
        feed = inputs_in_use(model, part, runs.start.data)
        names = [one.name for one in OnnxPart.open(file).get_inputs()]
        reader = _Reader([dict(zip(names, (t.numpy() for t in row), strict=True)) for row in feed])
        quantization.quantize_static(file, small, reader, per_channel=True, reduce_range=True)
        size += small.stat().st_size
        setattr(model, name, OnnxPart(small))
        file.unlink()
    return Shipped(model, "int8 ONNX", size, home, onnx=True)


class _Reader:
    """What ONNX Runtime's calibration asks for."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self.feeds, None)


def torch_pruning(left: float) -> Arm:
    """Torch-Pruning's high-level pruner at once, then the steps."""

    def arm(runs: Runs, home: Path) -> Shipped:
        model, _ = torch_pruned(runs.fresh(), left, runs.model.spared)
        return lcz(runs.fit(model), home)

    return arm


def nncodec(arm: str) -> Arm:
    """MPEG's coder with its own settings on the weights that another row ended with.

    It quantizes them too: the row's quality is that of what its bitstream decodes to.
    """

    def made(runs: Runs, home: Path) -> Shipped:
        source = home.parent / as_file_name(arm)
        if not (source / "model.lcz").exists():
            raise FileNotFoundError(f"{source}: the row {arm!r} comes first")
        model = loaded(runs, source)
        state = model.deployed_module().state_dict()
        before, after = home / "weights.npz", home / "decoded.npz"
        np.savez(before, **{name: tensor.numpy() for name, tensor in state.items() if tensor.dim()})
        command = [os.environ[NNCODEC], str(HELPER), str(before), str(after)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        with np.load(after) as decoded:
            state |= {name: torch.from_numpy(decoded[name]) for name in decoded.files}
        model.deployed_module().load_state_dict(state)
        before.unlink()
        after.unlink()
        return Shipped(model, "nncodec", int(done.stdout.split()[-1]), home)

    return made


OURS: dict[str, Arm] = {
    "dense": lambda runs, home: lcz(runs.dense(), home),
    "zeros and grids, 90 %": together(0.9, 0.5),
    "zeros and grids, 97 %": together(0.97, 0.7),
    "zeros and grids, 98.5 %": together(0.985, 0.7),
    "half of the MACs, 90 % zeros, grids, taught": everything(0.5, 0.9, 0.5),
    "half of the MACs, 70 % zeros, grids, taught": everything(0.5, 0.7, 0.5),
    "half of the MACs, 65 % zeros, grids, taught": everything(0.5, 0.65, 0.5),
    "a quarter of the MACs, 80 % zeros, grids, taught": everything(0.25, 0.8, 0.5),
    "an eighth of the MACs, 70 % zeros, grids, taught": everything(0.125, 0.7, 0.5),
    "a sixteenth of the MACs, 50 % zeros, grids, taught": everything(0.0625, 0.5, 0.5),
    "a sixteenth of the MACs, 60 % zeros, grids, taught": everything(0.0625, 0.6, 0.6),
    "a sixteenth of the MACs, 70 % zeros, grids, taught": everything(0.0625, 0.7, 0.6),
    "a quarter of the MACs, int8, taught": channels_int8(0.25),
    "an eighth of the MACs, int8, taught": channels_int8(0.125),
    "a twelfth of the MACs, int8, taught": channels_int8(1 / 12),
    "90 % zeros": trained(lambda r: pruning(r, 0.9)),
    "90 % zeros, 4 bits": trained(
        lambda r: pruning(r, 0.9),
        lambda _: QuantizationAwareTraining(
            weight_bits=4, activation_bits=None, per_channel=False, begin=0.35
        ),
    ),
    "a quarter of the MACs": trained(lambda r: channels(r, 0.25)),
    "trained W8A8": trained(lambda _: int8(), whole=True),
    "post-training W8A8": post_training,
    "a quarter of the width, taught": narrow,
}
PEERS: dict[str, Arm] = {
    "Lightning ModelPruning 90 %, gzip": lightning_pruning,
    "torch prune 90 %, ONNX Runtime int8": torch_and_ort,
    "Torch-Pruning, a quarter of the MACs": torch_pruning(0.25),
    "Deep Compression, 90 %": trained(
        lambda r: pruning(r, 0.9),
        lambda _: QuantizationAwareTraining(
            weight_bits=5, activation_bits=None, scheme="codebook", begin=0.5, freeze=0.8
        ),
        codec="relative_index",
    ),
    "nncodec": nncodec("dense"),
    "90 % zeros, nncodec": nncodec("90 % zeros"),
}
ARMS = {**OURS, **PEERS}
