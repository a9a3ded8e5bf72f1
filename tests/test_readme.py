"""The code that the README prints runs as it stands."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_the_callback_first():
    assert BLOCKS
    assert "GradualPruning" in BLOCKS[0]
    assert len(BLOCKS[0].strip().splitlines()) <= 12


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run_on_a_project_of_ones_own(index, tmp_path, monkeypatch):
    from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)  # a budget may be missed, which is a warning: not by luck

    class Fresh(TinyAutoencoder):
        pass

    model = TinyAutoencoder()
    names = {
        "MyVAE": Fresh,
        "model": model,
        "gan": TinyGAN(),
        "train_loader": batches(),
        "sample": __import__("torch").randn(2, 6),
    }
    quiet_trainer(tmp_path).fit(model, batches())
    dense = deepcopy(model.state_dict())
    for block in BLOCKS[: index + 1]:  # a reader goes from top to bottom
        if "trainer.fit(model" in block:
            names["model"] = TinyAutoencoder()  # each of them begins with a dense model
            names["model"].load_state_dict(dense)
        exec(block, names)
    if "ChannelPruning" in BLOCKS[index]:
        assert names["gan"].generator[0].out_features == 4
    if index == 0:
        from lightning_compress import sparsity

        assert sparsity(names["model"]) == pytest.approx(0.9, abs=0.02)


def test_commands_and_files_that_the_readme_names_exist():
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    for verb in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{verb}:" in makefile, verb
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).exists(), link
    for group, choice in re.findall(r"\b(model|data|experiment)=(\w+)", README):
        assert (root / "conf" / group / f"{choice}.yaml").exists(), (group, choice)
