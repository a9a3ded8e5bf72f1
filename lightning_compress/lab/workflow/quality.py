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
from lightning_compress.lab.evaluation.given_features import given_extractor
from lightning_compress.lab.evaluation.likelihood import accuracy, likelihood
from lightning_compress.lab.evaluation.reconstruction import code_usage, perceptual_distance
from lightning_compress.lab.evaluation.self_supervised import self_supervised_network
from lightning_compress.lab.evaluation.shipped_features import shipped_extractor
from lightning_compress.lab.evaluation.verdict import Verdict, irreducible_nats, verdict
from lightning_compress.modes import evaluating
from lightning_compress.quantization.fake_quantize import fake_quantized

__all__ = ["METRICS", "Evaluator", "Metric", "irreducible_of", "spread_of"]

SAMPLE_SEED = 12_345  # of the latents that are drawn for measurement
MONITOR_SAMPLES = 500
LEAST_COMPARED = 4  # precision and recall look at the third neighbour
LEAST_UNLABELLED = 16  # halves and subsets of the test split are compared too
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
    "mel_distance": Metric("log-mel distance", "lower"),
    "stft_distance": Metric("multi-resolution STFT distance", "lower"),
    "l1": Metric("mean absolute difference", "lower"),
    "ssim": Metric("structural similarity", "higher"),
    "psnr": Metric("PSNR (dB)", "higher"),
    "perceptual": Metric("perceptual distance (LPIPS-like)", "lower"),
    "code_perplexity": Metric("perplexity of the codebook", "higher"),
    "codes_used": Metric("share of codes used", "higher"),
    "accuracy": Metric("accuracy", "higher"),
    "cross_entropy": Metric("cross-entropy (nats)", "lower"),
}
_VAES = ("vae", "recurrent_vae")
_KINDS = {  # of models that a metric can be measured on, where that is not all
    **dict.fromkeys(("accuracy", "cross_entropy"), ("classifier",)),
    **dict.fromkeys(("neg_elbo", "neg_iwae", "active_units"), _VAES),
    **dict.fromkeys(("l1", "ssim", "psnr", "perceptual"), ("conditional",)),
    **dict.fromkeys(("mel_distance", "stft_distance"), ("conditional",)),
    **dict.fromkeys(("fid", "kid", "precision", "recall"), ("gan", "flow", "conditional", *_VAES)),
}
_DEFAULT_METRIC = {
    "gan": "kid",
    "flow": "kid",
    "vae": "neg_elbo",
    "recurrent_vae": "neg_elbo",
    "classifier": "accuracy",
    "conditional": "fid",
}


