"""Help, version, and one message for each mistake on the command line."""

import re
import subprocess
import sys

import pytest

import lightning_compress
from lightning_compress.lab import app, usage
from lightning_compress.lab.config import config_dir

SMALL = []


def errors(err):
    """The messages, without what hints stand below them."""
    return [line for line in err.splitlines() if line and not line.startswith("  ")]


def test_help_shows_commands_with_examples_then_each_choice_with_a_line(cli):
    code, out, err = cli("--help")
    assert code in (0, None), err
    commands, _, rest = out.partition("Options:")
    groups, _, config = rest.partition("Config of these words")
    for name in (*app.COMMANDS, "report", "federated"):
        line = re.search(rf"^  {name} +\S.{{20,}}\n +lightning-compress {name} \S", commands, re.M)
        assert line, name
    for path in config_dir().glob("[!h]*/*.yaml"):  # names recur: within its own group
        _, _, choices = groups.partition(f"\n  {path.parent.name}\n")
        choices = re.split(r"^  \S", choices, maxsplit=1, flags=re.MULTILINE)[0]
        assert re.search(rf"^    {path.stem} +\S.{{10,}}$", choices, re.MULTILINE), path
        assert not re.search(rf"^    {path.stem} .*\.\.\.$", choices, re.MULTILINE), path
    assert "final_sparsity: 0.9" in config
    assert max(map(len, (commands + groups).splitlines())) <= 100


@pytest.mark.parametrize(
    "words", [["--help", "model=dcgan"], ["model=dcgan", "-h"], ["help", "model=dcgan"]]
)
def test_help_of_a_choice_shows_its_config(cli, words):
    code, out, _ = cli(*words, small=False)
    assert code in (0, None)
    assert "discriminator_width" in out


def test_the_commands_of_the_help_are_those_that_run(cli):
    assert set(usage.COMMANDS) == {*app.COMMANDS, "report", "federated"}
    for command in (*app.COMMANDS, "report"):
        code, out, _ = cli(command, "--help", small=False)
        assert code == 0
        assert f"usage: lightning-compress {command}" in out


def test_version(cli):
    assert cli("--version")[:2] == (0, f"lightning-compress {lightning_compress.__version__}\n")


