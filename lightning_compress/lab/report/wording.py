"""Sentences and number formats of the report: headline, verdict, notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.lab.evaluation.verdict import (
    ESTABLISHED,
    NOT_ESTABLISHED,
    PAIRS,
    WORSE,
)
from lightning_compress.lab.report.formats import (
    DASH,
    MINUS,
    TIMES,
    count,
    kilobytes,
    milliseconds,
    number,
    percent,
    scalar,
    signed,
    times,
)

__all__ = [
    "DASH",
    "MINUS",
    "TIMES",
    "MetricLabel",
    "Verdict",
    "count",
    "headline",
    "kilobytes",
    "methods",
    "metric",
    "milliseconds",
    "model_name",
    "notes",
    "number",
    "paired_verdict",
    "percent",
    "reference",
    "scalar",
    "signed",
    "size_ratio",
    "times",
    "verdict_of",
]
Results = Mapping[str, Any]

# Names as the field writes them; any other model is shown as configured.
MODEL_NAMES = {
    "dcgan": "DCGAN",
    "wgan_gp": "WGAN-GP",
    "vae": "VAE",
    "recurrent_vae": "Recurrent VAE",
    "simple_net": "SimpleNet",
    "resnet18": "ResNet-18",
}
STATE_WORDS = {"within": "Within", "outside": "Not within", "unknown": "Not judged"}
FALLING = {
    "kl": "KL (nats)",
    "active_units": "active units",
    "code_perplexity": "perplexity of the codebook",
}
# as the banner names them
BESIDE_METRIC = ("active_units", "kl", "code_perplexity", "precision", "recall")
# The verdict's word, how it is coloured, and the banner's words.
VERDICTS = {
    ESTABLISHED: ("within", "No loss: established"),
    NOT_ESTABLISHED: ("unknown", "No loss: not established"),
    WORSE: ("outside", "Worse than the dense baseline"),
}


@dataclass(frozen=True)
class MetricLabel:
    """How a quality metric is shown: its label, and "lower", "higher" or "" as the better one."""

    label: str
    better: str

    @property
    def arrow(self) -> str:
        """The direction of improvement as an arrow, empty when unknown."""
        return {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}.get(self.better, "")


@dataclass(frozen=True)
class Verdict:
    """Whether the compressed model holds the dense baseline's quality.

    Attributes:
        state: "within", "outside" or "unknown"; the colour.
        clause: the short form for the headline.
        sentence: the long form with all numbers.
        decided: "established", "not established" or "worse"; empty in runs of older versions.
        fallen: what stands beside the metric and fell: "active units fell from 13 to 7".
    """

    state: str
    clause: str
    sentence: str
    decided: str = ""
    fallen: str = ""

    @property
    def word(self) -> str:
        """The state in words, so that colour is never the only sign."""
        return self.decided.capitalize() or STATE_WORDS[self.state]

    @property
    def banner(self) -> str:
        """What is printed in bold before the sentence."""
        if self.decided:
            return VERDICTS[self.decided][1]
        return f"{self.word} the allowed difference" if self.state != "unknown" else self.word

    @property
    def tone(self) -> str:
        """The colour: never that of success where something fell."""
        return "unknown" if self.fallen and self.state == "within" else self.state

    @property
    def told(self) -> str:
        """The banner with what fell beside the metric."""
        return f"{self.banner}; {self.fallen}" if self.fallen else self.banner


def section(results: Results, key: str) -> Mapping[str, Any]:
    """Return an optional section; an empty mapping where it is missing or null."""
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def model_name(results: Results) -> str:
    """Return the model as the field writes it."""
    model = str(results["model"])
    return MODEL_NAMES.get(model, model)


def methods(results: Results) -> list[str]:
    """Return the names of the compression methods, a recipe by its goal.

    >>> methods({"compression": {"recipe": {"goal": "smallest"}, "prune": {"begin": 0.0}}})
    ['recipe "smallest"', 'prune']
    """
    found = []
    for name, settings in section(results, "compression").items():
        goal = settings.get("goal") if isinstance(settings, Mapping) else None
        found.append(f'{name} "{goal}"' if goal is not None else str(name))
    return found


def metric(results: Results, key: str) -> MetricLabel:
    """Return label and direction of a metric, from `metric_info` or else from the verdict."""
    info = section(section(results, "metric_info"), key)
    better = str(info.get("better") or "")
    verdict = section(results, "verdict")
    if not better and verdict.get("metric") == key and verdict.get("higher_is_better") is not None:
        better = "higher" if verdict["higher_is_better"] else "lower"
    return MetricLabel(
        str(info.get("label") or key), better if better in ("lower", "higher") else ""
    )


def size_ratio(results: Results) -> float | None:
    """Return dense torch bytes / `.lcz` bytes: as stored, or computed where it is not."""
    stored = scalar(results.get("ratio"))
    dense = scalar(section(results["dense"], "bytes").get("torch"))
    compressed = scalar(section(results["compressed"], "bytes").get("lcz"))
    return stored if stored is not None else dense / compressed if dense and compressed else None


def verdict_of(results: Results) -> Verdict:
    """Put the verdict of `results.json` into words; it is never decided anew here.

    What fell beside its metric is part of it: no loss of a bound with half of the active units gone
    is not shown as if nothing had happened.
    """
    verdict = section(results, "verdict")
    if not verdict:
        text = "quality not judged: results.json holds no verdict"
        return Verdict("unknown", text, f"{text[0].upper()}{text[1:]}.", fallen=_fallen(results))
    if verdict.get("word") in VERDICTS:
        return paired_verdict(results, verdict)
    states = {True: "within", False: "outside"}  # of runs before verdicts were paired by seed
    within = verdict.get("within")
    state = states[within] if isinstance(within, bool) else "unknown"
    clause = {
        "within": f"quality within {_limit(results, verdict)}",
        "outside": f"quality not within the allowed difference ({_change(results, verdict)})",
        "unknown": "quality not judged",
    }[state]
    fallen = _fallen(results)
    return Verdict(state, clause, _sentence(results, verdict), fallen=fallen)


def paired_verdict(results: Results, verdict: Mapping[str, Any]) -> Verdict:
    """Put a verdict over pairs of seeds into words: in one sentence, with what fell beside it.

    Args:
        results: the run; of several, one with the mean qualities of all.
        verdict: its record.
    """
    decided = str(verdict["word"])
    faults = [str(fault) for fault in verdict.get("dense_faults") or ()]
    pairs = count(scalar(verdict.get("n")))
    label = metric(results, str(verdict.get("metric"))).label
    lead = f"{label} {_direction(verdict)}"
    clause = {
        ESTABLISHED: f"no loss established ({pairs} pairs)",
        NOT_ESTABLISHED: f"no loss not established ({lead}, {_pairs(verdict)})",
        WORSE: f"worse than the dense baseline ({lead})",
    }[decided]
    clause += f"; dense baseline: {'; '.join(faults)}" if faults else ""
    fallen = _fallen({**results, "verdict": verdict})
    sentence = _paired_sentence(results, label, verdict)
    return Verdict(VERDICTS[decided][0], clause, sentence, decided, fallen)


def falls(results: Results) -> dict[str, Mapping[str, Any]]:
    """What stands beside the metric and fell beyond its spread, by name: fall and spread.

    As the verdict has it; runs of older versions, whose verdict names none, are held against the
    same rule: with one dense seed every fall counts, with more a fall above their deviation.
    """
    verdict = section(results, "verdict")
    named = verdict.get("falls")
    if isinstance(named, Mapping):
        return {key: fall for key, fall in named.items() if isinstance(fall, Mapping)}
    found: dict[str, Mapping[str, Any]] = {}
    for key in BESIDE_METRIC:
        before, after = _both(results, key)
        deviation = scalar(section(section(results, "baseline_spread"), key).get("std"))
        if key == verdict.get("metric") or before is None or after is None:
            continue
        if before - after > (deviation or 0.0):
            found[key] = {"fall": before - after, "dense_standard_deviation": deviation}
    return found


def _both(results: Results, key: str) -> tuple[float | None, float | None]:
    """A quality of the dense and of the compressed model."""
    before, after = (
        scalar(section(section(results, side), "quality").get(key))
        for side in ("dense", "compressed")
    )
    return before, after


def _from_to(results: Results, key: str, fall: float | None) -> str:
    """From which value to which; by how much alone, where the values are not those of the fall."""
    before, after = _both(results, key)
    gap = None if before is None or after is None else before - after
    if gap is None or fall is None or not math.isclose(gap, fall, rel_tol=1e-6, abs_tol=1e-9):
        return f"fell by {number(fall, 3)}"
    whole = key == "active_units" and float(before or 0).is_integer() and float(after or 0) % 1 == 0
    shown = count if whole else lambda value: number(value, 3)
    return f"fell from {shown(before)} to {shown(after)}"


def _fallen(results: Results) -> str:
    """Everything that fell, in the banner's order: "active units fell from 13 to 7 and ..."."""
    fell = falls(results)
    ordered = [*(key for key in BESIDE_METRIC if key in fell), *sorted({*fell} - {*BESIDE_METRIC})]
    parts = [
        f"{FALLING.get(key, key)} {_from_to(results, key, scalar(fell[key].get('fall')))}"
        for key in ordered
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _pairs(verdict: Mapping[str, Any]) -> str:
    n = scalar(verdict.get("n")) or 0
    text = f"{count(n)} pair{'' if n == 1 else 's'}"
    return text if n >= PAIRS else f"{text} of the {PAIRS} seeds that it takes"


def _direction(verdict: Mapping[str, Any]) -> str:
    difference = scalar(verdict.get("difference"))
    if difference is None or math.isnan(difference):
        return "difference unknown"
    if difference == 0:
        return "equal"
    return f"{'worse' if difference > 0 else 'better'} by {number(abs(difference), 3)}"


def _paired_sentence(results: Results, label: str, verdict: Mapping[str, Any]) -> str:
    """Both values, the paired difference with its error and bounds, the margin, what fell."""
    get = {key: scalar(verdict.get(key)) for key in verdict}
    over = " (means over pairs)" if (get.get("n") or 0) > 1 else ""
    dense, every = _paired_dense(verdict), get.get("dense_mean")
    mean = "" if over or every == dense else f" (mean over all dense seeds {number(every)})"
    parts = [
        f"{label}: {number(dense)} dense{mean}, {number(get.get('compressed_mean'))} "
        f"compressed{over}",
        f"{_direction(verdict)} ({_error(verdict)}), margin {number(get.get('margin'), 3)} = "
        f"{verdict.get('margin_rule')}",
    ]
    if get.get("irreducible") and get.get("share") is not None:
        parts.append(
            f"{signed((get['share'] or 0) * 100, 3)} % of what a model can influence "
            f"({number(get['irreducible'])} are irreducible)"
        )
    for name, fall in falls({**results, "verdict": verdict}).items():
        spread = scalar(fall.get("dense_standard_deviation"))
        known = "one dense seed, spread unknown"
        if spread is not None:
            known = f"standard deviation over dense seeds {number(spread, 3)}"
        parts.append(
            f"{FALLING.get(name, name)} fell by {number(scalar(fall.get('fall')), 3)} ({known})"
        )
    if faults := verdict.get("dense_faults"):
        parts.append(f"dense baseline: {'; '.join(map(str, faults))}")
    return "; ".join(parts) + "."


def _paired_dense(verdict: Mapping[str, Any]) -> float | None:
    """The dense models' mean over the pairs alone, from which the difference is taken."""
    after, loss = (scalar(verdict.get(key)) for key in ("compressed_mean", "difference"))
    if after is None or loss is None or verdict.get("n") == 1:
        return scalar(verdict.get("dense"))
    return after + loss if verdict.get("higher_is_better") else after - loss


def _error(verdict: Mapping[str, Any]) -> str:
    error = scalar(verdict.get("standard_error"))
    if error is None:
        return f"n = {_pairs(verdict)}, no bound"
    low, high = (signed(scalar(verdict.get(key))) for key in ("lower", "upper"))
    return (
        f"standard error {number(error, 3)}, n = {_pairs(verdict)}, "
        f"one-sided 95 % bounds {low} and {high}"
    )


def reference(verdict: Mapping[str, Any]) -> float | None:
    """Return what the compressed value is held against: the dense mean over seeds, if known."""
    mean = scalar(verdict.get("dense_mean"))
    return mean if mean is not None else scalar(verdict.get("dense"))


def _limit(results: Results, verdict: Mapping[str, Any]) -> str:
    if section(results, "baseline_spread").get(str(verdict.get("metric"))):
        return "the dense baseline's seed spread"
    if scalar(verdict.get("allowed_two_percent")) is not None:
        return "2 % of the dense baseline (one seed)"
    return "the allowed difference"


def _change(results: Results, verdict: Mapping[str, Any]) -> str:
    """Return "label worse by x" or "better by x", from the two values themselves."""
    shown = metric(results, str(verdict.get("metric")))
    dense, compressed = reference(verdict), scalar(verdict.get("compressed"))
    if dense is None or compressed is None:
        return f"{shown.label}: difference unknown"
    loss = (dense - compressed) if shown.better == "higher" else (compressed - dense)
    if loss == 0:
        return f"{shown.label} equal"
    if math.isnan(loss) or not shown.better:
        return f"{shown.label} {number(dense)} to {number(compressed)}"
    return f"{shown.label} {'worse' if loss > 0 else 'better'} by {number(abs(loss), 3)}"


def _sentence(results: Results, verdict: Mapping[str, Any]) -> str:
    """Return both values, their difference, and both limits of which the smaller one counts."""
    shown = metric(results, str(verdict.get("metric")))
    mean = scalar(verdict.get("dense_mean"))
    dense = number(scalar(verdict.get("dense")))
    if mean is not None and mean != scalar(verdict.get("dense")):
        dense += f" (mean over seeds {number(mean)})"
    allowed, spread, share = (
        scalar(verdict.get(key)) for key in ("allowed", "allowed_spread", "allowed_two_percent")
    )
    limits = [f"seed spread {number(spread, 3)}"] if spread is not None else []
    limits += [f"2\N{NO-BREAK SPACE}% = {number(share, 3)}"] if share is not None else []
    what = " as the smaller of " if len(limits) > 1 else ": "
    limit = "no allowed difference is given"
    if allowed is not None:
        limit = f"{number(allowed, 3)} is allowed" + (what + " and ".join(limits) if limits else "")
    return (
        f"{shown.label}: {dense} dense, {number(scalar(verdict.get('compressed')))} compressed; "
        f"{_change(results, verdict).removeprefix(shown.label).lstrip(': ')}, {limit}."
    )


def headline(results: Results) -> str:
    """Return the one sentence that sums the run up.

    >>> results = {"model": "vae", "data": "digits", "ratio": 31.2, "dense": {}, "compressed": {}}
    >>> headline(results)
    'VAE on digits: 31.2× smaller, quality not judged: results.json holds no verdict'
    """
    ratio = size_ratio(results)
    if ratio is None or not ratio > 0:
        size = "size ratio unknown"
    else:
        size = f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"
    found = verdict_of(results)
    fallen = f"; {found.fallen}" if found.fallen else ""
    return f"{model_name(results)} on {results['data']}: {size}, {found.clause}{fallen}"


def notes(results: Results) -> list[str]:
    """Return the notes on how the numbers were measured, one or two sentences each."""
    return [
        *_evaluator_notes(section(results, "evaluator")),
        *_fairness_notes(results),
        *_coding_notes(results),
        *_one_file_notes(results),
        *_empty_layer_notes(results),
        "Unstructured zeros make the file smaller, not the model faster: dense CPU runtimes "
        "multiply them all the same. MACs are counted dense for the same reason.",
    ]


def _evaluator_notes(evaluator: Mapping[str, Any]) -> list[str]:
    if not evaluator:
        return ["results.json does not say which feature network and how many samples were used."]
    accuracy = scalar(evaluator.get("feature_accuracy"))
    task = evaluator.get("feature_task", "labels")
    what = "test accuracy" if task == "labels" else f"self-supervised: test accuracy on {task}"
    known = f" ({what} {percent(accuracy)})" if accuracy is not None else ""
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
        begun = (
            ", begun with the weights of the dense run" if results.get("start") == "dense" else ""
        )
        texts.append(
            f"Optimizer steps: {count(scalar(steps.get('dense')))} dense, "
            f"{count(scalar(steps.get('compressed')))} compressed{begun}."
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


def _one_file_notes(results: Results) -> list[str]:
    """Note on the file that runs by itself: its bytes, and its speed."""
    size = scalar(section(results["compressed"], "bytes").get("lcz_graph"))
    if not size:
        return []
    text = f"One file, {kilobytes(size)}, is all that is deployed: the int8 graph and its weights"
    text += " in one .lcz file, which onnx_session runs without PyTorch"
    dense, compressed = (section(results[side], "latency_ms") for side in ("dense", "compressed"))
    for key, values in compressed.items():
        slow = scalar(section(dense, key).get("median"))
        fast = scalar(values.get("median")) if isinstance(values, Mapping) else None
        if key.startswith("onnxruntime int8") and slow and fast:
            text += (
                f"; {milliseconds(fast)} ms a call ({key.partition(', ')[2]}), "
                f"{times(slow / fast)} as fast as the dense fp32 file"
            )
            break
    return [f"{text}."]


def _empty_layer_notes(results: Results) -> list[str]:
    """Name tensors that were pruned away whole: nothing passes through such a layer."""
    names = [
        str(layer.get("name"))
        for layer in results.get("layers") or ()
        if scalar(layer.get("sparsity")) == 1 and (scalar(layer.get("weights")) or 0) > 1
    ]
    return [f"Tensors that hold nothing but zeros: {', '.join(names)}."] if names else []
