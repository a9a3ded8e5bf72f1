"""Sweep overrides as search spaces, and folders that the same command finds again."""

import pytest

from lightning_compress.lab.sweeps import sweep_folder
from lightning_compress.lab.sweeps.study import search_space, words_of

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")
Float, Int, Choice = (
    optuna.distributions.FloatDistribution,
    optuna.distributions.IntDistribution,
    optuna.distributions.CategoricalDistribution,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("interval(0.5,0.98)", Float(0.5, 0.98)),
        ("tag(log,interval(0.001,0.1))", Float(0.001, 0.1, log=True)),
        ("int(interval(4,9))", Int(4, 9)),
        ("range(4,9)", Int(4, 8)),
        ("range(2,9,2)", Int(2, 8, step=2)),
        ("range(0.5,0.9,0.25)", Choice(["0.5", "0.75"])),
        ("choice(global,layer)", Choice(["global", "layer"])),
        ("0.5,0.8", Choice(["0.5", "0.8"])),
        ("[prune],[prune,qat]", Choice(["[prune]", "[prune,qat]"])),
    ],
)
def test_each_kind_of_sweep_has_its_distribution(value, expected):
    space, fixed = search_space({"key": value}, ["model=vae"])
    assert (space, fixed) == ({"key": expected}, ["model=vae"])


def test_the_command_line_takes_the_place_of_a_parameter():
    space, fixed = search_space({"bits": "range(4,9)", "s": "0.1,0.2"}, ["bits=8"])
    assert list(space) == ["s"]
    assert fixed == ["bits=8"]


def test_a_search_over_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing is swept"):
        search_space({}, ["model=vae"])


def test_words_are_what_hydra_reads_back():
    assert words_of({"a": 0.123456789, "b": 7, "c": "[prune,qat]"}) == [
        "a=0.12346", "b=7", "c=[prune,qat]",
    ]  # fmt: skip


def test_a_sweeps_folder_is_its_settings_and_not_how_it_is_run():
    words = ["model=vae", "compression=[prune,quantize]", "a.final_sparsity=0.5,0.8"]
    folder = sweep_folder(words)
    assert folder.name.startswith("final_sparsity-")
    assert sweep_folder([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]) == folder
    assert sweep_folder([*words, "seed=1"]) != folder
    assert sweep_folder(["sweep=pareto"]).name.startswith("pareto-")
    assert sweep_folder(["compression=[prune],[prune,qat]"]).name.startswith("compression-")
