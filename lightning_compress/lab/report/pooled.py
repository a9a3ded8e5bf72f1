"""Runs that differ in the seed alone, judged together: pairs of a dense and a compressed model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_compress.lab.evaluation.verdict import verdict
from lightning_compress.lab.report.loading import Run
from lightning_compress.lab.report.scatter import comparable, settings
from lightning_compress.lab.report.wording import Results, Verdict, paired_verdict, scalar, section

__all__ = ["pooled_verdicts"]


def pooled_verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """A verdict for each setting that was run with two seeds or more, in the order of the runs.

    Runs of older versions, whose verdicts were not paired by seed, are left out.
    """
    groups: dict[tuple[str, ...], dict[object, Results]] = {}
    for run in runs:
        found = section(run.results, "verdict")
        if "word" in found:
            key = (settings(run.results), *map(str, comparable(run.results)))
            groups.setdefault(key, {}).setdefault(run.results.get("seed"), run.results)
    return [_pooled(group.values()) for group in groups.values() if len(group) > 1]


def _pooled(group: Iterable[Results]) -> Verdict:
    results = list(group)
    first = section(results[0], "verdict")
    decided = verdict(
        str(first["metric"]),
        [one["dense"]["quality"] for one in results],
        [one["compressed"]["quality"] for one in results],
        higher=bool(first.get("higher_is_better")),
        irreducible=scalar(first.get("irreducible")) or 0.0,
        floor=scalar(first.get("floor")) or 0.0,
    )
    means = {side: {"quality": _means(results, side)} for side in ("dense", "compressed")}
    return paired_verdict({**results[0], **means}, decided.record())


def _means(results: Sequence[Results], side: str) -> dict[str, float]:
    """Means over runs of the qualities that each of them has."""
    every = [section(one[side], "quality") for one in results]
    return {
        key: sum(values) / len(values)  # type: ignore[arg-type]
        for key in every[0]
        if None not in (values := [scalar(quality.get(key)) for quality in every])
    }
