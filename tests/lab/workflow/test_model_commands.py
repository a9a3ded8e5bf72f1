"""`sensitivity` and `advise`: their files, on each way to name a model, and that recipes run."""

import json

import pytest
import yaml
from PIL import Image

from lightning_compress import compression_recipe
from lightning_compress.budget.sensitivity import Sensitivity
from lightning_compress.callbacks.recipe import GOALS
from lightning_compress.lab.evaluation.profile import profile_layers
from lightning_compress.lab.models import VAE
from lightning_compress.lab.workflow.advising import explain_recipes

SMALL = [
    "model.width_multiplier=0.25",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "export.onnx=false",
]
SHORT = ["--rows", "64", "--sparsities", "0.5,0.9", "--bits", "3,6"]


@pytest.mark.parametrize("model", ["vae", "dcgan", "simple_net"])
def test_a_scan_of_a_model_that_is_trained_for_it(cli, tmp_path, model):
    code, out, err = cli("sensitivity", *SHORT, "--out", "here", f"model={model}")
    assert code == 0, err
    found = Sensitivity.load(tmp_path / "here" / "sensitivity.json")
    metric = {"vae": "neg_elbo", "dcgan": "fid", "simple_net": "cross_entropy"}[model]
    assert found.metric == metric
    assert all(one.sparsities == (0.5, 0.9) and one.bits == (3, 6) for one in found.layers)
    assert f"scanning {found.layers[0].path}" in out
    assert "one layer at a time" in out
    with Image.open(tmp_path / "here" / "sensitivity.png") as picture:
        assert picture.size[0] > 800


def test_a_scan_of_a_run_and_a_recipe_that_really_runs(cli, tmp_path):
    assert cli("compression=[prune]", "compression.prune.end=1.0", "hydra.run.dir=run")[0] == 0
    code, _, err = cli("sensitivity", "run", *SHORT, small=False)
    assert code == 0, err
    scan = Sensitivity.load(tmp_path / "run" / "sensitivity.json")
    code, _, err = cli("sensitivity", "run/dense/final.ckpt", *SHORT, "--out", "other", small=False)
    assert code == 0, err
    assert Sensitivity.load(tmp_path / "other" / "sensitivity.json") == scan

    code, out, err = cli("advise", "run", *SHORT, "--out", "advice", "--ratio", "8", small=False)
    assert code == 0, err
    path = tmp_path / "advice" / "experiment" / "advised.yaml"
    recipe = yaml.safe_load(path.read_text())
    text = path.read_text()
    assert text.count("#") > 8
    assert "lightning-compress --config-dir" in out
    asked = recipe["compression"]["prune"]["final_sparsity"]
    assert set(asked) <= {one.path for one in scan.layers}
    assert all(0 < value < 1 for value in asked.values())

    code, _, err = cli("--config-dir", "advice", "experiment=advised", "hydra.run.dir=advised")
    assert code == 0, err
    results = json.loads((tmp_path / "advised" / "results.json").read_text())
    layers = {row["name"]: row for row in results["layers"]}
    for name, sparsity in asked.items():
        assert layers[name]["sparsity"] >= sparsity - 0.01
    assert results["ratio"] > 4


def test_a_recipe_for_a_gan_has_a_teacher_and_a_guard(cli, tmp_path):
    code, _, err = cli("advise", *SHORT, "--out", "advice", "dcgan")
    assert code == 0, err
    text = (tmp_path / "advice" / "experiment" / "advised.yaml").read_text()
    assert "distill_gan" in text
    code, _, err = cli("--config-dir", "advice", "experiment=advised", "hydra.run.dir=advised")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sensitivity", "nowhere"], "no run's folder, checkpoint or override, and no model"),
        (["sensitivity", "."], "it has no config.yaml"),
        (["sensitivity", "modle=vae"], "there is no key 'modle'"),
        (["sensitivity", "--bits", "9", "vae"], "bits=9"),
        (["advise", "--ratio", "0.5", "vae"], "ratio=0.5"),
    ],
)
def test_mistakes_end_with_one_clear_message(cli, words, message):
    code, out, err = cli(*words, small="vae" in words)
    assert code == 2
    assert message in out + err
    assert "Traceback" not in out + err


def test_advice_explains_each_ready_made_recipe_for_the_model():
    model = VAE(image_size=8, width=16)
    text = explain_recipes(model, profile_layers(model.parts()), ["model=vae", "data=digits"])
    for goal in GOALS:
        recipe = compression_recipe(goal, teacher="dense", model=model)
        assert repr(recipe) in text
        assert f"lightning-compress model=vae data=digits compression={goal}" in text
    assert "bytes are mostly in" in text
