"""The verdict: whether a compressed model holds the dense baseline's quality, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats
from torch import Tensor

__all__ = [
    "CONFIDENCE",
    "ESTABLISHED",
    "NOT_ESTABLISHED",
    "PAIRS",
    "WORSE",
    "Margin",
    "Paired",
    "Verdict",
    "baseline_faults",
    "irreducible_nats",
    "margin_of",
    "paired",
    "verdict",
]

ESTABLISHED, NOT_ESTABLISHED, WORSE = "established", "not established", "worse"
PAIRS = 5  # the fewest with which anything is established
CONFIDENCE = 0.95  # of each one-sided bound
OF_NATS, OF_DISTANCE, OF_OTHERS = 0.02, 0.05, 0.02
NATS = ("neg_elbo", "neg_iwae", "reconstruction", "nats_per_step", "perplexity")
DISTANCES = ("fid", "kid")
# a fall of one is told with the verdict
BESIDE = ("kl", "active_units", "code_perplexity", "precision", "recall")
LEAST_KL = 1.0  # nats; a posterior with less has collapsed
LEAST_RECALL = 0.05  # of the real images; a generator that covers fewer has collapsed
PAIRED = {"l1", "psnr", "mel_distance"}  # what each output is compared with its target by

Quality = Mapping[str, float]


@dataclass(frozen=True)
class Paired:
    """Differences of pairs: their mean and the one-sided bounds of a paired t test.

    Attributes:
        mean: of the differences.
        standard_deviation: of the differences; None of a single pair.
        standard_error: of the mean; None of a single pair.
        lower: one-sided 95 % bound; None of a single pair.
        upper: one-sided 95 % bound; None of a single pair.
        n: number of pairs.
    """

    mean: float
    standard_deviation: float | None
    standard_error: float | None
    lower: float | None
    upper: float | None
    n: int


def paired(differences: Sequence[float]) -> Paired:
    """Mean, standard error and one-sided 95 % bounds of paired differences (Student 1908).

    Raises:
        ValueError: without a difference.

    >>> found = paired([1.0, 2.0, 3.0])
    >>> found.mean, round(found.lower, 3), round(found.upper, 3)
    (2.0, 0.314, 3.686)
    """
    n = len(differences)
    if n == 0:
        raise ValueError("differences=[]: a verdict needs one pair or more")
    if n == 1 or not all(map(math.isfinite, differences)):
        return Paired(math.fsum(differences) / n, None, None, None, None, n)
    middle, deviation = mean(differences), stdev(differences)
    error = deviation / math.sqrt(n)
    reach = float(stats.t.ppf(CONFIDENCE, n - 1)) * error
    return Paired(middle, deviation, error, middle - reach, middle + reach, n)


@dataclass(frozen=True)
class Margin:
    """How much worse the compressed model may be, fixed before any of them is measured.

    Attributes:
        value: in the metric's unit.
        rule: in words.
    """

    value: float
    rule: str


def margin_of(
    metric: str, dense_mean: float, *, irreducible: float = 0.0, floor: float = 0.0
) -> Margin:
    """The margin of a metric.

    2 % of the reducible part of a bound in nats (of the dense mean less what no model can remove);
    5 % of the dense mean plus the noise floor of a Fréchet or kernel distance; 2 % of the dense
    mean of every other metric (accuracy, cross-entropy, precision, recall).

    Args:
        metric: its key, such as "neg_elbo".
        dense_mean: mean of the dense baseline over seeds.
        irreducible: the least value that any model can have, see `irreducible_nats`.
        floor: the distance between two disjoint halves of real data; a negative one counts as 0.

    >>> round(margin_of("neg_elbo", 239.86, irreducible=189.86).value, 6)
    1.0
    >>> round(margin_of("fid", 10.0, floor=0.1).value, 6)
    0.6
    """
    if metric in NATS:
        part = max(0.0, dense_mean - irreducible)
        rule = "2 % of the reducible part" if irreducible else "2 % of the dense mean"
        return Margin(OF_NATS * part, rule)
    if metric in DISTANCES:
        value = OF_DISTANCE * abs(dense_mean) + max(0.0, floor)
        return Margin(value, "5 % of the dense mean plus the noise floor")
    return Margin(OF_OTHERS * abs(dense_mean), "2 % of the dense mean")


def irreducible_nats(x: Tensor, likelihood: str, *, std: float = 1.0) -> float:
    """The least -log p(x | z) that any decoder can reach, in nats an example of x (N, ...).

    On grey pixels a Bernoulli likelihood costs at least the pixels' own entropy; a Gaussian one
    with a fixed standard deviation at least its normalization; a categorical one nothing.

    Args:
        x: the test examples, in [0, 1] for Bernoulli.
        likelihood: "bernoulli", "gaussian" or "categorical".
        std: standard deviation of the Gaussian likelihood.

    Raises:
        ValueError: for another likelihood.

    >>> round(irreducible_nats(torch.full((3, 1, 2, 2), 0.5), "bernoulli"), 4)  # 4 ln 2
    2.7726
    """
    if likelihood == "categorical":
        return 0.0
    if likelihood == "gaussian":
        return x[0].numel() * (math.log(std) + 0.5 * math.log(2 * math.pi))
    if likelihood != "bernoulli":
        valid = ["bernoulli", "categorical", "gaussian"]
        raise ValueError(f"likelihood={likelihood!r}: valid are {valid}")
    total = 0.0
    for rows in x.split(1000):
        p = rows.double()
        total -= float((torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum())
    return total / len(x)


def baseline_faults(quality: Quality) -> list[str]:
    """What is wrong with a dense baseline: diverged, or collapsed; empty for a healthy one.

    A posterior has collapsed with a KL below 1 nat or without an active unit (Bowman et al. 2016,
    arXiv:1511.06349), a generator that draws from noise with a recall below 5 % of the real images.

    >>> baseline_faults({"neg_elbo": 20.0, "kl": 0.006, "active_units": 0})
    ['posterior collapsed: KL 0.006 nats, 0 active units']
    """
    faults = [
        f"diverged: {name} is {value}" for name, value in quality.items() if not _finite(value)
    ]
    kl, units = quality.get("kl"), quality.get("active_units")
    if kl is not None and (kl < LEAST_KL or units == 0):
        active = "" if units is None else f", {units:.0f} active units"
        faults.append(f"posterior collapsed: KL {kl:.3g} nats{active}")
    recall = quality.get("recall")
    drawn = kl is None and not quality.keys() & PAIRED  # others' images are blurred, not few
    if recall is not None and drawn and recall < LEAST_RECALL:
        faults.append(f"modes collapsed: recall {recall:.3g}")
    return faults


@dataclass(frozen=True)
class Verdict:
    """A verdict with all that it was reached from.

    Attributes:
        metric: its key.
        word: "established", "not established" or "worse"; of no loss.
        difference: mean over pairs of how much worse the compressed model is; negative: better.
        standard_deviation: of the differences over pairs.
        standard_error: of their mean.
        lower: one-sided 95 % bound of the difference.
        upper: one-sided 95 % bound of the difference.
        n: pairs.
        margin: the most that counts as no loss.
        margin_rule: how it was fixed.
        dense: the first pair's dense value.
        dense_mean: of all dense seeds.
        compressed: the first pair's compressed value.
        compressed_mean: over pairs.
        irreducible: of the metric; 0 where nothing is known to be.
        floor: the noise floor, of a distance.
        share: the difference as a part of what a model can influence; None without such a part.
        within: whether the mean difference is within the margin, whatever its noise.
        higher_is_better: whether it is.
        falls: what fell beyond its spread: mean fall, and the dense standard deviation or None.
        dense_faults: what is wrong with the dense baseline, a line a fault.
    """

    metric: str
    word: str
    difference: float
    standard_deviation: float | None
    standard_error: float | None
    lower: float | None
    upper: float | None
    n: int
    margin: float
    margin_rule: str
    dense: float
    dense_mean: float
    compressed: float
    compressed_mean: float
    irreducible: float
    floor: float
    share: float | None
    within: bool
    higher_is_better: bool
    falls: dict[str, dict[str, float | None]] = field(default_factory=dict)
    dense_faults: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As `results.json` holds it; `allowed` is the margin, for readers of older runs."""
        return asdict(self) | {"allowed": self.margin}


