"""Quality of a model on a data set: fidelity of generators, likelihood of VAEs, accuracy."""

from __future__ import annotations

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
from lightning_compress.modes import evaluating
from lightning_compress.quantization.fake_quantize import fake_quantized

__all__ = ["METRICS", "Evaluator", "Metric", "judge", "spread_of"]

SAMPLE_SEED = 12_345  # of the latents that are drawn for measurement
MONITOR_SAMPLES = 500


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
        return trained_feature_network(
            _images(*rows(self.data.train_dataset)),
            _images(*rows(self.data.test_dataset)),
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
        x, y = rows(self.data.test_dataset)
        return {
            "feature": self.extractor.name,
            "feature_accuracy": self.extractor.test_accuracy,
            "samples": self.settings.samples or len(x),
            "floor": noise_floor(_images(x, y)[0], self.extractor.module),
            "notes": self.notes,
        }


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


def judge(
    metric: str,
    dense: dict[str, float],
    compressed: dict[str, float],
    spread: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Whether quality was lost: more than the dense seeds' standard deviation, or 2 %.

    The smaller of the two counts; with one dense seed there is no spread, and 2 % counts alone.

    >>> judge("kid", {"kid": 1.0}, {"kid": 1.01}, {})["within"]
    True
    """
    if metric not in dense or metric not in compressed:
        raise ValueError(f"evaluate.metric={metric!r} was not measured: valid are {sorted(dense)}")
    higher = METRICS[metric].better == "higher"
    reference = spread[metric]["mean"] if metric in spread else dense[metric]
    loss = (reference - compressed[metric]) if higher else (compressed[metric] - reference)
    two_percent = 0.02 * abs(reference)
    allowed = min(two_percent, spread[metric]["std"]) if metric in spread else two_percent
    return {
        "metric": metric,
        "dense": dense[metric],
        "dense_mean": reference,
        "compressed": compressed[metric],
        "difference": loss,
        "allowed": allowed,
        "allowed_spread": spread[metric]["std"] if metric in spread else None,
        "allowed_two_percent": two_percent,
        "within": loss <= allowed,
        "higher_is_better": higher,
    }


def _images(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as images: sequences (N, T, F) become (N, 1, T, F)."""
    return (x.unsqueeze(1) if x.dim() == 3 else x), y