def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "lightning_compress", "reprot", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "did you mean 'report'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["reprot"], "did you mean 'report'?"),
        (["reprot", "outputs", "--out", "page.html"], "did you mean 'report'?"),
        (["Inspekt", "model.lcz"], "did you mean 'inspect'?"),
        (["unpak", "model.lcz"], "did you mean 'unpack'?"),
        (["sensitivty", "model=vae"], "did you mean 'sensitivity'?"),
        (["fedrated", "seed=1"], "did you mean 'federated'?"),
        (["qqq"], "commands are report, inspect"),
        (["model", "=", "vae"], "write model=vae"),
        (["model=", "vae"], "write model=vae"),
        (["seed=1", "model", "=vae"], "write model=vae"),
        (["vae"], "write model=vae"),
        (["model"], "model=dcgan, model=flow_matching"),
        (["model=vae", "report"], "comes first: lightning-compress report"),
        (["--hlep"], "did you mean '--help'?"),
        (["seed=1", "--mutlirun"], "did you mean '--multirun'?"),
    ],
)
def test_words_that_are_no_settings_say_what_was_meant(cli, words, expected):
    code, out, err = cli(*words, small=False)
    assert code == 2
    assert out == ""
    assert expected in err
    assert len(errors(err)) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.max_epoch=3"], "'trainer.max_epoch'. Closest: trainer.max_epochs"),
        (["compression.prune.final_sparsty=1"], "Closest: compression.prune.final_sparsity"),
        (["compression.quantize.weight_bit=4"], "Closest: compression.quantize.weight_bits"),
        (["sede=1"], "Closest: seed"),
        (["~trainer.max_epoch"], "Closest: trainer.max_epochs"),
        (["compression.channels.end=0.3"], "belongs to compression=channels, which is not chosen"),
        (["model=vea"], "model=vea: there is no such choice. Closest: vae"),
        (["model=vea", "compression=[prone]"], "Closest: prune"),
        (["compression=[prune,quantise]"], "Closest: quantize"),
        (["-m", "model=vae,vea"], "Closest: vae"),
        (["model.lr=[1"], "cannot read 'model.lr=[1'"),
        (["+model.foo=3"], "unexpected keyword argument 'foo'"),
        (["compression=smallest", "compression.recipe.goal=tiny"], "valid are ['smallest'"),
        (["federated", "federated.ronds=2"], "Closest: federated.rounds"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_setting_is_one_message_with_near_names(cli, words, expected):
    code, out, err = cli(*words, small=False)
    assert code == 1
    assert expected in out + err
    assert len(errors(err)) == 1
    close = re.search(r"Closest: ([^;]+)", err)
    if close and "," in close[1]:
        near = close[1].split(". ")[0].strip().split(", ")
        assert len(near) == len(set(near))


@pytest.mark.parametrize(
    "words",
    [["inspect", "x.lcz"], ["pack", "x.pt"], ["pack", "x.onnx"], ["unpack", "x.lcz"],
     ["unpack", "x.lcz", "--onnx", "y.onnx"], ["diff", "x.pt", "y.pt"], ["diff", "x", "y"],
     ["sensitivity", "x"], ["advise", "x"]],
)  # fmt: skip
def test_a_path_that_is_not_there_is_named(cli, words):
    code, _, err = cli(*words, small=False)
    assert code == 2
    assert words[1] in err
    assert len(errors(err)) == 1
    assert "Errno" not in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "--flag", "x.lcz"], "no option '--flag': lightning-compress inspect --help"),
        (["pack", "x.pt", "--rdok", "1"], "no option '--rdok': did you mean '--rdoq'?"),
        (["report", "runs", "--ut=page.html"], "no option '--ut': did you mean '--out'?"),
        (["unpack", "x.lcz", "y.pt"], "'y.pt' is one word too many"),
        (["advise", "vae", "--bits", "four"], "--bits: 'four': valid are integers separated by"),
        (["sensitivity", "vae", "--sparsities", "a"], "--sparsities: 'a': valid are fractions"),
    ],
)
def test_a_wrong_option_of_a_command_is_one_message_with_its_usage(cli, words, expected):
    code, out, err = cli(*words, small=False)
    assert (code, out) == (2, "")
    assert expected in err
    assert f"usage: lightning-compress {words[0]} " in err
    assert err.count("error:") == 1


@pytest.mark.parametrize("command", ["inspect", "pack", "unpack", "diff"])
def test_a_folder_and_an_empty_file_are_refused_by_each_command(cli, tmp_path, command):
    (tmp_path / "folder.lcz").mkdir()
    (tmp_path / "empty.lcz").touch()
    for name, expected in (("folder", "is a folder: name a file"), ("empty", "is empty")):
        path = str(tmp_path / f"{name}.lcz")
        code, _, err = cli(command, path, *([path] if command == "diff" else []), small=False)
        assert code == 2
        assert err == f"error: {path} {expected}{': it has 0 bytes' if name == 'empty' else ''}\n"


def test_a_wrong_count_of_rows_is_refused_before_a_model_trains(cli):
    code, out, err = cli("advise", "vae", "--rows", "-1", small=False)
    assert (code, out) == (2, "")
    assert err == "error: --rows -1: expected an integer of at least 1\n"


def test_federated_settings_are_refused_before_a_model_trains(cli):
    code, out, err = cli("federated", "federated.rounds=-1", "threads=1", small=False)
    assert (code, out) == (1, "")
    assert err.startswith("error: federated.rounds=-1: expected an integer of at least 1")
