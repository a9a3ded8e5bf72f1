"""The verdict in words: what it was held against, and by which limit."""

from types import SimpleNamespace

import pytest

from lightning_compress.lab.evaluation.verdict import verdict as judged
from lightning_compress.lab.report.pooled import pooled_verdicts
from lightning_compress.lab.report.wording import headline, notes, verdict_of

BASE = {"model": "vae", "data": "digits", "ratio": 0.5, "dense": {}, "compressed": {}}


def verdict(**changes):
    values = {"metric": "recall", "dense": 0.8, "compressed": 0.75, "allowed": 0.01}
    return {**values, "within": False, "higher_is_better": True, **changes}


def test_difference_is_taken_from_the_mean_over_seeds():
    given = verdict(dense_mean=0.82, allowed_spread=0.01, allowed_two_percent=0.0164)
    found = verdict_of({**BASE, "verdict": given})
    assert found.sentence == (
        "recall: 0.8000 (mean over seeds 0.8200) dense, 0.7500 compressed; worse by 0.0700, "
        "0.0100 is allowed as the smaller of seed spread 0.0100 and 2\N{NO-BREAK SPACE}% = 0.0164."
    )
    assert found.state == "outside"


@pytest.mark.parametrize(
    ("changes", "spread", "clause"),
    [
        ({"within": True}, {"recall": {"n": 3}}, "quality within the dense baseline's seed spread"),
        (
            {"within": True, "allowed_two_percent": 0.016},
            {},
            "quality within 2 % of the dense baseline (one seed)",
        ),
        ({"within": True}, {}, "quality within the allowed difference"),
        ({"within": None}, {}, "quality not judged"),
        ({"within": "yes"}, {}, "quality not judged"),
        ({"compressed": 0.9}, {}, "not within the allowed difference (recall better by 0.100)"),
        ({"compressed": 0.8}, {}, "(recall equal)"),
        ({"compressed": None}, {}, "(recall: difference unknown)"),
        ({"higher_is_better": None}, {}, "(recall 0.8000 to 0.7500)"),
        ({"compressed": float("nan")}, {}, "(recall 0.8000 to NaN)"),
    ],
)
def test_clauses(changes, spread, clause):
    results = {**BASE, "baseline_spread": spread, "verdict": verdict(**changes)}
    assert headline(results).endswith(clause)


def pairs(count, shift, *, kl=9.0, recall=0.8):
    """A verdict over pairs whose −ELBO differs by `shift`, give or take a little."""
    dense = [{"neg_elbo": 240.0 + n, "kl": kl, "recall": 0.8 + 0.01 * n} for n in range(count)]
    compressed = [
        {"neg_elbo": one["neg_elbo"] + shift + 0.01 * (n % 2), "kl": kl, "recall": recall}
        for n, one in enumerate(dense)
    ]
    found = judged("neg_elbo", dense, compressed, irreducible=189.86)
    info = {"neg_elbo": {"label": "−ELBO (nats)", "better": "lower"}}
    return {**BASE, "verdict": found.record(), "metric_info": info}


@pytest.mark.parametrize(
    ("results", "word", "clause", "said"),
    [
        (pairs(5, 0.1), "Established", "no loss established (5 pairs)", "No loss: established"),
        (
            pairs(1, 0.1),
            "Not established",
            "(−ELBO (nats) worse by 0.1000, 1 pair of the 5 seeds that it takes)",
            "No loss: not established",
        ),
        (pairs(5, 9.0), "Worse", "(−ELBO (nats) worse by 9.00)", "Worse than the dense baseline"),
        (
            pairs(5, 0.1, kl=0.01),
            "Not established",
            "dense baseline: posterior collapsed: KL 0.01 nats",
            "No loss: not established",
        ),
    ],
)
def test_a_paired_verdict_in_words(results, word, clause, said):
    found = verdict_of(results)
    assert (found.word, found.banner) == (word, said)
    assert clause in headline(results)


def test_error_bounds_margin_and_falls_stand_in_one_sentence():
    text = verdict_of(pairs(5, 0.1, recall=0.7)).sentence
    assert text.count(". ") == 0
    for part in (
        "242.0 dense, 242.1 compressed (means over pairs)",
        "worse by 0.104 (standard error 0.00245, n = 5 pairs, one-sided 95 % bounds",
        "margin 1.04 = 2 % of the reducible part",
        "+0.199 % of what a model can influence (189.9 are irreducible)",
        "recall fell by 0.120 (standard deviation over dense seeds 0.0158)",
    ):
        assert part in text, text
    alone = pairs(1, 0.1)
    alone["verdict"]["dense_mean"] = 250.0  # of further dense seeds
    text = verdict_of(alone).sentence
    assert "240.0 dense (mean over all dense seeds 250.0), 240.1 compressed; worse by" in text
    assert "spread unknown" in verdict_of(pairs(1, 0.1, recall=0.7)).sentence


