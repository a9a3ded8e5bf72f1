"""Sentences of the report: the headline and the verdict, each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.report.formats import (
    number,
    scalar,
    times,
)

__all__ = [
    "Metric",
    "Verdict",
    "headline",
    "judge",
    "metric",
    "model_name",
    "reference",
    "size_ratio",
]

Results = Mapping[str, Any]

# Names as the field writes them; any other model is shown as configured.
MODEL_NAMES = {
    "dcgan": "DCGAN",
    "wgan_gp": "WGAN-GP",
    "vae": "VAE",
    "recurrent_vae": "Recurrent VAE",
    "simple_net": "SimpleNet",
    "resnet18": "ResNet-18",
}
STATE_WORDS = {"within": "Within", "outside": "Not within", "unknown": "Not judged"}


@dataclass(frozen=True)
class Metric:
    """How a quality metric is shown: its label, and "lower", "higher" or "" as the better one."""

    label: str
    better: str

    @property
    def arrow(self) -> str:
        """The direction of improvement as an arrow, empty when unknown."""
        return {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}.get(self.better, "")


@dataclass(frozen=True)
class Verdict:
    """Whether the compressed model holds the dense twin's quality.

    Attributes:
        state: "within", "outside" or "unknown".
        clause: the short form for the headline.
        sentence: the long form with all numbers.
    """

    state: str
    clause: str
    sentence: str

    @property
    def word(self) -> str:
        """The state in words, so that colour is never the only sign."""
        return STATE_WORDS[self.state]


def section(results: Results, key: str) -> Mapping[str, Any]:
    """Return an optional section; an empty mapping where it is missing or null."""
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def model_name(results: Results) -> str:
    """Return the model as the field writes it."""
    model = str(results["model"])
    return MODEL_NAMES.get(model, model)


def metric(results: Results, key: str) -> Metric:
    """Return label and direction of a metric, from `metric_info` or else from the verdict."""
    info = section(section(results, "metric_info"), key)
    better = str(info.get("better") or "")
    verdict = section(results, "verdict")
    if not better and verdict.get("metric") == key and verdict.get("higher_is_better") is not None:
        better = "higher" if verdict["higher_is_better"] else "lower"
    return Metric(str(info.get("label") or key), better if better in ("lower", "higher") else "")


def size_ratio(results: Results) -> float | None:
    """Return dense torch bytes / `.lcz` bytes: as stored, or computed where it is not."""
    stored = scalar(results.get("ratio"))
    dense = scalar(section(results["dense"], "bytes").get("torch"))
    compressed = scalar(section(results["compressed"], "bytes").get("lcz"))
    return stored if stored is not None else dense / compressed if dense and compressed else None


def judge(results: Results) -> Verdict:
    """Put the verdict of `results.json` into words; it is never decided anew here."""
    verdict = section(results, "verdict")
    if not verdict:
        text = "quality not judged: results.json holds no verdict"
        return Verdict("unknown", text, f"{text[0].upper()}{text[1:]}.")
    states = {True: "within", False: "outside"}
    within = verdict.get("within")
    state = states[within] if isinstance(within, bool) else "unknown"
    clause = {
        "within": f"quality within {_limit(results, verdict)}",
        "outside": f"quality not within the allowed difference ({_change(results, verdict)})",
        "unknown": "quality not judged",
    }[state]
    return Verdict(state, clause, _sentence(results, verdict))


def reference(verdict: Mapping[str, Any]) -> float | None:
    """Return what the compressed value is held against: the dense mean over seeds, if known."""
    mean = scalar(verdict.get("dense_mean"))
    return mean if mean is not None else scalar(verdict.get("dense"))


def _limit(results: Results, verdict: Mapping[str, Any]) -> str:
    if section(results, "baseline_spread").get(str(verdict.get("metric"))):
        return "the dense twin's seed spread"
    if scalar(verdict.get("allowed_two_percent")) is not None:
        return "2 % of the dense twin (one seed)"
    return "the allowed difference"


def _change(results: Results, verdict: Mapping[str, Any]) -> str:
    """Return "label worse by x" or "better by x", from the two values themselves."""
    shown = metric(results, str(verdict.get("metric")))
    dense, compressed = reference(verdict), scalar(verdict.get("compressed"))
    if dense is None or compressed is None:
        return f"{shown.label}: difference unknown"
    loss = (dense - compressed) if shown.better == "higher" else (compressed - dense)
    if loss == 0:
        return f"{shown.label} equal"
    if math.isnan(loss) or not shown.better:
        return f"{shown.label} {number(dense)} to {number(compressed)}"
    return f"{shown.label} {'worse' if loss > 0 else 'better'} by {number(abs(loss), 3)}"


def _sentence(results: Results, verdict: Mapping[str, Any]) -> str:
    """Return both values, their difference, and both limits of which the smaller one counts."""
    shown = metric(results, str(verdict.get("metric")))
    mean = scalar(verdict.get("dense_mean"))
    dense = number(scalar(verdict.get("dense")))
    if mean is not None and mean != scalar(verdict.get("dense")):
        dense += f" (mean over seeds {number(mean)})"
    allowed, spread, share = (
        scalar(verdict.get(key)) for key in ("allowed", "allowed_spread", "allowed_two_percent")
    )
    limits = [f"seed spread {number(spread, 3)}"] if spread is not None else []
    limits += [f"2\N{NO-BREAK SPACE}% = {number(share, 3)}"] if share is not None else []
    what = " as the smaller of " if len(limits) > 1 else ": "
    limit = "no allowed difference is given"
    if allowed is not None:
        limit = f"{number(allowed, 3)} is allowed" + (what + " and ".join(limits) if limits else "")
    return (
        f"{shown.label}: {dense} dense, {number(scalar(verdict.get('compressed')))} compressed; "
        f"{_change(results, verdict).removeprefix(shown.label).lstrip(': ')}, {limit}."
    )


def headline(results: Results) -> str:
    """Return the one sentence that sums the run up.

    >>> results = {"model": "vae", "data": "digits", "ratio": 31.2, "dense": {}, "compressed": {}}
    >>> headline(results)
    'VAE on digits: 31.2× smaller, quality not judged: results.json holds no verdict'
    """
    ratio = size_ratio(results)
    if ratio is None or not ratio > 0:
        size = "size ratio unknown"
    else:
        size = f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"
    return f"{model_name(results)} on {results['data']}: {size}, {judge(results).clause}"
