"""SIGTERM, two runs in one folder, folders with odd names, and a clock that is moved."""

import datetime
import json
import re
import shlex
import shutil

import fault_jobs
import pytest
import torch

pytestmark = pytest.mark.faults


@pytest.fixture
def words(cache):
    return [*fault_jobs.SMALL, f"evaluate.cache_dir={cache}"]


SLOW = "+callbacks.slow._target_=fault_jobs.Slow"


def said(folder, process, kind="err"):
    return (folder / f"{process.pid}.{kind}").read_text()


def command(errors):
    """What the printed command line asks for."""
    (line,) = re.findall(r"To go on:\n  lightning-compress (.*)", errors)
    return shlex.split(line)


def compare(whole, other):
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, other))
    for side in ("dense", "compressed"):
        assert one[side]["quality"] == two[side]["quality"]
        states = [
            torch.load(folder / side / "final.ckpt", weights_only=True)["state_dict"]
            for folder in (whole, other)
        ]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert one["ratio"] == two["ratio"]
    assert (whole / "curves.csv").read_text() == (other / "curves.csv").read_text()


MOMENTS = {
    "in the first epoch": "dense/begun",
    "later": "compressed/last.ckpt",
    "when all is trained": "compressed/final.ckpt",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_ends_a_run_soon_and_it_goes_on_as_if_nothing_had_been(
    tmp_path, start, wait, terminate, words, whole_run, moment
):
    process = start(fault_jobs.app, tmp_path, [*words, SLOW, "hydra.run.dir=cut"])
    wait((tmp_path / "cut" / MOMENTS[moment]).exists, process)
    seconds = terminate(process)
    errors = said(tmp_path, process)
    assert process.exitcode == 130, errors
    assert seconds < 20  # clusters give half a minute
    assert "Traceback" not in errors
    assert not (tmp_path / "cut" / "results.json").exists()
    again = start(
        fault_jobs.app, tmp_path, [*command(errors), "hydra.run.dir=on", "~callbacks.slow"]
    )
    again.join(300)
    assert again.exitcode == 0, said(tmp_path, again)
    compare(whole_run, tmp_path / "on")


def test_a_second_run_in_a_folder_is_refused_while_the_first_runs(
    tmp_path, start, wait, words, whole_run
):
    words = [*words, "hydra.run.dir=one"]
    first = start(fault_jobs.app, tmp_path, [*words, SLOW])
    wait((tmp_path / "one" / "dense" / "begun").exists, first)
    records = {path: path.read_bytes() for path in (tmp_path / "one" / ".hydra").iterdir()}
    assert SLOW.encode() in records[tmp_path / "one" / ".hydra" / "overrides.yaml"]
    second = start(fault_jobs.app, tmp_path, words)
    second.join(60)
    # What the first was told is still what its folder says.
    assert records == {path: path.read_bytes() for path in (tmp_path / "one" / ".hydra").iterdir()}
    assert second.exitcode == 1
    errors = said(tmp_path, second)
    assert "error: another run is writing to " in errors
    assert "hydra.run.dir=" in errors
    assert first.is_alive()
    first.join(300)
    assert first.exitcode == 0, said(tmp_path, first)
    compare(whole_run, tmp_path / "one")


def test_a_killed_run_keeps_nobody_out(tmp_path, start, wait, words):
    words = [*words, "hydra.run.dir=one"]
    first = start(fault_jobs.app, tmp_path, [*words, SLOW])
    wait((tmp_path / "one" / "dense" / "begun").exists, first)
    first.kill()
    first.join()
    assert (tmp_path / "one" / "run.lock").exists()
    second = start(fault_jobs.app, tmp_path, words)
    second.join(300)
    assert second.exitcode == 0, said(tmp_path, second)


ODD = ["Übung (1), 'ähm' = 模型", "a b/ " + "長" * 20]


@pytest.mark.parametrize("name", ODD)
def test_odd_folder_names(tmp_path, start, wait, terminate, words, cache, whole_run, name):
    home = tmp_path / name
    home.mkdir(parents=True)
    shutil.copytree(cache, home / ".cache ü")
    run = "hydra.run.dir='läufe (ö)/1 & 2'"
    words = [*words, "evaluate.cache_dir='.cache ü'", "export.onnx=true", run]
    words = [word for word in words if word != "export.onnx=false"]
    process = start(fault_jobs.app, home, [*words, SLOW])
    folder = home / "läufe (ö)" / "1 & 2"
    wait((folder / "compressed" / "last.ckpt").exists, process)
    terminate(process)
    errors = said(home, process)
    assert process.exitcode == 130, errors
    again = start(fault_jobs.app, home, [*command(errors), run, "~callbacks.slow"])
    again.join(300)
    assert again.exitcode == 0, said(home, again)
    compare(whole_run, folder)
    shown = said(home, again, "out")
    assert "report: läufe (ö)/1 & 2/report.html" in shown
    for name in ("report.html", "samples.png", "compressed/decoder.int8.onnx",
                 "compressed/encoder.onnx", "dense/model.lcz"):  # fmt: skip
        assert (folder / name).stat().st_size > 0
    report = start(fault_jobs.app, home, ["report", "läufe (ö)", "--out", "bericht ß.html"])
    report.join(120)
    assert report.exitcode == 0, said(home, report)
    assert (home / "bericht ß.html").stat().st_size > 10_000


def test_a_clock_that_is_moved_back_and_forth(tmp_path, start, words, whole_run):
    loggers = "logger=[csv,tensorboard]"
    for _ in range(2):
        process = start(fault_jobs.app_with_odd_clock, tmp_path, [*words, loggers])
        process.join(300)
        assert process.exitcode == 0, said(tmp_path, process)
        seconds = re.findall(r"epoch \d+/\d+, (\S+) s", said(tmp_path, process, "out"))
        assert seconds
        assert all(0 <= float(one) < 300 for one in seconds)
    folders = list((tmp_path / "outputs" / "digits-vae").iterdir())
    assert len(folders) == 2
    for folder in folders:
        compare(whole_run, folder)
        results = json.loads((folder / "results.json").read_text())
        datetime.datetime.fromisoformat(results["created"])
        for side in ("dense", "compressed"):
            assert 0 <= results[side]["train_seconds"] < 300
            assert all(one["median"] > 0 for one in results[side]["latency_ms"].values())
        for name in ("report.html", "dense/csv/metrics.csv"):
            assert (folder / name).stat().st_size > 0
        assert list(folder.glob("compressed/tensorboard/events*"))
