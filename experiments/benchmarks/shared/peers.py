"""Peers of the benchmarks: other pruners, nncodec, and the usual teacher."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Container
from importlib import import_module
from typing import Any

import torch

from lightning_compress import (
    KnowledgeDistillation,
    Pair,
    Perceptual,
    Ramp,
    StepKL,
    quantize_static,
)
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.workflow.costs import deployed_cost
from lightning_compress.lab.workflow.quality import rows as images

__all__ = ["NNCODEC", "calibrate", "nncodec_python", "teacher", "torch_pruned"]

NNCODEC = "NNCODEC_PYTHON"  # names an interpreter that has nncodec, which pins an older NumPy


def nncodec_python() -> str | None:
    """That interpreter, if there is one."""
    return shutil.which(os.environ.get(NNCODEC, ""))


def teacher(dense: Any, *, leaves: float | None = None) -> KnowledgeDistillation:
    """A dense baseline that teaches as `docs/distillation.md` found it best for its kind.

    Args:
        dense: the model.
        leaves: fraction of the run after which a VAE's no longer teaches, growing weaker all the
            time; None: it stays.
    """
    if dense.kind == "gan":
        pair = Pair("generator", loss=Perceptual())
        return KnowledgeDistillation(dense, pairs=[pair], balance="gradient_norm")
    outputs = StepKL() if getattr(dense, "discrete", False) else "bernoulli_kl"
    pairs = [Pair("encoder", loss="gaussian_kl"), Pair("decoder", loss=outputs)]
    weight = 1.0 if leaves is None else Ramp(initial=1.0, final=0.0, end=leaves)
    return KnowledgeDistillation(dense, pairs=pairs, weight=weight)


def torch_pruned(
    model: Any, left: float, ends: Container[str], *, round_to: int = 8
) -> tuple[Any, float]:
    """A copy cut by Torch-Pruning's high-level pruner, and the share that it took of each layer.

    It cuts at once: with several steps its 1.6 raises an IndexError on a decoder that unflattens.

    Args:
        model: stays as it is.
        left: the least share of its sixteenths that leaves so much of the MACs is taken, or the
            largest there is.
        ends: paths of layers that make outputs, which the pruner does not find itself.
        round_to: channels of a layer are a multiple of it.
    """
    target, found = left * deployed_cost(model)["macs"], {}
    low, high = 3, 15
    while low < high or high not in found:
        middle = (low + high) // 2
        found[middle] = copy.deepcopy(model)
        _cut(found[middle], middle / 16, ends, round_to)
        enough = deployed_cost(found[middle])["macs"] <= target
        low, high = (low, middle) if enough else (min(middle + 1, high), high)
    return found[high], high / 16


def calibrate(model: Any, data: SplitDataModule, *, weight_bits: int) -> None:
    """Puts a trained model on grids by what its parts are fed in use."""
    z = model.latents(512, seed=1).split(128)
    if hasattr(model, "posterior"):
        x = images(data.train_dataset)[0][:512].split(128)
        quantize_static(model.encoder, x, weight_bits=weight_bits)
        with torch.no_grad():
            z = [model.posterior(batch)[0] for batch in x]
        quantize_static(model.decoder, z, weight_bits=weight_bits)
    else:
        quantize_static(model.generator, z, weight_bits=weight_bits)


def _cut(model: Any, ratio: float, ends: Container[str], round_to: int) -> None:
    tp: Any = import_module("torch_pruning")
    for name, (part, inputs) in model.parts().items():
        part.eval().requires_grad_(True)
        tp.pruner.GroupNormPruner(
            part,
            inputs[0],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,  # of each layer: with global_pruning it left a DCGAN whole
            ignored_layers=[one for path, one in part.named_modules() if f"{name}.{path}" in ends],
            round_to=round_to,
        ).step()
    model.train()