def verdict(
    metric: str,
    dense: Sequence[Quality],
    compressed: Sequence[Quality],
    *,
    higher: bool = False,
    irreducible: float = 0.0,
    floor: float = 0.0,
    more_dense: Sequence[Quality] = (),
) -> Verdict:
    """Whether no quality was lost, from pairs of a dense and a compressed model of one seed.

    *Established*: the one-sided 95 % upper bound of the difference (paired t) is within the
    margin; *worse*: the lower bound is above it; else *not established*. With fewer than five pairs
    or a dense baseline that diverged or collapsed, nothing is established.

    Args:
        metric: its key.
        dense: metrics of the dense models, a seed each.
        compressed: metrics of the compressed models of the same seeds, in the same order.
        higher: whether a higher value is better.
        irreducible: see `margin_of`.
        floor: see `margin_of`.
        more_dense: dense models of further seeds without a pair: for mean and spread alone.

    Raises:
        ValueError: for a metric that was not measured, or sides that differ in length.

    >>> dense = [{"fid": 10.0 + seed} for seed in range(5)]
    >>> verdict("fid", dense, [{"fid": 10.1 + seed} for seed in range(5)]).word
    'established'
    """
    if len(dense) != len(compressed):
        raise ValueError(f"{len(dense)} dense and {len(compressed)} compressed models: not pairs")
    every = [*dense, *more_dense]
    for quality in (*every, *compressed):
        if metric not in quality:
            valid = sorted(quality)
            raise ValueError(f"evaluate.metric={metric!r} was not measured: valid are {valid}")
    sign = -1.0 if higher else 1.0
    pairs = list(zip(dense, compressed, strict=True))
    found = paired([sign * (after[metric] - before[metric]) for before, after in pairs])
    dense_mean = _mean([quality[metric] for quality in every])
    margin = margin_of(metric, dense_mean, irreducible=irreducible, floor=floor)
    faults = _faults(every)
    reducible = dense_mean - irreducible if metric in NATS else 0.0
    return Verdict(
        metric=metric,
        word=_word(found, margin.value, broken=bool(faults), lost=_lost(metric, pairs)),
        difference=found.mean,
        standard_deviation=found.standard_deviation,
        standard_error=found.standard_error,
        lower=found.lower,
        upper=found.upper,
        n=found.n,
        margin=margin.value,
        margin_rule=margin.rule,
        dense=dense[0][metric],
        dense_mean=dense_mean,
        compressed=compressed[0][metric],
        compressed_mean=_mean([quality[metric] for quality in compressed]),
        irreducible=irreducible,
        floor=floor,
        share=found.mean / reducible if reducible > 0 else None,
        within=found.mean <= margin.value,
        higher_is_better=higher,
        falls=_falls(pairs, every, metric),
        dense_faults=faults,
    )


