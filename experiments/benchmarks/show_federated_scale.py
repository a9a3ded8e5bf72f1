"""Table of `bench_federated_scale.py`'s rows: `show_federated_scale.py rows.jsonl [page.md]`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench_federated_scale import A_ROUND, ROUNDS
from shared.pages import show

MARKS = ("<!-- scale -->", "<!-- /scale -->")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a run: time and memory of its rounds."""
    lines = [
        f"{A_ROUND} clients a round, one at a time, {ROUNDS} rounds; {rows[0]['machine']}.",
        "",
        "| clients | first round, s | a later round, s | of it coding, at most "
        "| server after round 1, MiB | and after all but the last, MiB "
        "| all processes, MiB | kept on disk, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: row["clients"]):
        # The last round measures the model; the first starts processes and greets all clients.
        first, *later = row["rounds"][:-1]
        # The row knows the slowest client alone: as if all were as slow.
        coding = [one["codec_seconds"] + A_ROUND * one["client_codec_seconds"] for one in later]
        lines.append(
            f"| {row['clients']:,} | {first['seconds']:.0f} "
            f"| {median(one['seconds'] for one in later):.0f} "
            f"| {sum(coding) / sum(one['seconds'] for one in later):.0%} "
            f"| {first['memory']['server']:,} | {later[-1]['memory']['server']:,} "
            f"| {later[-1]['memory']['all']:,} | {row['kept_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    show(table, MARKS)
