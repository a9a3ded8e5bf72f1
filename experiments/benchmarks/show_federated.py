"""Table of `bench_federated.py`'s rows: `show_federated.py rows.jsonl`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev


def main() -> None:
    """Print one line a method and partition: bytes against FedAvg fp32, -ELBO, n."""
    groups = defaultdict(list)
    for line in Path(sys.argv[1]).read_text("utf-8").splitlines():
        row = json.loads(line)
        groups[row["partition"], row["peer"]].append(row["rounds"])
    print("| partition | method | up, MB | down, MB | fewer up | fewer in all | -ELBO | n |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (partition, peer), runs in groups.items():
        up, down = (mean(sum(r[way] for r in run) for run in runs) / 1e6 for way in ("up", "down"))
        base = groups.get((partition, "FedAvg fp32"), runs)
        plain = [mean(sum(r[way] for r in run) for run in base) / 1e6 for way in ("up", "down")]
        ends = [run[-1]["neg_elbo"] for run in runs]
        spread = f" ± {stdev(ends):.2f}" if len(ends) > 1 else ""
        print(
            f"| {partition} | {peer} | {up:.3f} | {down:.3f} | {plain[0] / up:.1f} "
            f"| {sum(plain) / (up + down):.1f} | {mean(ends):.2f}{spread} | {len(ends)} |"
        )


if __name__ == "__main__":
    main()
