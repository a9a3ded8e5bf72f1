"""Runs of the headline table: a converged dense model, and as much compute for each arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_compress import load_compressed
from lightning_compress.lab.evaluation.fidelity import fidelity
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.learning_rate import CosineAnnealing
from lightning_compress.lab.workflow.quality import generate, rows
from lightning_compress.lab.workflow.training import build_model

from .baseline_plans import PLANS, Plan, baseline_file
from .finetuning import EARLY, Start

__all__ = ["SETS", "WHOLE_COMPUTE", "Model", "Runs"]

LAST = 0.01  # of the learning rate, at the end of each row
WHOLE_COMPUTE = 1.5  # steps without a teacher over those with one: its forward pass costs a half


@dataclass(frozen=True)
class Model:
    """Model of the table and its arms.

    Args:
        title: of its table.
        baseline: its plan in `PLANS`, which has overrides and metric.
        epochs: of a row with a teacher, after the dense model.
        main: the rows that all seeds make.
        peers: the rows that the first three seeds make.
        spared: its smallest layers, which pruning leaves dense.
        rate: weight of the entropy coder's bits in its loss, where grids are trained for them.
        channels: how it loses channels; beside the budget.
        seeds: how many it has, 0 first.
    """

    title: str
    baseline: tuple[str, str]
    epochs: int
    main: Sequence[str]
    peers: Sequence[str]
    spared: Sequence[str] = ()
    rate: float = 0.0
    channels: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5

    @property
    def ends(self) -> list[str]:
        """Paths of layers that make outputs, among the smallest."""
        return [one for one in self.spared if one.rpartition(".")[2] in OUTPUTS]

    @property
    def dense(self) -> Plan:
        """How its dense baseline is trained."""
        return PLANS[self.baseline[0]][self.baseline[1]]

    @property
    def overrides(self) -> list[str]:
        """Of its config, the data apart."""
        return [one for one in self.dense.overrides if not one.startswith("data")]

    @property
    def data(self) -> list[str]:
        """Overrides that choose its data."""
        return [one for one in self.dense.overrides if one.startswith("data")]

    @property
    def metric(self) -> str:
        """What judges it; lower is better."""
        return self.dense.metric

    def plan(self, seed: int) -> list[str]:
        """The rows of a seed."""
        return [*self.main, *(self.peers if seed < PEER_SEEDS else ())]


PEER_SEEDS = 3
OUTPUTS = ("mu", "logvar", "up2", "output")  # names of layers that make outputs
ENDS = ["encoder.body.down1", "encoder.mu", "encoder.logvar", "decoder.up2"]
CONTROLS = ("dense", "dense, trained on", "dense, taught")
# a quarter of width 16 is half of it again: no layer has fewer than 8 channels
NARROW = ("half of the width from scratch, 8 bits", "a quarter of the width from scratch, 8 bits")
RECIPES = (
    "80 % zeros, entropy grid",
    "90 % zeros, entropy grid",
    "rate-distortion, λ = 0.5",
    "rate-distortion, λ = 1",
    "rate-distortion, λ = 2",
    "rate-distortion, λ = 4",
    "rate-distortion, λ = 0.5, taught",
    "rate-distortion, λ = 2, taught",
    "rate-distortion, λ = 1, int8",
    "int8",
    "rdoq at save, best of three",
)
# A recurrent layer loses no channels: `CHANNELS` are of convolutional models alone.
CHANNELS = (
    "half the MACs",
    "half the MACs, taught",
    "half the MACs, int8",
    "half the MACs, int8, taught",
    "half the MACs, rate-distortion, λ = 0.5, int8",
    "half the MACs, rate-distortion, λ = 0.5, taught",
)
CUT_BY_OTHERS = ("Torch-Pruning, half the MACs", "Torch-Pruning, half the MACs, taught")
# An adversarial loss is some nats a batch, not some hundred nats an image.
GAN_RECIPES = ("rate-distortion, λ = 0.02", "rate-distortion, λ = 0.1", *RECIPES)
OTHERS = (
    "Lightning ModelPruning to 90 % by a schedule, xz",
    "torch prune 90 %, ONNX Runtime int8, xz",
    "Deep Compression, 90 %",
    "nncodec, best of three",
)  # what a user would take instead
VAE_CHANNELS = {**EARLY, "protect": ["decoder.project"]}
SETS: dict[str, dict[str, Model]] = {
    "fashion": {
        "vae": Model(
            "VAE",
            ("fashion", "vae"),
            8,
            [*CONTROLS, *RECIPES, *CHANNELS, *NARROW],
            [*OTHERS, *CUT_BY_OTHERS],
            ENDS,
            10.0,
            VAE_CHANNELS,
        ),
        "dcgan": Model(
            "DCGAN of width 32",
            ("fashion", "dcgan"),
            8,
            [*CONTROLS, *GAN_RECIPES, *CHANNELS, *NARROW],
            [*OTHERS, *CUT_BY_OTHERS],
            ["generator.up2"],
        ),
    },
    "digits": {
        "vae": Model(
            "VAE of width 16",
            ("digits", "vae"),
            20,
            [*CONTROLS, *RECIPES, *CHANNELS, NARROW[0]],
            [*OTHERS, *CUT_BY_OTHERS],
            ENDS,
            1.0,
            VAE_CHANNELS,
        ),
        "dcgan": Model(
            "DCGAN of width 16",
            ("digits", "dcgan"),
            20,
            [*CONTROLS, *GAN_RECIPES, *CHANNELS, NARROW[0]],
            [*OTHERS, *CUT_BY_OTHERS],
            ["generator.up2"],
        ),
        "recurrent_vae": Model(
            "recurrent VAE",
            ("digits", "recurrent_vae"),
            20,
            [*CONTROLS, *RECIPES, NARROW[0]],
            OTHERS,
            ["*.weight_ih_l0", "encoder.mu", "encoder.logvar", "decoder.output"],
            1.0,
            EARLY,
        ),
    },
}


class FromBaseline(Start):
    """A start that the file of a converged dense model holds."""

    file: Path

    def model(self) -> Any:
        """The model as the file has it: half-precision values in float32."""
        model = build_model(self.cfg, self.data, seed=self.seed)
        load_compressed(self.file, model)
        return model


class Runs:
    """One model and seed.

    Args:
        name: of the model.
        model: what it is.
        seed: of weights and noise.
        folder: where its weights are kept.
    """

    def __init__(self, name: str, model: Model, seed: int, folder: Path) -> None:
        self.name, self.model, self.seed, self.folder = name, model, seed, folder
        folder.mkdir(parents=True, exist_ok=True)
        start = {name: ([*model.overrides], 0, [*model.spared])}
        self.start = FromBaseline(
            name,
            seed,
            folder,
            start,
            data=model.data,
            images=True,
            precision=model.dense.precision,
        )
        self.start.file = baseline_file(*model.baseline, seed)
        self.kind = str(self.fresh().kind)

    def fresh(self) -> Any:
        """A copy of the converged dense model."""
        return self.start.model()

    def dense(self) -> Any:
        """The converged dense model: the teacher of all rows."""
        return self.fresh().eval()

    def fit(
        self, model: Any, callbacks: Sequence[Callback] = (), *, epochs: int | None = None
    ) -> Any:
        """Trains a copy on, for the steps that every row has, or for so many epochs."""
        torch.manual_seed(self.seed)
        epochs = self.model.epochs if epochs is None else epochs
        self.start.fit(model, [*callbacks, CosineAnnealing(LAST)], epochs=epochs, steps=None)
        return model.cpu().eval()

    def whole_compute(self) -> int:
        """Epochs without a teacher that cost what a taught row costs."""
        return math.ceil(WHOLE_COMPUTE * self.model.epochs)

    def validation(self, model: Any) -> float:
        """The metric on the validation split, which settings are chosen by."""
        x = rows(self.start.data.val_dataset)[0]
        metric = self.model.metric
        if metric == "neg_elbo":
            return likelihood(model, x)[metric]
        network = self.start.evaluator(model).extractor
        if network is None:
            raise RuntimeError(f"{self.name}: the data have no labels, so no feature network")
        images = x.unsqueeze(1) if x.dim() == 3 else x
        return fidelity(generate(model, len(x)), images, network.module)[metric]
