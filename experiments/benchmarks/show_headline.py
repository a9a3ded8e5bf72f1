"""Tables and figures of the rows of bench_headline.py.

python experiments/benchmarks/show_headline.py outputs/bench/headline docs
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from shared.headline_arms import ARMS, PEERS
from shared.headline_runs import SETS
from shared.pages import insert
from shared.rows import mean_and_spread, read_rows

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.evaluation.verdict import Verdict, irreducible_nats, verdict
from lightning_compress.lab.workflow.quality import METRICS

WHERE = {"fashion": "Fashion-MNIST", "digits": "digits"}
LABELS = {
    "neg_elbo": "−ELBO, nats",
    "neg_iwae": "−IWAE, nats",
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "active_units": "active units",
    "perplexity": "perplexity",
    "precision": "precision",
    "recall": "recall",
}
MORE = ("neg_iwae", "perplexity", "active_units", "fid", "precision", "recall")
FALLING = {"kl": "KL", "active_units": "active units"}
IRREDUCIBLE = {"fashion": 189.86}  # a test holds it on the real images
OURS = "zeros and grids"
TOGETHER = "zeros, grids, taught"  # how the rows that join everything end
TICKS = (1, 3, 10, 30, 100, 300)
COLUMNS = 3  # of panels
PLOTS = {"fashion": "headline.png", "digits": "headline_digits.png"}
Row = dict[str, Any]


class Table:
    """The rows of one model.

    Args:
        name: of the set.
        model: of it.
        rows: of all seeds.
    """

    def __init__(self, name: str, model: str, rows: Sequence[Row]) -> None:
        self.metric = SETS[name][model].metric
        self.title = f"{SETS[name][model].title}, {WHERE[name]}"
        known = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
        self.arms = {arm: [row for row in rows if row["arm"] == arm] for arm in known}
        self.dense = {row["seed"]: row[self.metric] for row in self.arms["dense"]}
        first = self.arms["dense"][0]
        self.floor = first.get("measure", {}).get("floor", {}).get(self.metric, 0.0)
        self.irreducible = irreducible(name, model) if self.metric == "neg_elbo" else 0.0
        self.margin = self.verdict("dense").margin

    def changes(self, arm: str) -> list[float]:
        """How much worse than the dense row of the same seed, a seed each."""
        return [row[self.metric] - self.dense[row["seed"]] for row in self.arms[arm]]

    def worse(self, arm: str) -> float:
        """Mean over seeds."""
        return mean(self.changes(arm))

    def noise(self, arm: str) -> float:
        """Standard deviation over seeds; 0 of one."""
        changes = self.changes(arm)
        return stdev(changes) if len(changes) > 1 else 0.0

    def verdict(self, arm: str) -> Verdict:
        """Paired by seed with the dense rows, those of further seeds beside them."""
        dense = {row["seed"]: _quality(row) for row in self.arms["dense"]}
        rows = self.arms[arm]
        pairs = [dense.pop(row["seed"]) for row in rows]
        return verdict(
            self.metric,
            pairs,
            [_quality(row) for row in rows],
            irreducible=self.irreducible,
            floor=self.floor,
            more_dense=list(dense.values()),
        )

    def markdown(self) -> str:
        """A row an arm."""
        extra = [key for key in MORE if key != self.metric and key in self.arms["dense"][0]]
        heads = ["", "file", "bytes", "ratio", LABELS[self.metric], "against dense", "no loss"]
        heads += [*(LABELS[key] for key in extra), "MACs", "faster, batch 1 / 16", "OpenVINO", "n"]
        lines = [
            f"**{self.title}.** Dense: {self._over('dense', self.metric)} (± standard deviation "
            f"over seeds); no loss means at most {self.margin:.3g} worse "
            f"({self.verdict('dense').margin_rule}).{self._faults()}{self._measure()}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        for arm, rows in self.arms.items():
            found = self.verdict(arm)
            cells = [
                arm,
                rows[0]["file"],
                f"{mean(row['bytes'] for row in rows):,.0f}",
                f"{mean(row['ratio'] for row in rows):.1f}×",
                self._over(arm, self.metric),
                _change(found),
                "–" if arm == "dense" else _word(found),
                *(self._over(arm, key) for key in extra),
                _left(rows),
                f"{_speed(rows, ', batch 1')} / {_speed(rows, ', batch 16')}",
                f"{_speed(rows, ', OpenVINO, batch 1')} / {_speed(rows, ', OpenVINO, batch 16')}",
                str(len(rows)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *self._all_parts()])

    def _all_parts(self) -> list[str]:
        """A line of how fast the rows are whose parts were all measured."""
        told = []
        for arm, rows in self.arms.items():
            speeds = [row["speed_of_all"] for row in rows if "speed_of_all" in row]
            if not speeds:
                continue
            kinds = ["this", *(["int8"] if "int8, batch 1" in speeds[0] else [])]
            said = [
                " / ".join(
                    f"{mean(one[f'{kind}, batch {n}'] for one in speeds):.1f}×" for n in (1, 16)
                )
                + {"this": " in fp32", "int8": " in int8"}[kind]
                for kind in kinds
            ]
            told.append(f"{arm}: {', '.join(said)} (n = {len(speeds)})")
        return ["", f"All parts one after the other, faster: {'; '.join(told)}."] if told else []

    def _faults(self) -> str:
        faults = self.verdict("dense").dense_faults
        return f" **Dense baseline: {'; '.join(faults)}.**" if faults else ""

    def ratio(self, arm: str) -> float:
        """How many times smaller its file is."""
        return mean(row["ratio"] for row in self.arms[arm])

    def _over(self, arm: str, key: str) -> str:
        if any(key not in row for row in self.arms[arm]):
            return "–"
        values = [row[key] for row in self.arms[arm]]
        digits = 3 if abs(mean(values)) < 1 else 1 if key == "active_units" else 2
        return mean_and_spread(values, f".{digits}f")

    def _measure(self) -> str:
        """What the first dense row says of the images' features, and of real images alone."""
        about = self.arms["dense"][0].get("measure")
        if about is None or about["feature"] is None:
            return ""
        key = self.metric if self.metric in about["floor"] else "fid"
        return (
            f" {about['samples']:,} images; the classifier is right on "
            f"{about['feature_accuracy']:.1%} of the test images. Two halves of these: "
            f"{LABELS[key]} {about['floor'][key]:.3g}, precision "
            f"{about['floor']['precision']:.3f}, recall {about['floor']['recall']:.3f}."
        )


