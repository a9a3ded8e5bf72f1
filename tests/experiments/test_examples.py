"""Projects of plain users: they run as printed, and none of our models is in them."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from lightning_compress import inspect_compressed

EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as a user does, and gives what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("name", "artifact"), [("plain_vae", "vae.lcz"), ("plain_gan", "generator.lcz")]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_example_runs_as_a_script(run, name, artifact, tmp_path):
    said = run(name, 2, tmp_path)
    info = inspect_compressed(tmp_path / artifact)
    assert f"{info.bytes} bytes" in said
    assert info.ratio > 3
    assert ("loads exactly: True" in said) == (name == "plain_vae")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_vocoder_is_pruned_and_its_judge_is_not(run, tmp_path):
    said = run("vocoder", 3, tmp_path)
    assert "zeros: generator 80.0%, msd 0.0%" in said
    assert inspect_compressed(tmp_path / "vocoder.lcz").ratio > 5


def test_a_checkpoint_is_compressed_in_one_shot(run, tmp_path):
    said = run("one_shot", 3, tmp_path)
    dense, small = map(float, re.search(r"error (\S+) -> (\S+)", said).groups())
    assert small < 1.5 * dense
    assert "loads exactly: True" in said
    assert "'QLinearConv': 3" in said
    assert inspect_compressed(tmp_path / "decoder.lcz").ratio > 5


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_template_takes_one_file_of_yaml(run, tmp_path):
    said = run("hydra_template", "trainer.max_epochs=3", f"output_dir={tmp_path}")
    assert re.search(r"best\.ckpt, zeros 8\d\.\d%", said)
    assert inspect_compressed(tmp_path / "vae.lcz").ratio > 8
    # Without that file it is the project as it was.
    run("hydra_template", "trainer.max_epochs=1", f"output_dir={tmp_path}", "callbacks=default")
    assert inspect_compressed(tmp_path / "vae.lcz").ratio < 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, in Lightning's use
def test_the_cli_takes_one_file_of_yaml(run, tmp_path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    config = EXAMPLES / "lightning_cli.yaml"
    options = ["--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path}"]
    said = run("lightning_cli", "fit", "--config", config, *options)
    (path,) = tmp_path.rglob("vae.lcz")
    assert f"{path}: {path.stat().st_size} bytes" in said
    assert inspect_compressed(path).ratio > 8


@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_the_vae_of_scvi_tools(run, tmp_path):
    pytest.importorskip("scvi", reason="needs pip install scvi-tools")
    said = run("scvi_model", 3, tmp_path)
    assert "zeros: 80.0% of all weights in use" in said
    assert "loads exactly: True" in said


@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_a_decoder_half_as_wide_for_diffusers(run, tmp_path):
    pytest.importorskip("diffusers", reason="needs pip install diffusers")
    said = run("diffusers_autoencoder", 1, tmp_path)
    large, small = map(int, re.search(r"weights: (\d+) -> (\d+)", said).groups())
    assert large > 3.5 * small
    assert "zeros 50.0%" in said
    assert 4 * large > 15 * inspect_compressed(tmp_path / "decoder.lcz").bytes


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_example_is_somebody_elses_project(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {node.module or "" for node in nodes}
    ours = {name for name in names if name.startswith("lightning_compress")}
    assert ours == {"lightning_compress"}
