"""Verdicts and tables of the headline rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from statistics import mean
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.evaluation.verdict import (
    ESTABLISHED,
    PAIRS,
    Verdict,
    irreducible_nats,
    verdict,
)
from lightning_compress.lab.workflow.quality import METRICS

from .headline_arms import ARMS, CONTROLS, OURS, PEERS
from .headline_runs import SETS
from .rows import mean_and_spread

__all__ = ["DENSE", "FAMILIES", "LABELS", "WHERE", "Table"]

WHERE = {"fashion": "Fashion-MNIST", "digits": "digits"}
LABELS = {
    "neg_elbo": "−ELBO, nats",
    "neg_iwae": "−IWAE, nats",
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "kl": "KL, nats",
    "active_units": "active units",
    "perplexity": "perplexity",
    "precision": "precision",
    "recall": "recall",
}
BESIDE = ("neg_iwae", "kl", "active_units", "fid", "precision", "recall")
FALLING = {"kl": "KL", "active_units": "active units"}
IRREDUCIBLE = {"fashion": 189.86}  # a test holds it on the real images
DENSE = ("dense", "dense, trained on", "dense, taught")
CUT = [arm for arm in OURS if arm.startswith("half the MACs")]
BY_RATE = [arm for arm in OURS if arm.startswith("rate-")]
FAMILIES = {
    "narrow, from scratch": [arm for arm in CONTROLS if "from scratch" in arm],
    "rate-distortion": [one for one in BY_RATE if "taught" not in one and "int8" not in one],
    "rate-distortion, int8": [one for one in BY_RATE if "int8" in one],
    "half the MACs": [one for one in CUT if "taught" not in one],
    "int8": [arm for arm in OURS if arm.startswith("int8")],
    "zeros, entropy grid": [arm for arm in OURS if "entropy grid" in arm],
    "at save": [arm for arm in OURS if "at save" in arm],
    "rate-distortion, taught": [one for one in BY_RATE if "taught" in one],
    "half the MACs, taught": [one for one in CUT if "taught" in one],
    **{arm: [arm] for arm in PEERS},
}  # of each, the page's short table has the setting that the validation split chose
Row = dict[str, Any]


class Table:
    """The rows of one model.

    Args:
        name: of the set.
        model: of it.
        rows: of all seeds; those without a dense row of the same seed and machine have no pair.
        converged: whether its dense baselines are, by the rule of `baselines.py`.
    """

    def __init__(
        self, name: str, model: str, rows: Sequence[Row], *, converged: bool = False
    ) -> None:
        self.name, self.model, self.converged = name, model, converged
        self.metric = SETS[name][model].metric
        self.title = f"{SETS[name][model].title}, {WHERE[name]}"
        known = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
        self.arms = {arm: [row for row in rows if row["arm"] == arm] for arm in known}
        about = self.arms["dense"][0].get("measure") or {}
        self.floor = (about.get("floor") or {}).get(self.metric, 0.0)
        self.irreducible = irreducible(name, model) if self.metric == "neg_elbo" else 0.0

    @cached_property
    def reference(self) -> str:
        """The dense arm that all others are judged against: the best on the validation split.

        Only arms that have every seed of the dense row are asked.
        """
        n = len(self.arms["dense"])
        whole = [arm for arm in DENSE if len(self.arms.get(arm, ())) == n]
        return min(whole, key=lambda arm: self.over(arm, "validation"))

    def over(self, arm: str, key: str) -> float:
        """Mean over seeds."""
        return mean(row[key] for row in self.arms[arm])

    def verdict(self, arm: str) -> Verdict | None:
        """Paired with the reference by seed and machine; None without a pair."""
        dense = {_pair(row): _quality(row) for row in self.arms[self.reference]}
        rows = [row for row in self.arms[arm] if _pair(row) in dense]
        if not rows:
            return None
        pairs = [dense.pop(_pair(row)) for row in rows]
        return verdict(
            self.metric,
            pairs,
            [_quality(row) for row in rows],
            irreducible=self.irreducible,
            floor=self.floor,
            more_dense=list(dense.values()),
        )

    @cached_property
    def margin(self) -> Verdict:
        """The reference against itself: its margin, its faults."""
        found = self.verdict(self.reference)
        assert found is not None
        return found

    def worse(self, arm: str, key: str) -> float:
        """Mean over pairs of how much worse than the reference; infinite without a pair."""
        dense = {_pair(row): row[key] for row in self.arms[self.reference]}
        pairs = [row[key] - dense[_pair(row)] for row in self.arms[arm] if _pair(row) in dense]
        return mean(pairs) if pairs else math.inf

    def within(self, arm: str, key: str) -> bool:
        """Whether the mean paired difference is within the margin."""
        return self.worse(arm, key) <= self.margin.margin

    def best_of(self, arms: Sequence[str]) -> list[str]:
        """The one arm that the validation split chooses; none of no known arm.

        The smallest of those within the margin there; where there is none, the best.
        """
        known = [arm for arm in arms if arm in self.arms]
        good = [arm for arm in known if self.within(arm, "validation")]
        if good:
            return [min(good, key=lambda arm: self.over(arm, "bytes"))]
        return sorted(known, key=lambda arm: self.worse(arm, "validation"))[:1]

    def chosen(self) -> list[str]:
        """Of each family the setting that the validation split chooses; peers last, best first."""
        found = [arm for family in FAMILIES.values() for arm in self.best_of(family)]
        peers = sorted(set(PEERS) & set(found), key=lambda arm: self.worse(arm, "validation"))
        return [*(arm for arm in found if arm not in PEERS), *peers]

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """Of each arm that has a pair, but the dense ones."""
        found = {arm: self.verdict(arm) for arm in self.arms if arm not in DENSE}
        return {arm: one for arm, one in found.items() if one is not None}

    def established(self) -> list[str]:
        """The arm of the largest ratio without loss; none where there is no such arm."""
        good = [arm for arm, found in self.verdicts.items() if found.word == ESTABLISHED]
        return sorted(good, key=lambda arm: self.over(arm, "bytes"))[:1] if self.converged else []

    def smallest(self) -> str:
        """The smallest artifact within the margin of the best dense model, over all its seeds."""
        n = len(self.arms[self.reference])
        whole = [arm for arm in self.arms if len(self.arms[arm]) == n]
        good = [arm for arm in whole if self.within(arm, self.metric)]
        return min(good, key=lambda arm: self.over(arm, "bytes"))

    def word(self, arm: str) -> str:
        """The verdict, with what fell beside it by more than the dense seeds' deviation."""
        found = self.verdict(arm)
        if found is None:
            return "no pair"
        word = found.word
        if word == ESTABLISHED and not self.converged:
            word = "not established: the dense baseline has not converged"
        falls = [
            f"{FALLING.get(name, name)} −{fall['fall']:.3g}"
            for name, fall in found.falls.items()
            if fall["dense_standard_deviation"] is not None
        ]
        return "; ".join([word, *falls])

    def cells(self, arm: str) -> list[str]:
        """A row's name, artifact, bytes, ratio, quality, difference, verdict, speed and seeds."""
        rows, found = self.arms[arm], self.verdict(arm)
        change = "–" if found is None or arm == self.reference else _change(found)
        return [
            arm,
            rows[0]["file"],
            f"{self.over(arm, 'bytes'):,.0f}",
            f"{self.over(arm, 'ratio'):.1f}×",
            self.cell(arm, self.metric),
            change,
            "the reference" if arm == self.reference else self.word(arm),
            " / ".join(f"{mean(r['speed'][f'batch {n}'] for r in rows):.1f}×" for n in (1, 16)),
            str(len(rows)),
        ]

    def short(self, most: int = 10, peers: int = 2) -> str:
        """Ten rows: the reference, the dense model, each family's chosen setting, two peers.

        Taught ones are folded below.
        """
        chosen = [arm for arm in self.chosen() if "taught" not in arm]
        others = [arm for arm in chosen if arm in PEERS][:peers]
        own = [arm for arm in chosen if arm not in PEERS]
        arms = list(dict.fromkeys([self.reference, "dense", *self.established(), *own]))
        arms = [*arms[: most - len(others)], *others]
        heads = ["", "artifact", "bytes", "ratio", f"{LABELS[self.metric]} (± SD)"]
        heads += ["worse by (± SE)", "no loss?", "faster, batch 1 / 16", "n"]
        return _markdown(heads, [self.cells(arm) for arm in arms])

    def whole(self) -> str:
        """All rows, with what stands beside the metric."""
        extra = [key for key in BESIDE if key != self.metric and key in self.arms["dense"][0]]
        heads = ["", "artifact", "bytes", "ratio", f"{LABELS[self.metric]} (± SD)"]
        heads += ["worse by (± SE)", "no loss?", "faster, batch 1 / 16", "n"]
        heads += ["validation", *(f"{LABELS[key]} (± SD)" for key in extra), "MACs", "non-zero"]
        lines = []
        for arm in self.arms:
            more = [self.cell(arm, key) for key in ("validation", *extra)]
            left = [f"{self.over(arm, f'{key}_left'):.2f}" for key in ("macs", "nonzero")]
            lines.append([*self.cells(arm), *more, *left])
        return _markdown(heads, lines)

    def cell(self, arm: str, key: str) -> str:
        """Mean and standard deviation over seeds."""
        values = [row[key] for row in self.arms[arm] if key in row]
        if len(values) < len(self.arms[arm]):
            return "–"
        digits = 3 if abs(mean(values)) < 1 else 1 if key == "active_units" else 2
        return mean_and_spread(values, f".{digits}f")

    def about(self) -> str:
        """What the table is judged by, and how its dense baseline is."""
        faults = self.margin.dense_faults
        state = "converged" if self.converged else "**not converged**, so nothing is established"
        told = (
            f"**{self.title}.** Reference: “{self.reference}”, the best dense model on the "
            f"validation split: {self.cell(self.reference, self.metric)} (SD over "
            f"{len(self.arms[self.reference])} seeds). No loss means at most "
            f"{self.margin.margin:.3g} worse ({self.margin.margin_rule}). Dense baselines: {state}."
        )
        if faults:
            told += f" **{'; '.join(faults)}.**"
        about = self.arms["dense"][0].get("measure")
        if about and about.get("feature"):
            key = self.metric if self.metric in about["floor"] else "fid"
            told += (
                f" {about['samples']:,} images in the features of `{about['feature']}`, right on "
                f"{about['feature_accuracy']:.1%} of the test images; two halves of these: "
                f"{LABELS[key]} {about['floor'][key]:.3g}."
            )
        machines = sorted(
            {row.get("machine", "unknown") for rows in self.arms.values() for row in rows}
        )
        return f"{told} Measured on {'; '.join(machines)}."

    def not_established(self) -> list[str]:
        """What the rows do not show, a line each."""
        lines = []
        if not self.converged:
            lines.append(f"{self.title}: the dense baselines have not converged.")
        kept = self.worse("dense", self.metric)
        if self.converged and kept > self.margin.margin:
            lines.append(
                f"{self.title}: that the kept baselines are as good as can be: they count as "
                f"converged, and yet “{self.reference}” is {kept:.3g} better. It is the reference."
            )
        few = [arm for arm, found in self.verdicts.items() if found.n < PAIRS]
        if few:
            lines.append(f"{self.title}: fewer than {PAIRS} pairs: {'; '.join(few)}.")
        worse = [arm for arm, found in self.verdicts.items() if found.word == "worse"]
        if worse:
            lines.append(f"{self.title}: worse than dense: {'; '.join(worse)}.")
        beyond = "no loss is established for no row."
        for arm in self.established():
            ratio = self.over(arm, "ratio")
            beyond = f"no loss is established up to {ratio:.1f}× ({arm}), not beyond."
        lines.append(f"{self.title}: {beyond}")
        return lines


def _pair(row: Row) -> tuple[int, str]:
    return row["seed"], row.get("machine", "")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _change(found: Verdict) -> str:
    """Mean paired difference with its standard error, and as a part of what can be influenced."""
    error = found.standard_error
    text = f"{found.difference + 0.0:+.3g}" + (f" ± {error:.2g}" if error is not None else "")
    return text if found.share is None else f"{text}, {round(found.share, 3) + 0.0:+.1%}"


def _quality(row: Row) -> dict[str, float]:
    return {key: row[key] for key in METRICS if isinstance(row.get(key), (int, float))}


@cache
def irreducible(name: str, model: str) -> float:
    """The pixels' own entropy on a set's test images, in nats."""
    if name in IRREDUCIBLE:
        return IRREDUCIBLE[name]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        data = instantiate(compose("train", [*SETS[name][model].data]).data, _convert_="all")
    data.setup()
    return irreducible_nats(data.test_dataset.tensors[0], "bernoulli")
