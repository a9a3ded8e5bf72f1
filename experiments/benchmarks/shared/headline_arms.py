"""Arms of the headline table: controls, this package's methods, and peers at their best."""

from __future__ import annotations

import copy
import io
import os
import subprocess
from collections.abc import Callable, Sequence
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
    load_compressed,
    quantize_weights,
)
from lightning_compress.conversion.export import export_onnx
from lightning_compress.errors import require
from lightning_compress.lab.workflow.costs import deployed_inputs, inputs_in_use
from lightning_compress.lab.workflow.training import build_model
from lightning_compress.lcz.artifact import save_compressed
from lightning_compress.targets import select

from .headline_files import OnnxPart, Shipped, loaded, packed, smallest, streamed
from .headline_runs import Runs
from .peers import NNCODEC, calibrate, teacher, torch_pruned
from .rows import as_file_name

__all__ = ["ARMS", "CONTROLS", "PEERS", "Arm", "grids", "int8", "pruning"]

HELPER = Path(__file__).with_name("nncodec_model.py")
NARROW_RATE = 1e-3  # above it narrow models end with a dead layer before their latents
HALF = 0.5  # of the multiplications, which channels leave
POINTS = (-38, -32, -26)  # nncodec's quantization parameter: finer to coarser
STEPS = ((0.1, 0.005), (0.2, 0.01), (0.3, 0.02))  # of entropy grids, and the multiplier of rdoq

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


def rate_distortion(lmbda: float, *, activation_bits: int | None = None) -> Any:
    """Steps that train under loss + λ bits; with grids of activations integer engines run it."""
    return QuantizationAwareTraining(
        weight_bits=8,
        activation_bits=activation_bits,
        scheme="rate_distortion",
        lmbda=lmbda,
        lr=5e-3,
    )


def int8(begin: float = 0.0) -> QuantizationAwareTraining:
    """For integer engines."""
    return QuantizationAwareTraining(weight_bits=8, activation_bits=8, begin=begin, freeze=0.9)


def halved(runs: Runs) -> ChannelPruning:
    """Whole channels, by the budget of the multiplications that are left."""
    return ChannelPruning(budget={"macs": HALF}, **runs.model.channels)


def taught(runs: Runs) -> KnowledgeDistillation:
    """Distillation from the converged dense model; a VAE's fades out after half of the run."""
    return teacher(runs.dense(), leaves=0.5)


def trained(*make: Callable[[Runs], Any]) -> Arm:
    """The dense model, trained on with callbacks: for fewer steps where a teacher costs some."""

    def arm(runs: Runs, home: Path) -> Shipped:
        epochs = epochs_of(runs, make)
        model = runs.fit(runs.fresh(), [one(runs) for one in make], epochs=epochs)
        return packed(runs, model, home)

    return arm


def epochs_of(runs: Runs, make: Sequence[Callable[[Runs], Any]]) -> int:
    """Of a row with these callbacks: all rows cost the same."""
    return runs.model.epochs if taught in make else runs.whole_compute()


def narrow(width: float) -> Arm:
    """A narrower dense model from scratch, for the steps of dense model and row together.

    Its weights get 8 bits after training, and the coder of the other rows.
    """

    def arm(runs: Runs, home: Path) -> Shipped:
        cfg = copy.deepcopy(runs.start.cfg)
        cfg.model.width_multiplier = width
        cfg.model.lr = min(cfg.model.lr, NARROW_RATE)
        model: Any = build_model(cfg, runs.start.data, seed=runs.seed)
        model = runs.fit(model, epochs=runs.model.dense.epochs + runs.whole_compute())
        return eight_bits(runs, model, home)

    return arm


def eight_bits(runs: Runs, model: Any, home: Path) -> Shipped:
    """8 bits for weights and activations, found after training."""
    calibrate(model, runs.start.data, weight_bits=8)
    return packed(runs, model, home)


def matrices(runs: Runs, model: Any) -> list[tuple[nn.Module, str]]:
    """What others prune: the weights that `GradualPruning` would, a recurrent layer's too, by name.

    Lightning's callback finds parameters called `weight` alone: a GRU has none.
    """
    targets = select(model, exclude=runs.model.spared).targets
    return [(one.layer, one.name) for one in targets]


def amounts(epochs: int, final: float = 0.9, until: float = 0.5) -> list[float]:
    """Lightning's `amount` of each epoch, a fraction of what remains, to a cubic schedule.

    >>> one, other = amounts(4, final=0.75)[:2]
    >>> round(1 - (1 - one) * (1 - other), 6)
    0.75
    """
    ends = max(1, round(until * epochs))
    total = [final * (1 - (1 - min(1.0, (n + 1) / ends)) ** 3) for n in range(epochs)]
    return [1 - (1 - now) / (1 - last) for last, now in zip([0.0, *total], total, strict=False)]


