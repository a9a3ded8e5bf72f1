"""Which folders are found, and what is said about those that cannot be read."""

import json

import pytest

from lightning_compress.lab.report.loading import find_results, load_run, load_runs

MINIMAL = {"model": "vae", "data": "digits", "dense": {}, "compressed": {}}


def write(folder, content=MINIMAL):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "results.json").write_text(text, "utf-8")
    return folder


def test_runs_are_found_at_every_depth_and_once(tmp_path):
    folders = [write(tmp_path / name) for name in ("b/1", "b/0", "a", "c/ü ü/x")]
    (tmp_path / "empty").mkdir()
    found = find_results([tmp_path, tmp_path / "a", str(tmp_path / "b")])
    assert found == sorted(folder / "results.json" for folder in folders)
    assert find_results([tmp_path / "b"]) == [tmp_path / "b/0/results.json", found[2]]


def test_nothing_found_names_what_was_looked_for(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no results\.json in .*empty"):
        load_runs([tmp_path / "a", tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"gone .*results\.json"):
        load_runs([tmp_path / "gone"])
    with pytest.raises(ValueError, match="at least one folder"):
        load_runs([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "one JSON object, got list"),
        ('{"model": "vae"}', "lacks data, dense, compressed; required are model, data"),
        ({**MINIMAL, "model": 3}, "model must be a string, got 3"),
        ({**MINIMAL, "layers": "many"}, "layers must be a list of objects, got 'many'"),
        ({**MINIMAL, "layers": [3]}, "layers must be a list of objects"),
        ({**MINIMAL, "ratio": "31"}, "ratio must be a number or null, got '31'"),
        ({**MINIMAL, "evaluator": {"floor": 3}}, "evaluator.floor must be an object of numbers"),
        ({**MINIMAL, "dense": {"quality": {"kid": "low"}}}, "dense.quality must be an object of"),
        ({**MINIMAL, "compressed": {"bytes": [1]}}, "compressed.bytes must be an object of"),
        ({**MINIMAL, "dense": {"latency_ms": {"a": 1}}}, "dense.latency_ms must be an object of"),
        ({**MINIMAL, "samples": {"grid": 1}}, "samples must be an object of file names"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    write(tmp_path / "bad", content)
    write(tmp_path / "good")
    runs, unreadable = load_runs([tmp_path])
    assert [run.folder for run in runs] == [tmp_path / "good"]
    assert [item.path for item in unreadable] == [tmp_path / "bad" / "results.json"]
    assert message in unreadable[0].reason


def test_bytes_that_are_not_utf8_are_damage(tmp_path):
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in load_runs([tmp_path])[1][0].reason


def test_curves_are_grouped_by_metric_and_run(tmp_path):
    write(tmp_path)
    (tmp_path / "curves.csv").write_text(
        "run,step,metric,value\ndense,1,val/kid,0.5\ndense,2,val/kid,nan\ncompressed,1,val/kid,7\n"
    )
    run = load_run(tmp_path)
    assert run.curves["val/kid"]["compressed"] == [(1.0, 7.0)]
    assert run.curves["val/kid"]["dense"][0] == (1.0, 0.5)
    assert run.notes == ()


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("run,step,metric\n", "column(s) value are missing"),
        ("", "column(s) metric, run, step, value are missing"),
        ("run,step,metric,value\ndense,1,a,2\ndense,x,a,2\n", "line 3: could not convert"),
        ("run,step,metric,value\ndense,1\n", "line 2"),
        ("run,step,metric,value\n\x00,1,a\n", "curves.csv could not be read"),
    ],
)
def test_damaged_curves_leave_the_run_usable(tmp_path, text, note):
    write(tmp_path)
    (tmp_path / "curves.csv").write_text(text)
    run = load_run(tmp_path)
    assert run.curves == {}
    assert note in run.notes[0]


def test_damaged_hydra_record_is_a_note(tmp_path):
    write(tmp_path / ".hydra" / "..")
    (tmp_path / ".hydra").mkdir(exist_ok=True)
    for text in ("{a: [", "a: 1"):
        (tmp_path / ".hydra" / "overrides.yaml").write_text(text)
        run = load_run(tmp_path)
        assert run.command is None
        assert "Hydra's record of the call could not be read" in run.notes[-1]