def fallen(metric="neg_elbo", *, spread=None, **changes):
    """A run that keeps its metric, before and after; `changes` fall or rise beside it."""
    dense, compressed = {metric: 24.0}, {metric: 24.0}
    for key, (before, after) in changes.items():
        dense[key], compressed[key] = before, after
    sides = {"dense": {"quality": dense}, "compressed": {"quality": compressed}}
    found = {"metric": metric, "dense": 24.0, "compressed": 24.0, "allowed": 1.0, "within": True}
    return {**BASE, **sides, "verdict": found, "baseline_spread": spread or {}}


@pytest.mark.parametrize("kind", ["old", "paired", "unjudged"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"active_units": (13, 7)}, "active units fell from 13 to 7"),
        ({"kl": (9.5, 4.25)}, "KL (nats) fell from 9.50 to 4.25"),
        ({"precision": (0.8, 0.5), "kl": (4.0, 5.0)}, "precision fell from 0.800 to 0.500"),
        (
            {"recall": (0.7, 0.2), "active_units": (13, 7)},
            "active units fell from 13 to 7 and recall fell from 0.700 to 0.200",
        ),
    ],
)
def test_what_fell_beside_the_metric_is_told_in_the_banner(kind, changes, told):
    results = fallen(**changes)
    if kind == "paired":
        sides = ([results[side]["quality"]] for side in ("dense", "compressed"))
        results["verdict"] = judged("neg_elbo", *sides, irreducible=13.0).record()
    elif kind == "unjudged":
        results["verdict"] = None
    found = verdict_of(results)
    assert found.told == f"{found.banner}; {told}"
    assert headline(results).endswith(told)
    assert found.tone != "within"  # no green over a collapsed posterior


def test_a_fall_within_the_dense_spread_is_not_told():
    spread = {"active_units": {"std": 7.0, "n": 3}}
    found = verdict_of(fallen(active_units=(13, 7), spread=spread))
    assert (found.fallen, found.told, found.tone) == ("", found.banner, "within")
    found = verdict_of(fallen("recall", recall=(24.0, 24.0)))
    assert found.fallen == ""


def test_pooled_falls_are_means():
    runs = []
    for seed in range(5):
        dense, after = ({"neg_elbo": 240.0 + 9 * seed, "active_units": n} for n in (13, 7 + seed))
        found = judged("neg_elbo", [dense], [after], irreducible=189.86).record()
        sides = {"dense": {"quality": dense}, "compressed": {"quality": after}}
        runs.append(SimpleNamespace(results={**BASE, **sides, "seed": seed, "verdict": found}))
    (one,) = pooled_verdicts(runs)
    assert one.told == "No loss: established; active units fell from 13 to 9"
    assert one.tone == "unknown"


def test_runs_that_differ_in_the_seed_alone_are_judged_together():
    runs = []
    for seed in range(5):
        dense, compressed = ({"neg_elbo": 240.0 + 9 * seed + more} for more in (0, 0.1))
        found = judged("neg_elbo", [dense], [compressed], irreducible=189.86).record()
        sides = {"dense": {"quality": dense}, "compressed": {"quality": compressed}}
        results = {**BASE, **sides, "seed": seed, "verdict": found}
        runs.append(SimpleNamespace(results=results))
    (one,) = pooled_verdicts(runs)
    assert one.decided == "established"
    assert "n = 5 pairs" in one.sentence
    assert pooled_verdicts([*runs[:1], *runs[:1]]) == []  # the same seed is no pair more
    runs[0].results["compression"] = {"prune": {}}
    (one,) = pooled_verdicts(runs)
    assert "n = 4 pairs" in one.sentence


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0.5, "2.00× larger"), (3.0, "3.00× smaller"), (-1.0, "size ratio unknown")],
)
def test_size_in_words(ratio, words):
    assert headline({**BASE, "ratio": ratio}).startswith(f"VAE on digits: {words}, ")


def test_ratio_is_computed_where_it_is_not_stored():
    sides = {"dense": {"bytes": {"torch": 900}}, "compressed": {"bytes": {"lcz": 100}}}
    assert "9.00× smaller" in headline({**BASE, **sides, "ratio": None})


def test_notes_name_tensors_that_were_pruned_away():
    layers = [
        {"name": "whole", "sparsity": 1.0, "weights": 64},
        {"name": "nearly", "sparsity": 0.999, "weights": 64},
        {"name": "scalar", "sparsity": 1.0, "weights": 1},
    ]
    texts = notes({**BASE, "layers": layers})
    assert "Tensors that hold nothing but zeros: whole." in texts
    assert not any("zeros: " in text for text in notes(BASE))


def test_the_one_file_that_runs_is_told_with_its_bytes_and_its_speed():
    assert not any("One file" in text for text in notes(BASE))
    key = "onnxruntime int8, 1 thread, batch 1"
    dense = {"latency_ms": {key: {"median": 6.0}}}
    compressed = {"bytes": {"lcz_graph": 61_000}, "latency_ms": {key: {"median": 2.0}}}
    (text,) = (
        text
        for text in notes({**BASE, "dense": dense, "compressed": compressed})
        if "One file" in text
    )
    for part in ("61", "onnx_session", "2.00 ms", "1 thread, batch 1", "3.00×"):
        assert part in text
