"""Table of `bench_federated.py`'s rows: `show_federated.py rows.jsonl [page.md]`."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev
from typing import Any

from shared.pages import show


def table(rows: list[dict[str, Any]]) -> str:
    """One line a method and partition: bytes against FedAvg fp32, -ELBO, n."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows:
        groups[row["partition"], row["peer"]].append(row["rounds"])
    first = rows[0]
    lines = [
        f"{first['data']}, VAE of width {first['width']}, {first['clients']} clients, "
        f"{first['of']} rounds of {first['local_epochs']} epochs; after ±: standard deviation.",
        "",
        "| partition | method | up, MB | down, MB | fewer up | fewer in all | −ELBO | n |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (partition, peer), runs in groups.items():
        up, down = (mean(sum(r[way] for r in run) for run in runs) / 1e6 for way in ("up", "down"))
        base = groups.get((partition, "FedAvg fp32"), runs)
        plain = [mean(sum(r[way] for r in run) for run in base) / 1e6 for way in ("up", "down")]
        ends = [run[-1]["neg_elbo"] for run in runs]
        spread = f" ± {stdev(ends):.2f}" if len(ends) > 1 else ""
        lines.append(
            f"| {partition} | {peer} | {up:.3f} | {down:.3f} | {plain[0] / up:.1f}× "
            f"| {sum(plain) / (up + down):.1f}× | {mean(ends):.2f}{spread} | {len(ends)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    show(table)