def lightning_pruning(runs: Runs, home: Path) -> Shipped:
    """Lightning's callback with a schedule of amounts, torch.save and xz."""
    model, by_epoch = runs.fresh(), amounts(runs.whole_compute())
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=matrices(runs, model),
        amount=lambda epoch: by_epoch[epoch],
        use_lottery_ticket_hypothesis=False,
    )
    runs.fit(model, [callback], epochs=runs.whole_compute())
    buffer = io.BytesIO()
    torch.save(model.deployed_module().state_dict(), buffer)
    return streamed(model, home, "torch.save + xz", smallest(buffer.getvalue()))


def torch_and_ort(runs: Runs, home: Path) -> Shipped:
    """torch.nn.utils.prune by the same schedule, ONNX Runtime's static quantization, xz."""
    model = runs.fresh()
    pruned, by_epoch = matrices(runs, model), amounts(runs.whole_compute())
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=pruned,
        amount=lambda epoch: by_epoch[epoch],
        use_lottery_ticket_hypothesis=False,
    )
    runs.fit(model, [callback], epochs=runs.whole_compute())
    for layer, name in pruned:
        if prune.is_pruned(layer):
            prune.remove(layer, name)
    return _quantized_by_ort(runs, model, home)


def _quantized_by_ort(runs: Runs, model: Any, home: Path) -> Shipped:
    quantization: Any = require("onnxruntime.quantization", extra="onnx")
    size, graphs = 0, {}
    for name, (part, sample) in model.parts().items():
        file, small = home / f"{name}.fp32.onnx", home / f"{name}.int8.onnx"
        export_onnx(part, file, sample)
        feed = inputs_in_use(model, part, runs.start.data)
        names = [one.name for one in OnnxPart(file).session.get_inputs()]
        reader = _Reader([dict(zip(names, (t.numpy() for t in row), strict=True)) for row in feed])
        quantization.quantize_static(file, small, reader, per_channel=True, reduce_range=True)
        size += smallest(small.read_bytes())
        graphs[name] = small, None
        file.unlink()
    return Shipped(model, "int8 ONNX + xz", size, graphs)


class _Reader:
    """What ONNX Runtime's calibration asks for."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self.feeds, None)


def torch_pruning(*make: Callable[[Runs], Any]) -> Arm:
    """Torch-Pruning's groups, to the multiplications that ours leaves, and the steps after it."""

    def arm(runs: Runs, home: Path) -> Shipped:
        # By eights, its default here, it leaves fewer of them than ours.
        model, _ = torch_pruned(runs.fresh(), HALF, runs.model.ends, round_to=2)
        model = runs.fit(model, [one(runs) for one in make], epochs=epochs_of(runs, make))
        return packed(runs, model, home)

    return arm


def deep_compression(runs: Runs, home: Path) -> Shipped:
    """Pruning, 5 bits of k-means centres, relative indices, Huffman (arXiv:1510.00149)."""
    centres = QuantizationAwareTraining(
        weight_bits=5, activation_bits=None, scheme="codebook", begin=0.5, freeze=0.8
    )
    model = runs.fit(runs.fresh(), [pruning(runs, 0.9), centres], epochs=runs.whole_compute())
    path = home / "stream.lcz"
    size = save_compressed(model.deployed_module(), path, codec="relative_index").bytes
    return streamed(model, home, ".lcz, weights alone", size)


def nncodec(arm: str) -> Arm:
    """MPEG's coder on the weights that another row ended with: the best of three points.

    It quantizes them too: the row's quality is that of what its bitstream decodes to.
    """

    def made(runs: Runs, home: Path) -> Shipped:
        source = _of(arm, home)
        model, size = _coarsest(runs, [_decoded(runs, source, home, point) for point in POINTS])
        return streamed(model, home, "nncodec", size)

    return made


def at_save(arm: str) -> Arm:
    """The same of what `save_compressed` does without training: grids, then `rdoq` with data."""

    def made(runs: Runs, home: Path) -> Shipped:
        source = _of(arm, home)
        model, size = _coarsest(runs, [_chosen(runs, source, home, *one) for one in STEPS])
        return streamed(model, home, ".lcz, weights alone", size)

    return made


def _of(arm: str, home: Path) -> Path:
    """The folder of another row of the same seed."""
    source = home.parent / as_file_name(arm)
    if not (source / "weights.lcz").exists():
        raise FileNotFoundError(f"{source}: the row {arm!r} comes first")
    return source


