"""Runs of the headline table: one dense start a model, and equal steps for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from .finetuning import EARLY, Annealing, Start

__all__ = ["SETS", "Model", "Runs"]


@dataclass(frozen=True)
class Model:
    """Model of the table and its arms.

    Args:
        title: of its table.
        overrides: of its config.
        data: overrides that choose its data.
        epochs: of the dense start, and of each row after it.
        metric: that judges it; lower is better.
        main: the rows that all seeds make.
        more: those that the first seed makes besides.
        spared: its smallest layers, which pruning leaves dense.
        rate: weight of the entropy coder's bits in its loss, where grids are trained for them.
        channels: how it loses channels, where all is done together; beside the budget.
        first: overrides of the dense start alone.
        seeds: how many it has, 0 first: more where those of the dense rows lie far apart.
    """

    title: str
    overrides: Sequence[str]
    data: Sequence[str]
    epochs: tuple[int, int]
    metric: str
    main: Sequence[str]
    more: Sequence[str]
    spared: Sequence[str] = ()
    rate: float = 0.0
    channels: Mapping[str, Any] = field(default_factory=dict)
    first: Sequence[str] = ()
    seeds: int = 3

    def plan(self, *, first: bool) -> list[str]:
        """The rows of the first seed, or of another."""
        return list(dict.fromkeys([*self.main, *(self.more if first else ())]))


GRIDS = "zeros and grids, 90 %"
SIXTEENTH = "a sixteenth of the MACs, 60 % zeros, grids, taught"
INT8 = "a quarter of the MACs, int8, taught"
FASTEST = "an eighth of the MACs, int8, taught"
OTHERS = (
    "Lightning ModelPruning 90 %, gzip",
    "torch prune 90 %, ONNX Runtime int8",
    "Deep Compression, 90 %",
    "nncodec",
    "90 % zeros, nncodec",
)  # what a user would take instead
COMMON = (
    "90 % zeros",
    "a quarter of the MACs",
    "trained W8A8",
    "post-training W8A8",
    "a quarter of the width, taught",
    "90 % zeros, 4 bits",
    INT8,
    *OTHERS,
)
TORCH_PRUNING = "Torch-Pruning, a quarter of the MACs"  # which cuts no recurrent layers
BRIEF = ("90 % zeros", "post-training W8A8", INT8, *OTHERS)  # what ten minutes have room for
FASHION = ["data=fashion_mnist"]
NARROW = ["model.width=32", "model.discriminator_width=16", "evaluate.metric=fid"]
ENDS = ["encoder.body.down1", "encoder.mu", "encoder.logvar", "decoder.up2"]
VAE_CHANNELS = {**EARLY, "protect": ["decoder.project"]}
SETS: dict[str, dict[str, Model]] = {
    "fashion": {
        "vae": Model(
            "VAE",
            ["model=vae"],
            FASHION,
            (1, 3),
            "neg_elbo",
            ["dense", GRIDS, "half of the MACs, 90 % zeros, grids, taught", INT8],
            [
                *COMMON,
                TORCH_PRUNING,
                "zeros and grids, 97 %",
                "zeros and grids, 98.5 %",
                "a quarter of the MACs, 80 % zeros, grids, taught",
            ],
            ENDS,
            10.0,
            VAE_CHANNELS,
        ),
        "vae_wide": Model(
            "VAE of width 64",
            ["model=vae", "model.width=64"],
            FASHION,
            (1, 3),
            "neg_elbo",
            ["dense", FASTEST, "an eighth of the MACs, 70 % zeros, grids, taught"],
            ["a twelfth of the MACs, int8, taught"],
            ENDS,
            10.0,
            VAE_CHANNELS,
            ["model.lr=5e-4"],  # at twice of that it is unstable before it has learned anything
            seeds=5,
        ),
        "dcgan": Model(
            "DCGAN of width 32",
            ["model=dcgan", "model.spectral_norm=true", *NARROW],
            FASHION,
            (1, 2),
            "fid",
            ["dense", SIXTEENTH],
            [
                *COMMON,
                TORCH_PRUNING,
                GRIDS,
                "zeros and grids, 97 %",
                "half of the MACs, 90 % zeros, grids, taught",
                "a sixteenth of the MACs, 50 % zeros, grids, taught",
            ],
            ["generator.up2"],
        ),
        "dcgan_wide": Model(
            "DCGAN of width 64",
            [
                "model=dcgan",
                "model.spectral_norm=true",
                "model.discriminator_width=16",
                "evaluate.metric=fid",
            ],
            FASHION,
            (1, 2),
            "fid",
            ["dense", "a sixteenth of the MACs, 70 % zeros, grids, taught"],
            [],
            ["generator.up2"],
        ),
        "recurrent_vae": Model(
            "recurrent VAE",
            ["model=recurrent_vae", "model.hidden=256"],
            ["data=fashion_rows"],
            (1, 3),
            "neg_elbo",
            ["dense", "half of the MACs, 65 % zeros, grids, taught"],
            [
                *COMMON,
                GRIDS,
                "half of the MACs, 70 % zeros, grids, taught",
                "a quarter of the MACs, 80 % zeros, grids, taught",
            ],
            ["*.weight_ih_l0", "encoder.mu", "encoder.logvar", "decoder.output"],
            10.0,
            EARLY,
        ),
        "wgan_gp": Model(
            "WGAN-GP",
            ["model=wgan_gp", *NARROW, "model.discriminator_width=8", "model.lr=2e-4"],
            FASHION,
            (1, 1),  # of five critic steps a batch
            "fid",
            ["dense", SIXTEENTH],
            [*COMMON, TORCH_PRUNING, GRIDS],
            ["generator.up2"],
        ),
        "wgan_gp_longer": Model(
            "longer WGAN-GP",
            ["model=wgan_gp", *NARROW, "model.lr=2e-4"],
            FASHION,
            (1, 2),  # twice the steps, and twice the critic's width
            "fid",
            ["dense", SIXTEENTH],
            ["post-training W8A8", "nncodec", GRIDS],
            ["generator.up2"],
        ),
    },
    "digits": {
        "vae": Model(
            "VAE of width 16",
            ["model=vae", "model.width=16", "model.lr=3e-3"],
            ["data=digits", "data.batch_size=32"],
            (3, 10),
            "neg_elbo",
            ["dense", GRIDS, "half of the MACs, 90 % zeros, grids, taught"],
            BRIEF,
            ENDS,
            1.0,
            VAE_CHANNELS,
        ),
        "dcgan": Model(
            "DCGAN of width 16",
            [
                "model=dcgan",
                "model.width=16",
                "model.discriminator_width=16",
                "model.spectral_norm=true",
                "model.lr=1e-3",
            ],
            ["data=digits", "data.batch_size=32"],
            (6, 20),
            "kid",
            ["dense", "half of the MACs, 90 % zeros, grids, taught"],
            BRIEF,
            ["generator.up2"],
        ),
        "recurrent_vae": Model(
            "recurrent VAE",
            ["model=recurrent_vae", "model.lr=3e-3"],
            ["data=digit_rows", "data.batch_size=32"],
            (3, 10),
            "neg_elbo",
            ["dense", GRIDS],
            BRIEF,
            [],
            1.0,
            EARLY,
        ),
    },
}


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
        if model.first:
            self._start([*model.overrides, *model.first]).model()
        self.start = self._start(model.overrides)
        self.kind = str(self.fresh().kind)

    def _start(self, overrides: Sequence[str]) -> Start:
        model = self.model
        start = {self.name: ([*overrides], model.epochs[0], [*model.spared])}
        return Start(self.name, self.seed, self.folder, start, data=model.data, images=True)

    def fresh(self) -> Any:
        """A copy of the dense start."""
        return self.start.model()

    def dense(self) -> Any:
        """The dense model after the steps that every row has, trained once."""
        weights, model = self.folder / "finished.pt", self.fresh()
        if not weights.exists():
            torch.save(self.fit(model).state_dict(), weights)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()

    def fit(self, model: Any, callbacks: Sequence[Callback] = ()) -> Any:
        """Trains a copy on, for the steps that every row has."""
        torch.manual_seed(self.seed)
        self.start.fit(model, [*callbacks, Annealing()], epochs=self.model.epochs[1], steps=None)
        return model.cpu().eval()
