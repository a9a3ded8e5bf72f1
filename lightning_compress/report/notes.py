"""What a reader must know to judge the numbers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_compress.report.formats import count, kilobytes, percent, scalar, times
from lightning_compress.report.wording import Results, section

__all__ = ["notes"]


def notes(results: Results) -> list[str]:
    """Return what a reader must know to judge the numbers, one sentence or two each."""
    return [
        *_evaluator_notes(section(results, "evaluator")),
        *_fairness_notes(results),
        *_coding_notes(results),
        *_empty_layer_notes(results),
        "Unstructured zeros make the file smaller, not the model faster: dense CPU runtimes "
        "multiply them all the same. MACs are counted dense for the same reason.",
    ]


def _evaluator_notes(evaluator: Mapping[str, Any]) -> list[str]:
    if not evaluator:
        return ["results.json does not say which feature network and how many samples were used."]
    accuracy = scalar(evaluator.get("feature_accuracy"))
    known = f" (test accuracy {percent(accuracy)})" if accuracy is not None else ""
    texts = [
        f"Distances between distributions are taken in the features of "
        f"{evaluator.get('feature', 'an unnamed network')}{known}, with "
        f"{count(scalar(evaluator.get('samples')))} samples. "
        "Values from another feature network or another sample count are not comparable."
    ]
    if evaluator.get("floor"):
        texts.append("Floor: the same measure between two disjoint halves of real data.")
    return texts


def _fairness_notes(results: Results) -> list[str]:
    texts: list[str] = []
    steps = section(results, "steps")
    if steps:
        texts.append(
            f"Optimizer steps: {count(scalar(steps.get('dense')))} dense, "
            f"{count(scalar(steps.get('compressed')))} compressed."
        )
    seeds = {scalar(spread.get("n")) for spread in _spreads(results)}
    known = sorted(n for n in seeds if n is not None)
    texts.append(
        f"Spread: mean ± standard deviation of the dense baseline over "
        f"{' or '.join(map(count, known))} seeds."
        if known
        else "The dense baseline was trained with one seed only: its spread is not known."
    )
    return texts


def _spreads(results: Results) -> list[Mapping[str, Any]]:
    spreads = section(results, "baseline_spread").values()
    return [spread for spread in spreads if isinstance(spread, Mapping)]


def _coding_notes(results: Results) -> list[str]:
    bound = scalar(results.get("entropy_bound_bytes"))
    size = scalar(section(results["compressed"], "bytes").get("lcz"))
    if not bound or not size:
        return []
    return [
        f"The .lcz file takes {kilobytes(size)}; the zero-order entropy bound of its symbols is "
        f"{kilobytes(bound)} ({times(size / bound)} the bound, headers included)."
    ]


def _empty_layer_notes(results: Results) -> list[str]:
    """Name tensors that were pruned away whole: nothing passes through such a layer."""
    names = [
        str(layer.get("name"))
        for layer in results.get("layers") or ()
        if scalar(layer.get("sparsity")) == 1 and (scalar(layer.get("weights")) or 0) > 1
    ]
    return [f"Tensors that hold nothing but zeros: {', '.join(names)}."] if names else []
