"""Going on with a run: its own settings count, others are refused by name."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.workflow.run_identity import check_same_run, with_recorded


@pytest.fixture
def told(tmp_path):
    folder = tmp_path / "a (b) run"
    (folder / ".hydra").mkdir(parents=True)
    words = ["model=vae", "seed=3", "+callbacks.x=1", "ckpt_path=older", "compression=[prune]"]
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(words))
    return folder


def test_what_a_run_was_told_comes_first_and_what_is_said_now_counts(told):
    path = f"ckpt_path='{told}'"
    assert with_recorded([path, "seed=4", "--config-dir=x"]) == [
        "model=vae",
        "+callbacks.x=1",
        "compression=[prune]",
        path,
        "seed=4",
        "--config-dir=x",
    ]
    assert with_recorded(["seed=4"]) == ["seed=4"]
    assert with_recorded(["ckpt_path=nowhere"]) == ["ckpt_path=nowhere"]


def test_a_checkpoint_leads_to_its_run(told):
    (told / "dense").mkdir()
    (told / "dense" / "last.ckpt").touch()
    assert "seed=3" in with_recorded([f"ckpt_path='{told}/dense/last.ckpt'"])


def composed(*words):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", [*words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=7"], "seed was 0 and is 7"),
        (["model.width=8"], "model.width was 32 and is 8"),
        (["compression=[quantize]"], "compression.prune.final_sparsity was .* and is None"),
        (["trainer.max_epochs=3"], "trainer.max_epochs was .* and is 3"),
        (["data=mnist"], "data._target_ was"),
    ],
)
def test_other_settings_are_refused(tmp_path, words, message):
    OmegaConf.save(composed(), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=message):
        check_same_run(composed(*words), tmp_path)


def test_where_things_lie_and_what_is_measured_may_change(tmp_path):
    OmegaConf.save(composed("data=mnist"), tmp_path / "config.yaml")
    free = ["threads=2", "data.folder=x", "export.onnx=false", "evaluate.samples=9", "logger=[csv]"]
    check_same_run(composed("data=mnist", *free, "trainer.accelerator=cpu"), tmp_path)
    check_same_run(composed("seed=9"), tmp_path / "without a record")
