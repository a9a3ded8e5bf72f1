"""Dense baselines: when they count as converged, and a run in pieces, each with its Trainer."""

import time

import pytest
import torch

from lightning_compress import inspect_compressed
from lightning_compress.lab.evaluation.verdict import baseline_faults

FLAT = [9.0, 6.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("curves", "converged"),
    [
        ([FLAT, [one + 0.4 for one in FLAT]], True),
        ([FLAT], False),  # one seed has no spread
        ([FLAT, FLAT], False),  # no seed spread is no allowance
        ([[*FLAT[:6], 4.0, 3.0, 2.0], [*FLAT[:6], 4.0, 3.0, 2.1]], False),
        ([[9.0, 8.0, 7.0], [9.0, 8.0, 7.1]], False),
    ],
)
def test_converged_is_less_than_a_seed_spread_over_the_last_third(curves, converged):
    from baselines import has_converged

    assert has_converged(curves) is converged


@pytest.fixture
def made(tmp_path):
    from baselines import Baseline, Plan

    words = ["model=vae", "model.width=8", "data=digits", "data.batch_size=32"]
    plan = Plan([*words, f"evaluate.cache_dir={tmp_path / 'features'}"], 3, "neg_elbo")

    def baseline(folder):
        one = Baseline("vae", plan, 0, tmp_path / folder, limit=2)
        one.evaluator.extractor = None
        return one

    return baseline


def test_a_run_in_pieces_ends_with_a_half_precision_file_and_a_row(made, monkeypatch):
    monkeypatch.setattr("lightning_compress.lab.workflow.quality.trained_feature_network", no_net)
    over = time.monotonic() - 1
    lengths, rates = [], []
    for _ in range(3):
        one = made("pieces")
        piece = one.train(over)  # an epoch a piece
        lengths.append(len(piece.curve))
        state = torch.load(one.last, weights_only=False)
        (group,) = state["optimizer_states"][0]["param_groups"]
        rates.append(group["lr"])
        assert one.file.exists() is (len(piece.curve) == 3)
    assert lengths == [1, 2, 3]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * group["initial_lr"] == pytest.approx(1e-4)
    assert {info.dtype for info in inspect_compressed(one.file).per_tensor.values()} <= {
        "float16",
        "float32",
        "int64",
    }
    row = one.row(piece)
    weights = sum(p.numel() for p in one.fresh().parameters())
    assert row["bytes"] < 2.2 * weights
    assert row["curve"] == piece.curve
    assert row["faults"] == baseline_faults({key: row[key] for key in ("kl", "active_units")})


def no_net(*_, **__):
    return None