@dataclass
class Evaluator:
    """Measures models of one data set, all with the same rows, latents and feature network.

    Args:
        settings: the `evaluate` config.
        data: the data, set up.
        kind: of the models, such as "vae".
        name: of the data, such as "digits".
        own_metric: that judges a loss of quality unless the settings name one; None: the usual
            one of the kind.
    """

    settings: DictConfig
    data: SplitDataModule
    kind: str
    name: str
    notes: list[str] = field(default_factory=list)
    extractor: FeatureExtractor | None = None
    own_metric: str | None = None
    _floor: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for key, least in (("latency_repeats", 1), ("monitor_every", 1), ("samples", 2)):
            value = self.settings.get(key)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"evaluate.{key}={value!r}: expected an integer from {least} on")
        usual = self.own_metric or _DEFAULT_METRIC[self.kind]
        self.metric = self.settings.metric or usual
        if self.metric not in METRICS:
            raise ValueError(f"evaluate.metric={self.metric!r}: valid are {sorted(METRICS)}")
        if self.kind not in _KINDS.get(self.metric, (self.kind,)):
            kinds = [one for one in METRICS if self.kind in _KINDS.get(one, (self.kind,))]
            raise ValueError(
                f"evaluate.metric={self.metric!r} is not measured on a model of kind "
                f"{self.kind!r}: valid are {kinds}"
            )
        if self.kind != "classifier" and self.data.kind != "tokens":
            self.extractor = self._feature_network()

    def _feature_network(self) -> FeatureExtractor | None:
        if self.settings.feature == "inception":
            return inception_extractor()
        if self.settings.feature != "own":
            sample = self._images(self.data.test_dataset)[0][:2]
            layer = self.settings.get("feature_layer")
            return given_extractor(self.settings.feature, sample, layer=layer)
        if not self.data.labelled:
            return self._self_supervised()
        test = self._images(self.data.test_dataset)
        if (shipped := shipped_extractor(DATA_OF.get(self.name, self.name), test[0])) is not None:
            return shipped
        return trained_feature_network(
            self._images(self.data.train_dataset),
            test,
            num_classes=self.data.dims["num_classes"],
            cache_dir=Path(self.settings.cache_dir),
            fingerprint=f"{self.name}:{self.data.fingerprint}",
            progress=print,
        )

    def _self_supervised(self) -> FeatureExtractor | None:
        """The data's own network without labels; none where there is too little to compare."""
        examples = len(rows(self.data.test_dataset)[0])
        if examples < LEAST_UNLABELLED:
            self.notes.append(
                f"The data have no labels, and {examples} test examples are too few for a Fréchet "
                f"or kernel distance in self-supervised features: {LEAST_UNLABELLED} are needed."
            )
            return None
        test, _ = self._images(self.data.test_dataset)
        train, _ = self._images(self.data.train_dataset)
        found = self_supervised_network(
            train,
            test,
            task=self.data.pretext,
            cache_dir=Path(self.settings.cache_dir),
            fingerprint=f"{self.name}:{self.data.fingerprint}",
            progress=print,
        )
        self.notes.append(
            "The data have no labels: the feature network learned to predict the "
            f"{found.task}, which it tells on {found.test_accuracy:.1%} of the test examples."
        )
        return found

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
        made, real = self._generated(model, x, self.settings.samples or len(x)), self._real(x, y)
        if self.kind == "conditional":
            found |= model.distances(made, real) | code_usage(model, x)
        if self.extractor is not None:
            images = self.data.as_images(made), self.data.as_images(real)
            found |= fidelity(*images, self.extractor.module)
            if self.kind == "conditional":
                found["perceptual"] = perceptual_distance(*images, self.extractor.module)
        return found

    def _real(self, x: Tensor, y: Tensor) -> Tensor:
        """The real samples among rows: of paired data the targets, of others the rows."""
        return y if self.data.paired else x

    def _generated(self, model: Any, x: Tensor, count: int) -> Tensor:
        """From all conditions x, or from so many latents; nothing where nothing would read it."""
        if self.kind == "conditional":
            return outputs(model, x)
        return x[:0] if self.extractor is None else generate(model, count)

    def shown(self, model: Any, count: int) -> Tensor:
        """Samples to look at or listen to: of equal latents, or of the first test conditions."""
        if self.kind == "conditional":
            return outputs(model, rows(self.data.test_dataset)[0][:count])
        return generate(model, count)

    def given(self, count: int) -> dict[str, Tensor]:
        """Of a conditional model: what the first samples should be; of pairs also what from."""
        if self.kind != "conditional":
            return {}
        x, y = (part[:count] for part in rows(self.data.test_dataset))
        real = {"real": self._real(x, y)}
        return real | {"condition": x} if self.data.kind == "image_pairs" else real

    def monitor(self, model: Any) -> dict[str, float]:
        """A quick kernel distance on the validation split, for the curve over time.

        Of a conditional model its distances to the targets too.
        """
        x, y = (part[:MONITOR_SAMPLES] for part in rows(self.data.val_dataset))
        made, real = self._generated(model, x, len(x)), self._real(x, y)
        found: dict[str, float] = {}
        if self.kind == "conditional":
            found |= {f"val/{name}": value for name, value in model.distances(made, real).items()}
        if self.extractor is not None and len(x) >= LEAST_COMPARED:
            images = self.data.as_images(made), self.data.as_images(real)
            found["val/kid"] = fidelity(*images, self.extractor.module)["kid"]
        return found

    def _images(self, split: Any) -> tuple[Tensor, Tensor]:
        """The real images of a split, which generated ones are compared with, and its labels."""
        x, y = rows(split)
        return self.data.as_images(self._real(x, y)), y

    def describe(self) -> dict[str, Any]:
        """The extractor, the sample count and the floor, which belong beside each number."""
        if self.extractor is None:
            return {"feature": None, "notes": self.notes}
        x, _ = rows(self.data.test_dataset)
        return {
            "feature": self.extractor.name,
            "feature_accuracy": self.extractor.test_accuracy,
            "feature_task": self.extractor.task,
            "samples": len(x) if self.kind == "conditional" else self.settings.samples or len(x),
            "floor": self.floor(),
            "notes": self.notes,
        }

    def floor(self) -> dict[str, float]:
        """The distances between two disjoint halves of real test images; empty without features."""
        if self.extractor is None:
            return {}
        if self._floor is None:
            real, _ = self._images(self.data.test_dataset)
            self._floor = noise_floor(real, self.extractor.module)
        return self._floor

    def irreducible(self, model: Any) -> dict[str, float]:
        """The least value of each metric in nats that any model of its likelihood can have."""
        x, _ = rows(self.data.test_dataset)
        if (least := irreducible_of(model, x)) is None:
            return {}
        found: dict[str, float] = dict.fromkeys(("neg_elbo", "neg_iwae", "reconstruction"), least)
        if hasattr(model, "steps_per_example"):
            found["nats_per_step"] = least / float(model.steps_per_example(x).float().mean())
        return found | ({"perplexity": 1.0} if model.likelihood == "categorical" else {})

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
    return torch.stack([x for x, _ in pairs]), torch.stack([torch.as_tensor(y) for _, y in pairs])


def generate(model: Any, count: int, *, batch_size: int = 500) -> Tensor:
    """Images (N, C, H, W) in [0, 1] on the CPU, from latents that depend on nothing but N."""
    latents = model.latents(count, seed=SAMPLE_SEED)
    with evaluating(model):
        return torch.cat([model.images(z).float().cpu() for z in latents.split(batch_size)])


def outputs(model: Any, conditions: Tensor, *, batch_size: int = 64) -> Tensor:
    """What a conditional model generates from conditions (N, ...), on the CPU."""
    with evaluating(model):
        parts = conditions.split(batch_size)
        return torch.cat([model.outputs(x.to(model.device)).float().cpu() for x in parts])


def irreducible_of(model: Any, x: Tensor) -> float | None:
    """-log p of examples that no model of the model's likelihood can better, nats an example.

    None for a model without a likelihood.
    """
    if (kind := getattr(model, "likelihood", None)) is None:
        return None
    return irreducible_nats(x, kind, std=getattr(model, "observation_std", 1.0))


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
