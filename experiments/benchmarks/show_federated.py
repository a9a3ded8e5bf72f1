"""Table of `bench_federated.py`'s rows: `show_federated.py rows.jsonl [page.md]`."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev
from typing import Any

from shared.pages import show

from lightning_compress.lab.evaluation.verdict import verdict

FULL = "FedAvg fp32"  # what the others are compared with


def table(rows: list[dict[str, Any]]) -> str:
    """One line a method and partition: bytes against FedAvg fp32, -ELBO, n."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    quality: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        key = row["partition"], row["peer"]
        groups[key].append(row["rounds"])
        quality[key][row["seed"]] = {"neg_elbo": row["rounds"][-1]["neg_elbo"]}
    first = rows[0]
    lines = [
        f"{first['data']}, VAE of width {first['width']}, {first['clients']} clients, "
        f"{first['of']} rounds of {first['local_epochs']} epochs; after ±: standard deviation "
        "over seeds, of differences (paired by seed) the standard error of the mean.",
        "",
        "| partition | method | up, MB | down, MB | fewer up | fewer in all "
        "| −ELBO | worse by | n |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (partition, peer), runs in groups.items():
        up, down = (mean(sum(r[way] for r in run) for run in runs) / 1e6 for way in ("up", "down"))
        base = groups.get((partition, FULL), runs)
        plain = [mean(sum(r[way] for r in run) for run in base) / 1e6 for way in ("up", "down")]
        ends = [run[-1]["neg_elbo"] for run in runs]
        spread = f" ± {stdev(ends):.2f}" if len(ends) > 1 else ""
        lines.append(
            f"| {partition} | {peer} | {up:.3f} | {down:.3f} | {plain[0] / up:.1f}× "
            f"| {sum(plain) / (up + down):.1f}× | {mean(ends):.2f}{spread} "
            f"| {_change(quality[partition, FULL], quality[partition, peer])} | {len(ends)} |"
        )
    return "\n".join(lines)


def _change(full: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> str:
    """How much worse than FedAvg fp32 a method is, by seed."""
    seeds = sorted(full.keys() & other.keys())
    if full == other or not seeds:
        return "–"
    found = verdict("neg_elbo", [full[one] for one in seeds], [other[one] for one in seeds])
    error = found.standard_error
    return f"{found.difference:+.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    show(table)