def _change(found: Verdict) -> str:
    """Mean paired difference with its standard error, and as a part of what can be influenced."""
    error = found.standard_error
    text = f"{found.difference + 0.0:+.3g}" + (f" ± {error:.2g} (SE)" if error else "")
    return text if found.share is None else f"{text}, {round(found.share, 3) + 0.0:+.1%}"


def _word(found: Verdict) -> str:
    """The verdict, with what fell beside it by more than the dense rows' standard deviation."""
    falls = [
        f"{FALLING.get(name, name)} −{fall['fall']:.3g}"
        for name, fall in found.falls.items()
        if fall["dense_standard_deviation"] is not None
    ]
    return "; ".join([found.word, *falls])


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


def _left(rows: Sequence[Row]) -> str:
    left = [row["macs_left"] for row in rows if "macs_left" in row]
    return f"1/{1 / mean(left):.1f}" if left and mean(left) < 0.99 else "all" if left else "–"


def _speed(rows: Sequence[Row], end: str) -> str:
    """Of the int8 file where there is one; a dash where the engine refuses the file."""
    kind = "int8" if "int8, batch 1" in rows[0]["speed"] else "this"
    found = [row["speed"].get(kind + end) for row in rows]
    return "–" if None in found else f"{mean(found):.1f}×"


def plot(tables: Sequence[Table], path: Path) -> None:
    """A panel a model: times smaller, and how much worse than the dense rows of the same seeds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = math.ceil(len(tables) / COLUMNS)
    size = (4.6 * COLUMNS, 4 * lines)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=size, squeeze=False)
    shown: dict[str, Any] = {}
    for axis, table in itertools.zip_longest(axes.flat, tables):
        if table is None:
            axis.set_axis_off()
        else:
            shown |= panel(axis, table)
    figure.legend(shown.values(), shown.keys(), frameon=False, ncol=len(shown), loc="lower center")
    figure.tight_layout(rect=(0, 0.07 / lines, 1, 1))
    figure.savefig(path, dpi=110)


def panel(axis: Any, table: Table) -> dict[str, Any]:
    """One model's; what its legend would be."""
    low, high = -table.margin, table.margin
    axis.axhspan(low, high, color="0.88", label="margin of no loss")
    axis.axhline(0, color="0.4", linewidth=1, linestyle="--", label="dense")
    ours = sorted((a for a in table.arms if a.startswith(OURS) and a[-1] == "%"), key=table.ratio)
    joined = sorted((a for a in table.arms if a.endswith(TOGETHER)), key=table.ratio)
    single = [a for a in table.arms if a not in (*ours, *joined, *PEERS, "dense")]
    groups = {"channels, zeros and grids, taught": joined, "zeros and grids": ours}
    groups |= {"other ways of ours": single}
    groups["what else there is"] = [arm for arm in table.arms if arm in PEERS]
    colours: dict[str, str] = {}
    for (label, arms), (style, colour) in zip(
        groups.items(), (("D-", "C0"), ("o-", "C1"), ("s", "C2"), ("x", "C3")), strict=True
    ):
        colours |= dict.fromkeys(arms, colour)
        x, y = [table.ratio(arm) for arm in arms], [table.worse(arm) for arm in arms]
        if arms:
            spread = [table.noise(arm) for arm in arms]
            axis.errorbar(x, y, spread, fmt=style, color=colour, elinewidth=1, label=label)
    axis.set(title=table.title, xscale="log", xlabel="times smaller than torch.save")
    axis.set_ylabel(f"{LABELS[table.metric]}, worse than dense by")
    axis.set_xticks(TICKS, [f"{tick}×" for tick in TICKS])
    axis.minorticks_off()
    axis.set_xlim(TICKS[0], TICKS[-1])
    worst = max([table.worse(a) + table.noise(a) for a in (*ours, *joined, *single)] + [high])
    top = worst + 0.3 * (worst - low)
    axis.set_ylim(top=top)
    for arm in (one for one in table.arms if table.worse(one) > top):
        text = f"{table.worse(arm):+.3g} ↑"  # far above what is shown
        place: Any = {"va": "top", "ha": "center", "rotation": 90}
        axis.annotate(text, (table.ratio(arm), top), color=colours[arm], fontsize=8, **place)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def main(source: Path, folder: Path) -> None:
    """Writes tables into headline.md and figures; of a set without rows they stay as they are."""
    for name, file in PLOTS.items():
        paths = [source / name / f"{model}.jsonl" for model in SETS[name]]
        found = [path for path in paths if path.exists() and read_rows(path)]
        if tables := [Table(name, path.stem, read_rows(path)) for path in found]:
            text = "\n\n".join(table.markdown() for table in tables)
            marks = [f"<!-- {slash}headline: {name} -->" for slash in ("", "/")]
            insert(folder / "headline.md", text, *marks)
            plot(tables, folder / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
