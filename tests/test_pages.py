"""The pages' code runs, their names exist, and every public name has a place in the reference."""

import importlib.util
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from pages import MyVAE, python_blocks, quiet, run_blocks
from tiny import batches
from torch import nn

import lightning_compress
from lightning_compress import sparsity

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md"))
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))


def _load_checks():
    spec = importlib.util.spec_from_file_location("checks", DOCS / "checks.py")
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    return checks


CHECKS = _load_checks()


def text_of(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture
def dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    model = MyVAE()
    assert Trainer is not quiet
    quiet(max_epochs=1, enable_checkpointing=False).fit(model, batches())
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # of runs of a few steps: targets are missed
def test_the_recipes_run(dense, tmp_path, monkeypatch):
    blocks = python_blocks(text_of("recipes"))
    assert len(blocks) == 7
    names = {"dense": dense, "model": deepcopy(dense), "MyVAE": MyVAE}
    names = run_blocks(text_of("recipes"), monkeypatch, **names)
    for name in ("small.lcz", "fast.onnx", "both.lcz", "kept.lcz", "kept.onnx"):
        assert (tmp_path / name).stat().st_size > 0
    (made,) = names["session"].run(
        None, {names["session"].get_inputs()[0].name: names["sample"].numpy()}
    )
    assert made.shape == (2, 6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_quick_start_runs(dense, tmp_path, monkeypatch):
    names = run_blocks(text_of("index"), monkeypatch, model=dense, MyVAE=MyVAE)
    assert isinstance(names["model"], MyVAE)
    assert names["model"] is not dense
    assert sparsity(names["model"]) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("name", ["methods", "extending", "models"])
def test_the_code_of_other_pages_runs(name, dense, monkeypatch):
    names = {"LightningModule": LightningModule, "teacher": dense}
    assert python_blocks(text_of(name))
    run_blocks(text_of(name), monkeypatch, **names)


@pytest.mark.parametrize(
    "name", ["adaptive", "channels", "deployment", "distillation", "pruning", "quantization"]
)
def test_the_examples_of_the_methods_are_made(name, dense, monkeypatch):
    """Blocks that show calls alone: with every public name at hand, they make what they say."""
    public = {one: getattr(lightning_compress, one) for one in lightning_compress.__all__}
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    lightning_compress.save_compressed(dense, "model.lcz")
    given = {"teacher": dense, "self": MyVAE(), "MyModel": MyVAE, "generator": generator}
    names = {**public, **given, "lightning_compress": lightning_compress, "z": torch.randn(8, 4)}
    try:
        run_blocks(text_of(name), monkeypatch, **names)
    except lightning_compress.MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_code_font_exist(page):
    assert CHECKS.unknown_names(page.read_text(encoding="utf-8")) == []


def test_a_misspelled_name_is_found():
    wrong = "Gradual" + "Prunning"
    assert CHECKS.unknown_names(f"Use `{wrong}(final_sparsity=0.9)`.") == [wrong]
    assert CHECKS.unknown_names(f"```python\nfrom lightning_compress import {wrong}\n```") == [
        wrong
    ]
    assert CHECKS.unknown_names("Use `GradualPruning(final_sparsity=0.9)` and `<path>`.") == []


def test_every_public_name_has_an_entry_in_the_reference():
    assert CHECKS.public_names() == list(lightning_compress.__all__)
    assert CHECKS.missing_names(REFERENCE) == []
    line = "::: lightning_compress.GradualPruning\n"
    assert CHECKS.missing_names(REFERENCE.replace(line, "")) == ["GradualPruning"]


def test_every_callback_of_the_reference_has_an_example():
    names = [
        line.rpartition(".")[2]
        for line in text_of("reference/callbacks").splitlines()
        if line.startswith(":::")
    ]
    assert len(names) > 20
    lacking = [one for one in names if ">>>" not in getattr(lightning_compress, one).__doc__]
    assert lacking == []


def test_the_build_stops_at_what_the_checks_find(monkeypatch):
    monkeypatch.setattr(CHECKS, "missing_names", lambda _: ["Absent"])
    with pytest.raises(ValueError, match="no entry for Absent"):
        CHECKS.on_pre_build()
    wrong = "Gradual" + "Prunning"

    class Page:
        class file:  # noqa: N801
            src_uri = "a.md"

    assert CHECKS.on_page_markdown("`GradualPruning`", page=Page) == "`GradualPruning`"
    with pytest.raises(ValueError, match=f"a.md: names that no source has: {wrong}"):
        CHECKS.on_page_markdown(f"`{wrong}`", page=Page)


def test_long_tables_of_figures_are_folded():
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert text.count("<details markdown>") == text.count("</details>"), page.name
        if "<!-- figures -->" in text:
            before = text.split("<!-- figures -->")[0]
            assert before.count("<details markdown>") > before.count("</details>"), page.name
