"""A run folder names objects, so it is code: only known classes, and what the user allows."""

import sys

import pytest
from omegaconf import OmegaConf

from lightning_compress.lab.trust import ALLOW, check_targets
from lightning_compress.lab.workflow.run_identity import with_recorded

SMALL = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.accelerator=cpu"]


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module beside the run that leaves a trace when it is imported."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "evil_module.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(place)!r}, 'ran').touch()\n"
        "class Data:\n"
        "    def __init__(self, **arguments): pass\n"
    )
    monkeypatch.syspath_prepend(place)
    yield place / "ran"
    sys.modules.pop("evil_module", None)


HARMFUL = [
    "joblib.load", "os.system", "builtins.eval", "torch.load", "torch.hub.load", "torch.os.system",
    "torch.utils.data.dataloader.multiprocessing.Process", "lightning_compress.files.Path",
    "lightning_compress.files.write_atomically", "lightning_compress", "torch.nn.Nothing",
    "torchx.Evil", "lightning_compress_evil.A", "", 7, "${oc.env:HOME}",
]  # fmt: skip


@pytest.mark.parametrize("target", HARMFUL)
def test_what_is_no_class_of_a_known_package_is_refused(target):
    for place in ({"_target_": target}, {"a": [{"b": {"_target_": target}}]}):
        with pytest.raises(ValueError, match=r"_target_ .*LIGHTNING_COMPRESS_ALLOW=") as caught:
            check_targets(place, "a folder")
        assert repr(str(target)) in str(caught.value)


def test_known_classes_and_what_is_allowed_by_name_pass(monkeypatch):
    known = [
        "torch.nn.Linear", "torch.optim.Adam", "lightning.pytorch.Trainer",
        "torchmetrics.image.PeakSignalNoiseRatio", "torchvision.transforms.Resize",
        "lightning_compress.GradualPruning",
        "lightning_compress.lab.workflow.training.wandb_logger",
    ]  # fmt: skip
    check_targets([{"_target_": name} for name in known], "a folder")
    check_targets({"_target_": "my.models.Net"}, "a folder", ["my.models"])
    with pytest.raises(ValueError, match=r"'my.modelsX'"):
        check_targets({"_target_": "my.modelsX"}, "a folder", ["my.models"])
    monkeypatch.setenv(ALLOW, "other,my")
    check_targets({"_target_": "my.models.Net"}, "a folder")


@pytest.mark.parametrize("command", ["sensitivity", "advise"])
@pytest.mark.parametrize(
    "config",
    [
        {"data": {"_target_": "evil_module.Data"}},
        {
            "data": {
                "_target_": "lightning_compress.lab.data.Digits",
                "x": {"_target_": "evil_module.D"},
            }
        },
        {"data": "${oc.create:${text}}", "text": "{_target_: evil_module.Data}"},
    ],
)
def test_looking_at_a_run_runs_nothing_of_its_own(cli, tmp_path, evil, command, config):
    (tmp_path / "run").mkdir()
    OmegaConf.save(OmegaConf.create(config), tmp_path / "run" / "config.yaml")
    code, _, err = cli(command, "run", small=False)
    assert code == 2
    assert "evil_module" in err
    assert not evil.exists()


def test_what_is_allowed_by_name_is_used(cli, tmp_path, evil):
    (tmp_path / "run").mkdir()
    config = {"data": {"_target_": "evil_module.Data"}, "seed": 0}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "run" / "config.yaml")
    with pytest.raises(AttributeError):  # the class is no data module: it was made
        cli("sensitivity", "run", "--allow", "evil_module", small=False)
    assert evil.exists()


RECORDED = {
    "a target": ("data._target_=evil_module.Data", "evil_module.Data"),
    "a callback": ("+callbacks.x={_target_: evil_module.Data}", "evil_module.Data"),
    "a search path": ("hydra.searchpath=[file:///tmp]", "where Hydra looks"),
    "a launcher": ("hydra/launcher=joblib", "where Hydra looks"),
    "an option": ("--config-dir=/tmp", "is an option"),
    "many runs": ("-m", "is an option"),
}


@pytest.mark.parametrize("case", list(RECORDED))
def test_going_on_with_a_run_runs_nothing_of_its_own(cli, tmp_path, evil, case):
    word, why = RECORDED[case]
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml([word]))
    code, _, err = cli("ckpt_path=run")
    assert code == 1
    assert why in err
    assert not evil.exists()


def test_what_is_typed_now_is_the_users_own(cli, tmp_path, evil):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("- seed=1\n- data=digits\n")
    words = ["ckpt_path=run", "data._target_=evil_module.Data"]
    assert with_recorded(words)[0] == "seed=1"
    _, _, err = cli(*words)
    assert "LIGHTNING_COMPRESS_ALLOW" not in err