def _faults(every: Sequence[Quality]) -> list[str]:
    """A line for each kind of fault: the first seed's, and how many have it."""
    kinds: dict[str, list[str]] = {}
    for quality in every:
        for kind, fault in {one.partition(":")[0]: one for one in baseline_faults(quality)}.items():
            kinds.setdefault(kind, []).append(fault)
    seeds = f" of {len(every)} dense seeds)"
    return [
        some[0] + (f" ({len(some)}{seeds}" if len(every) > 1 else "") for some in kinds.values()
    ]


def _word(found: Paired, margin: float, *, broken: bool, lost: bool) -> str:
    if lost or (found.lower is not None and found.lower > margin):
        return WORSE
    if broken or found.n < PAIRS or found.upper is None:
        return NOT_ESTABLISHED
    return ESTABLISHED if found.upper <= margin else NOT_ESTABLISHED


def _lost(metric: str, pairs: Sequence[tuple[Quality, Quality]]) -> bool:
    """Whether a compressed model has no value where its dense one has."""
    return any(_finite(one[metric]) and not _finite(other[metric]) for one, other in pairs)


def _falls(
    pairs: Sequence[tuple[Quality, Quality]], every: Sequence[Quality], metric: str
) -> dict[str, dict[str, float | None]]:
    """What stands beside the metric and fell by more than the dense seeds' standard deviation.

    With one dense seed there is no spread: every fall is told.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name in BESIDE:
        if name == metric or any(name not in one for pair in pairs for one in pair):
            continue
        fall = _mean([before[name] - after[name] for before, after in pairs])
        values = [quality[name] for quality in every if name in quality]
        spread = stdev(values) if len(values) > 1 and all(map(_finite, values)) else None
        if fall > (spread or 0.0):
            found[name] = {"fall": fall, "dense_standard_deviation": spread}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> bool:
    return math.isfinite(value)
