"""Table, verdicts and pictures of the rows of bench_headline.py.

python experiments/benchmarks/show_headline.py [--rows experiments/rows] [--docs docs]
    [--readme README.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from baselines import has_converged
from shared.headline_arms import PEERS
from shared.headline_plots import draw
from shared.headline_runs import SETS
from shared.headline_tables import FAMILIES, WHERE, Table
from shared.pages import insert
from shared.rows import read_rows

ROWS = Path(__file__).parents[1] / "rows"
MARKS = ("<!-- headline: {} -->", "<!-- /headline: {} -->")


def tables_of(rows: Path) -> list[Table]:
    """Of each model that has rows; those with converged baselines first, then Fashion-MNIST."""
    found = []
    for name, models in SETS.items():
        for model, plan in models.items():
            path = rows / "headline" / name / f"{model}.jsonl"
            known = read_rows(path) if path.exists() else []
            if any(row["arm"] == "dense" for row in known):
                curves = curves_of(rows, *plan.baseline)
                found.append(Table(name, model, known, converged=has_converged(curves)))
    return sorted(found, key=lambda table: not table.converged)


def curves_of(rows: Path, name: str, model: str) -> list[list[float]]:
    """Validation curves of a dense baseline, a seed each."""
    place = rows if (rows / "baselines").exists() else ROWS
    path = place / "baselines" / name / "rows.jsonl"
    known = read_rows(path) if path.exists() else []
    return [row["curve"] for row in known if row["model"] == model]


def not_established(tables: Sequence[Table]) -> str:
    """What the rows do not show: the page says it first."""
    missing = [
        f"{plan.title}, {WHERE[name]}: no rows from a converged baseline yet."
        for name, models in SETS.items()
        for model, plan in models.items()
        if (name, model) not in {(table.name, table.model) for table in tables}
    ]
    lines = [line for table in tables for line in table.not_established()]
    return "\n".join(f"- {line}" for line in [*lines, *missing])


def page(tables: Sequence[Table]) -> dict[str, str]:
    """The generated parts of `docs/headline.md` by their mark."""
    first = tables[0]
    small = first.smallest()
    best = (
        f"{first.about()}\n\n{first.short()}\n\nBytes at dense quality: "
        f"{first.over(small, 'bytes'):,.0f} ({small}); the dense artifact has "
        f"{first.over('dense', 'bytes'):,.0f}."
    )
    whole = "\n\n".join(f"{table.about()}\n\n{table.whole()}" for table in tables)
    return {"not established": not_established(tables), "table": best, "all rows": whole}


def readme_table(tables: Sequence[Table]) -> str:
    """Six rows of the first model: the best dense one, the largest ratio without loss, a peer.

    Of each family and of all peers together the validation split chooses.
    """
    table = tables[0]
    heads = ["", "bytes", "ratio", "faster, batch 1 / 16", "worse by", "no loss?", "n"]
    shown = (FAMILIES[name] for name in ("narrow, from scratch", "int8", "rate-distortion, int8"))
    arms = [table.reference, *(arm for family in shown for arm in table.best_of(family))]
    arms += [*table.established(), *table.best_of(list(PEERS))]
    arms = [arms[0], *sorted(set(arms[1:]), key=lambda arm: -table.over(arm, "bytes"))]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in arms:
        name, _, size, ratio, _, change, word, faster, n = table.cells(arm)
        lines.append("| " + " | ".join([name, size, ratio, faster, change, word, n]) + " |")
    return "\n".join(
        [f"{table.title}; no loss means at most {table.margin.margin:.3g} worse.", "", *lines]
    )


def main() -> None:
    """Writes the parts of the page between their marks, the pictures, and README's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    tables = tables_of(args.rows)
    if not tables:
        raise SystemExit(f"{args.rows / 'headline'}: no rows; bench_headline.py makes them")
    for part, text in page(tables).items():
        insert(args.docs / "headline.md", text, *(mark.format(part) for mark in MARKS))
    titles = {t.title: curves_of(args.rows, *SETS[t.name][t.model].baseline) for t in tables}
    draw(tables, {title: seeds for title, seeds in titles.items() if seeds}, args.docs)
    marks = [mark.format("readme") for mark in MARKS]
    if args.readme.exists() and marks[0] in args.readme.read_text(encoding="utf-8"):
        insert(args.readme, readme_table(tables), *marks)


if __name__ == "__main__":
    main()
