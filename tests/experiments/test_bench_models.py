"""The benchmark of the larger models: what its rows and its table say."""

import pytest
from hydra import compose, initialize_config_dir

from lightning_compress.lab.config import config_dir

CURVES = "run,step,metric,value\n" + "".join(
    f"{run},{step},val/mel_loss,{value}\n"
    for run, values in (
        ("dense", (4, 3, 2, 1.9) * 2 + (2.5, 1.5) * 2),
        ("compressed", (9,) * 11 + (1,)),
    )
    for step, value in enumerate(values)
)


def row(seed, **changes):
    quality = {"mel_distance": 0.5 + seed / 10, "stft_distance": 1.0, "fid": 3.0}
    known = {
        "model": "vocoder",
        "seed": seed,
        "words": "",
        "steps": {"dense": 1200, "compressed": 1200},
        "converged": True,
        "last_third": 0.01,
        "quality": {"dense": quality, "compressed": quality},
        "params": [1000, 500],
        "macs": [8000, 2000],
        "ratio": 20.0 + 2 * seed,
        "ms": {"dense": 8.0, "int8": 2.0, "ratio": 0.25},
        "seconds_a_sample": 0.512,
    }
    return known | changes


def test_the_last_third_is_compared_with_the_best_before_it(tmp_path):
    from bench_models import improvement

    path = tmp_path / "curves.csv"
    path.write_text(CURVES)
    assert improvement(path, "val/mel_loss") == pytest.approx(1 - 1.5 / 1.9)
    assert improvement(path, "val/elbo") is None
    path.write_text("".join(CURVES.splitlines(keepends=True)[:12]))
    assert improvement(path, "val/mel_loss") is None  # eleven epochs say nothing


def test_the_table_has_a_line_a_model_over_its_seeds():
    from bench_models import table

    *_, line = table([row(0), row(1)]).splitlines()
    for cell in ("21.0 ± 1.4×", "4.0× fewer", "8 → 2 ms: 64 → 256× real time", "2 seeds |"):
        assert cell in line
    assert "log-mel distance 0.55 ± 0.0707 → 0.55 ± 0.0707" in line
    assert "not converged" not in line
    assert "goes on from it" not in line
    assert "goes on from it" in table([row(0, start="dense")]).splitlines()[-1]


def test_an_unconverged_baseline_and_a_missing_file_are_told():
    from bench_models import table

    *_, line = table([row(0, converged=False, last_third=0.3, ms={})]).splitlines()
    assert "**not converged**: still 30% better in the last third" in line
    assert "no int8 file" in line
    *_, line = table([row(0, converged=False, last_third=None)]).splitlines()
    assert "**not converged** |" in line


def test_a_page_gets_its_section_once_and_keeps_the_rest(tmp_path):
    from bench_models import render
    from shared.rows import Rows

    rows, page = tmp_path / "rows.jsonl", tmp_path / "models.md"
    Rows(rows, keys=("model", "seed", "words")).make(
        lambda: {k: v for k, v in row(0).items() if k not in ("model", "seed", "words")},
        model="vocoder",
        seed=0,
        words="",
    )
    page.write_text("# Other people's models\n\nText.\n")
    for _ in range(2):
        render(rows, page)
    text = page.read_text()
    assert text.startswith("# Other people's models\n\nText.\n")
    assert text.count("## Beyond 28 pixels") == text.count("| `vocoder`") == 1


def test_each_model_of_the_table_is_an_experiment_with_its_metrics():
    from bench_models import METRICS, MODELS

    for name, model in MODELS.items():
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", overrides=[f"experiment={model.experiment}"])
        assert cfg.model._target_, name
        assert set(model.metrics) <= set(METRICS)