def _coarsest(runs: Runs, tried: Sequence[tuple[Any, int]]) -> tuple[Any, int]:
    """The last whose metric on the validation split is within 2 % of the first's, the finest."""
    scores = [runs.validation(model) for model, _ in tried]
    good = [one for one, score in zip(tried, scores, strict=True) if score <= 1.02 * scores[0]]
    return good[-1]


def _decoded(runs: Runs, source: Path, home: Path, point: int) -> tuple[Any, int]:
    model = loaded(runs, source)
    state = model.deployed_module().state_dict()
    before, after = home / "weights.npz", home / "decoded.npz"
    np.savez(before, **{name: tensor.numpy() for name, tensor in state.items() if tensor.dim()})
    command = [os.environ[NNCODEC], str(HELPER), str(before), str(after), str(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with np.load(after) as decoded:
        state |= {name: torch.from_numpy(decoded[name]) for name in decoded.files}
    model.deployed_module().load_state_dict(state)
    before.unlink()
    after.unlink()
    return model, int(done.stdout.split()[-1])


def _chosen(runs: Runs, source: Path, home: Path, step: float, rdoq: float) -> tuple[Any, int]:
    model, path = loaded(runs, source), home / "stream.lcz"
    module = model.deployed_module()
    quantize_weights(module, scheme="entropy", step=step)
    data = deployed_inputs(model, runs.start.data)
    size = save_compressed(
        module, path, rdoq=rdoq, data=data, float_dtype="fp16", fold_batchnorm=True
    ).bytes
    load_compressed(path, module)
    return model, size


def dense_artifact(runs: Runs, home: Path) -> Shipped:
    """The converged dense model as it is."""
    return packed(runs, runs.dense(), home)


CONTROLS: dict[str, Arm] = {
    "dense": dense_artifact,
    "dense, trained on": trained(),
    "dense, taught": trained(taught),
    "half of the width from scratch, 8 bits": narrow(0.5),
    "a quarter of the width from scratch, 8 bits": narrow(0.25),
}
OURS: dict[str, Arm] = {
    "80 % zeros, entropy grid": trained(lambda r: pruning(r, 0.8), lambda r: grids(r, 0.5)),
    "90 % zeros, entropy grid": trained(lambda r: pruning(r, 0.9), lambda r: grids(r, 0.5)),
    "rate-distortion, λ = 0.02": trained(lambda _: rate_distortion(0.02)),
    "rate-distortion, λ = 0.1": trained(lambda _: rate_distortion(0.1)),
    "rate-distortion, λ = 0.5": trained(lambda _: rate_distortion(0.5)),
    "rate-distortion, λ = 1": trained(lambda _: rate_distortion(1.0)),
    "rate-distortion, λ = 2": trained(lambda _: rate_distortion(2.0)),
    "rate-distortion, λ = 4": trained(lambda _: rate_distortion(4.0)),
    "rate-distortion, λ = 0.5, taught": trained(lambda _: rate_distortion(0.5), taught),
    "rate-distortion, λ = 2, taught": trained(lambda _: rate_distortion(2.0), taught),
    "rate-distortion, λ = 1, int8": trained(lambda _: rate_distortion(1.0, activation_bits=8)),
    "int8": trained(lambda _: int8(begin=0.2)),
    "half the MACs": trained(halved),
    "half the MACs, taught": trained(halved, taught),
    "half the MACs, int8": trained(halved, lambda _: int8(begin=0.5)),
    "half the MACs, int8, taught": trained(halved, lambda _: int8(begin=0.5), taught),
    "half the MACs, rate-distortion, λ = 0.5, int8": trained(
        halved, lambda _: rate_distortion(0.5, activation_bits=8)
    ),
    "half the MACs, rate-distortion, λ = 0.5, taught": trained(
        halved, lambda _: rate_distortion(0.5), taught
    ),
    "rdoq at save, best of three": at_save("dense, trained on"),
}
PEERS: dict[str, Arm] = {
    "Lightning ModelPruning to 90 % by a schedule, xz": lightning_pruning,
    "torch prune 90 %, ONNX Runtime int8, xz": torch_and_ort,
    "Torch-Pruning, half the MACs": torch_pruning(),
    "Torch-Pruning, half the MACs, taught": torch_pruning(taught),
    "Deep Compression, 90 %": deep_compression,
    "nncodec, best of three": nncodec("dense, trained on"),
}
ARMS = {**CONTROLS, **OURS, **PEERS}
