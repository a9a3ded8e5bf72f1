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

__all__ = [
    "DASH",
    "MINUS",
    "TIMES",
    "MetricLabel",
    "Verdict",
    "count",
    "headline",
    "kilobytes",
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
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def scalar(value: object) -> float | None:
    """Return a plain number as float; None for everything that is not one (bool included)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # JSON allows integers of any length
            return math.inf if value > 0 else -math.inf
    return None


def _special(value: float | None) -> str | None:
    """Return the text of a missing, undefined or infinite value, else None."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else f"{MINUS}\N{INFINITY}"
    return None


def count(value: float | None) -> str:
    """Format an integer with thousands separators.

    >>> count(1234567), count(None)
    ('1,234,567', '–')
    """
    special = _special(value)
    return special if special is not None else f"{value or 0:,.0f}".replace("-", MINUS)


def number(value: float | None, digits: int = 4) -> str:
    """Format with `digits` significant digits and thousands separators.

    >>> number(239.54321), number(0.0312345), number(-12345.6), number(None)
    ('239.5', '0.03123', '−12,346', '–')
    """
    special = _special(value)
    if special is not None or value is None:
        return special or DASH
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        text = f"{value:.{digits - 1}e}"
    else:
        exponent = math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference, always with its sign.

    >>> signed(0.5), signed(0.0)
    ('+0.500', '0')
    """
    if value == 0:
        return "0"
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def kilobytes(size: float | None) -> str:
    """Format bytes as kB of 1000 bytes with one decimal.

    >>> kilobytes(1_345_678)
    '1,345.7 kB'
    """
    special = _special(size)
    return special if special is not None else f"{(size or 0) / 1000:,.1f} kB"


def milliseconds(value: float | None) -> str:
    """Format milliseconds with three digits, without the unit.

    >>> milliseconds(0.12345), milliseconds(1.2345), milliseconds(1234.5)
    ('0.123', '1.23', '1,234')
    """
    special = _special(value)
    if special is not None or value is None:
        return special or DASH
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage with one decimal.

    >>> percent(0.9312)
    '93.1 %'
    """
    special = _special(fraction)
    return special if special is not None else f"{100 * (fraction or 0):.1f} %"


def times(ratio: float | None) -> str:
    """Format a ratio with three digits.

    >>> times(31.234), times(1.0), times(171.3)
    ('31.2×', '1.00×', '171×')
    """
    text = milliseconds(ratio) if ratio is None or abs(ratio) >= 1 else number(ratio, 2)
    special = _special(ratio)
    return special if special is not None else f"{text}{TIMES}"


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
FALLING = {"kl": "KL (nats)", "active_units": "active units"}
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
    """

    state: str
    clause: str
    sentence: str
    decided: str = ""

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


def section(results: Results, key: str) -> Mapping[str, Any]:
    """Return an optional section; an empty mapping where it is missing or null."""
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def model_name(results: Results) -> str:
    """Return the model as the field writes it."""
    model = str(results["model"])
    return MODEL_NAMES.get(model, model)


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
    """Put the verdict of `results.json` into words; it is never decided anew here."""
    verdict = section(results, "verdict")
    if not verdict:
        text = "quality not judged: results.json holds no verdict"
        return Verdict("unknown", text, f"{text[0].upper()}{text[1:]}.")
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
    return Verdict(state, clause, _sentence(results, verdict))


def paired_verdict(results: Results, verdict: Mapping[str, Any]) -> Verdict:
    """Put a verdict over pairs of seeds into words: in one sentence, with what fell beside it."""
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
    return Verdict(VERDICTS[decided][0], clause, _paired_sentence(label, verdict), decided)


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


def _paired_sentence(label: str, verdict: Mapping[str, Any]) -> str:
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
    for name, fall in section(verdict, "falls").items():
        spread = scalar(fall.get("dense_standard_deviation"))
        known = "one dense seed, spread unknown"
        if spread is not None:
            known = f"standard deviation over dense seeds {number(spread, 3)}"
        parts.append(
            f"{FALLING.get(name, name)} fell by {number(scalar(fall['fall']), 3)} ({known})"
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
    return f"{model_name(results)} on {results['data']}: {size}, {verdict_of(results).clause}"


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
