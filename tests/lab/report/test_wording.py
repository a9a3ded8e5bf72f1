"""The verdict in words: what it was held against, and by which limit."""

import pytest

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
