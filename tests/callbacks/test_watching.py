"""The callbacks that watch: tables, curves, scores, progress and the end of a diverged run."""

import io

import pytest
import torch
from rich.console import Console
from tiny import TinyAutoencoder, batches, quiet_trainer

from lightning_compress import (
    CompressionSummary,
    GradualPruning,
    PostTrainingQuantization,
    ScoreMonitor,
    StopOnNonFinite,
)
from lightning_compress.callbacks import History, PlainProgress


def test_the_summary_covers_every_parameter_and_counts_what_was_achieved(tmp_path):
    page = io.StringIO()
    summary = CompressionSummary(console=Console(file=page, width=160))
    model = TinyAutoencoder()
    pruning = GradualPruning(final_sparsity=0.5, include=["decoder.*"])
    quiet_trainer(tmp_path, pruning, PostTrainingQuantization(weight_bits=5), summary).fit(
        model, batches()
    )
    start, end = page.getvalue().split("Compression achieved")
    for name, _ in model.named_parameters():
        assert name in start
    assert "not included" in start
    for name in ("decoder.weight", "encoder.0.weight"):
        zeros = int((model.get_parameter(name) == 0).sum())  # rounding makes some of its own
        row = next(line for line in end.splitlines() if name in line)
        assert row.replace("│", " ").split()[1:] == ["48", str(zeros), f"{zeros / 48:.4f}", "5"]
    assert int((model.decoder.weight == 0).sum()) >= 24


def test_a_score_is_logged_every_so_often_and_moves_no_random_stream(tmp_path):
    seen = []

    def score(model):
        assert not model.training
        seen.append(torch.rand(3).tolist())
        return {"val/answer": 42.0}

    def run(*callbacks):
        torch.manual_seed(5)
        history = History()
        trainer = quiet_trainer(tmp_path, *callbacks, history, max_epochs=5)
        trainer.fit(TinyAutoencoder(), batches(), batches(count=1))
        return torch.rand(1).item(), history

    watched, history = run(ScoreMonitor(score, every=2))
    alone, _ = run()
    assert watched == alone
    assert len(seen) == 3  # after epochs 2, 4 and the last one
    answers = [(step, value) for step, name, value in history.rows if name == "val/answer"]
    assert answers[0] == (16, 42.0)
    losses = [step for step, name, _ in history.rows if name == "train/loss"]
    assert losses == [8, 16, 24, 32, 40]


def test_plain_progress_prints_whole_lines_now_and_then(tmp_path):
    stream = io.StringIO()
    progress = PlainProgress("dense", lines=2, stream=stream)
    quiet_trainer(tmp_path, progress, max_epochs=6).fit(TinyAutoencoder(), batches())
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"dense: epoch {epoch}/6" for epoch in (1, 3, 6)
    ]
    assert "train/loss" in lines[0]


def test_a_diverged_run_names_the_metric_and_the_step(tmp_path):
    model = TinyAutoencoder("SGD", lr=1e25)
    with pytest.raises(FloatingPointError, match=r"(loss|train/loss) is (nan|inf) at step \d+"):
        quiet_trainer(tmp_path, StopOnNonFinite()).fit(model, batches())


def test_scores_less_often_than_never_are_refused():
    with pytest.raises(ValueError, match="every=0"):
        ScoreMonitor(lambda model: {}, every=0)
