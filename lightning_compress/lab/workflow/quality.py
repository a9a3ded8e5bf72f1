"""Quality of a model on a data set: fidelity of generators, likelihood of VAEs, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.features import (
    FeatureExtractor,
    inception_extractor,
    trained_feature_network,
)
from lightning_compress.lab.evaluation.fidelity import fidelity, noise_floor
from lightning_compress.lab.evaluation.likelihood import accuracy, likelihood
from lightning_compress.lab.evaluation.shipped_features import shipped_extractor
from lightning_compress.lab.evaluation.verdict import Verdict, irreducible_nats, verdict
from lightning_compress.modes import evaluating
from lightning_compress.quantization.fake_quantize import fake_quantized

__all__ = ["METRICS", "Evaluator", "Metric", "spread_of"]

SAMPLE_SEED = 12_345  # of the latents that are drawn for measurement
MONITOR_SAMPLES = 500
DATA_OF = {"fashion_rows": "fashion_mnist", "digit_rows": "digits"}  # images read row by row


@dataclass(frozen=True)
class Metric:
    """Label of a metric in print, and its better direction."""

    label: str
    better: str


METRICS = {
    "neg_elbo": Metric("−ELBO (nats)", "lower"),
    "neg_iwae": Metric("−IWAE bound (nats)", "lower"),
    "reconstruction": Metric("reconstruction (nats)", "lower"),
    "kl": Metric("KL (nats)", "neither"),
    "latent_dim": Metric("latent units", "neither"),
    "active_units": Metric("active latent units", "higher"),
    "nats_per_step": Metric("nats per step", "lower"),
    "perplexity": Metric("perplexity", "lower"),
    "fid": Metric("Fréchet distance", "lower"),
    "kid": Metric("kernel distance", "lower"),
    "kid_std": Metric("its spread over subsets", "neither"),
    "precision": Metric("precision", "higher"),
    "recall": Metric("recall", "higher"),
    "samples": Metric("images drawn", "neither"),
    "accuracy": Metric("accuracy", "higher"),
    "cross_entropy": Metric("cross-entropy (nats)", "lower"),
}
_DEFAULT_METRIC = {
    "gan": "kid",
    "vae": "neg_elbo",
    "recurrent_vae": "neg_elbo",
    "classifier": "accuracy",
}


@dataclass
class Evaluator:
    """Measures models of one data set, all with the same rows, latents and feature network.

    Args:
        settings: the `evaluate` config.
        data: the data, set up.
        kind: of the models, such as "vae".
        name: of the data, such as "digits".
    """

    settings: DictConfig
    data: SplitDataModule
    kind: str
    name: str
    notes: list[str] = field(default_factory=list)
    extractor: FeatureExtractor | None = None
    _floor: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.metric = self.settings.metric or _DEFAULT_METRIC[self.kind]
        if self.metric not in METRICS:
            raise ValueError(f"evaluate.metric={self.metric!r}: valid are {sorted(METRICS)}")
        if self.kind != "classifier" and self.data.kind != "tokens":
            self.extractor = self._feature_network()

    def _feature_network(self) -> FeatureExtractor | None:
        if self.settings.feature == "inception":
            return inception_extractor()
        if self.settings.feature != "own":
            raise ValueError(
                f"evaluate.feature={self.settings.feature!r}: valid are ['inception', 'own']"
            )
        if not self.data.labelled:
            self.notes.append(
                "The data have no labels, so no feature network of their own could be trained: "
                "no Fréchet or kernel distance (evaluate.feature=inception would give them)."
            )
            return None
        test = _images(*rows(self.data.test_dataset))
        if (shipped := shipped_extractor(DATA_OF.get(self.name, self.name), test[0])) is not None:
            return shipped
        return trained_feature_network(
            _images(*rows(self.data.train_dataset)),
            test,
            num_classes=self.data.dims["num_classes"],
            cache_dir=Path(self.settings.cache_dir),
            fingerprint=f"{self.name}:{self.data.fingerprint}",
            progress=print,
        )

    def quality(self, model: Any) -> dict[str, float]:
        """All metrics that apply to a model, on the test split.

        A model with activation grids computes with quantized activations, as an integer engine
        does.
        """
        with fake_quantized(model):
            return self._quality(model)

    def _quality(self, model: Any) -> dict[str, float]:
        x, y = rows(self.data.test_dataset)
        found: dict[str, float] = {}
        if self.kind == "classifier":
            return accuracy(model, x, y)
        if self.kind in ("vae", "recurrent_vae"):
            found |= likelihood(model, x, importance_samples=self.settings.importance_samples)
        if self.extractor is not None:
            count = self.settings.samples or len(x)
            found |= fidelity(generate(model, count), _images(x, y)[0], self.extractor.module)
        return found

    def monitor(self, model: Any) -> dict[str, float]:
        """A quick kernel distance on the validation split, for the curve over time."""
        if self.extractor is None:
            return {}
        x, y = rows(self.data.val_dataset)
        real = _images(x, y)[0][:MONITOR_SAMPLES]
        made = generate(model, min(len(real), MONITOR_SAMPLES))
        return {"val/kid": fidelity(made, real, self.extractor.module)["kid"]}

    def describe(self) -> dict[str, Any]:
        """The extractor, the sample count and the floor, which belong beside each number."""
        if self.extractor is None:
            return {"feature": None, "notes": self.notes}
        x, _ = rows(self.data.test_dataset)
        return {
            "feature": self.extractor.name,
            "feature_accuracy": self.extractor.test_accuracy,
            "samples": self.settings.samples or len(x),
            "floor": self.floor(),
            "notes": self.notes,
        }

    def floor(self) -> dict[str, float]:
        """The distances between two disjoint halves of real test images; empty without features."""
        if self.extractor is None:
            return {}
        if self._floor is None:
            x, y = rows(self.data.test_dataset)
            self._floor = noise_floor(_images(x, y)[0], self.extractor.module)
        return self._floor

    def irreducible(self, model: Any) -> dict[str, float]:
        """The least value of each metric in nats that any model of its likelihood can have."""
        likelihood = getattr(model, "likelihood", None)
        if likelihood is None:
            return {}
        x, _ = rows(self.data.test_dataset)
        least = irreducible_nats(x, likelihood, std=getattr(model, "observation_std", 1.0))
        found: dict[str, float] = dict.fromkeys(("neg_elbo", "neg_iwae", "reconstruction"), least)
        if hasattr(model, "steps_per_example"):
            found["nats_per_step"] = least / float(model.steps_per_example(x).float().mean())
        return found | ({"perplexity": 1.0} if likelihood == "categorical" else {})

    def verdict(
        self,
        model: Any,
        dense: Sequence[dict[str, float]],
        compressed: Sequence[dict[str, float]],
    ) -> Verdict:
        """The verdict on the metric; dense models beyond the compressed ones' number add spread.

        Args:
            model: a dense one, whose likelihood says what is irreducible.
            dense: metrics of the dense models; those of the compressed models' seeds first.
            compressed: metrics of the compressed models.
        """
        pairs = len(compressed)
        return verdict(
            self.metric,
            dense[:pairs],
            compressed,
            higher=METRICS[self.metric].better == "higher",
            irreducible=self.irreducible(model).get(self.metric, 0.0),
            floor=self.floor().get(self.metric, 0.0),
            more_dense=dense[pairs:],
        )


def rows(dataset: Any) -> tuple[Tensor, Tensor]:
    """All rows of a split at once, as `(x, y)`."""
    if hasattr(dataset, "tensors"):
        return dataset.tensors
    pairs = [dataset[index] for index in range(len(dataset))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def generate(model: Any, count: int, *, batch_size: int = 500) -> Tensor:
    """Images (N, C, H, W) in [0, 1] on the CPU, from latents that depend on nothing but N."""
    latents = model.latents(count, seed=SAMPLE_SEED)
    with evaluating(model):
        return torch.cat([model.images(z).float().cpu() for z in latents.split(batch_size)])


def spread_of(qualities: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and range of each metric over seeds; empty for a single one.

    >>> spread_of([{"kid": 1.0}, {"kid": 3.0}])["kid"]["mean"]
    2.0
    """
    if len(qualities) < 2:
        return {}
    found = {}
    for name in qualities[0]:
        values = [quality[name] for quality in qualities]
        found[name] = {
            "mean": mean(values),
            "std": stdev(values),
            "n": len(values),
            "min": min(values),
            "max": max(values),
        }
    return found


def _images(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as images: sequences (N, T, F) become (N, 1, T, F)."""
    return (x.unsqueeze(1) if x.dim() == 3 else x), y
