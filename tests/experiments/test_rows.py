"""Rows of long benchmarks: made once, kept through kills, amended in place."""

import json

import pytest


@pytest.fixture
def rows_of():
    from shared.rows import Rows

    return lambda path: Rows(path, keys=("model", "seed"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_known_row_is_not_made_again(rows_of, tmp_path):
    file = tmp_path / "folder" / "rows.jsonl"
    made = rows_of(file).make(lambda: {"fid": 3.5}, model="vae", seed=0)
    again = rows_of(file).make(lambda: pytest.fail("made again"), model="vae", seed=0)
    assert again == made == lines(file)[0]
    assert (made["fid"], len(lines(file))) == (3.5, 1)


def test_a_row_that_a_kill_cut_short_is_made_anew(rows_of, tmp_path):
    file = tmp_path / "rows.jsonl"
    whole = json.dumps({"model": "vae", "seed": 0, "fid": 1.0})
    file.write_text(f'{whole}\n{{"model": "vae", "se')
    rows = rows_of(file)
    rows.make(lambda: {"fid": 2.0}, model="vae", seed=1)
    assert [(row["seed"], row["fid"]) for row in lines(file)] == [(0, 1.0), (1, 2.0)]


def test_amended_values_stand_in_the_file_and_the_rest_stays(rows_of, tmp_path):
    rows = rows_of(tmp_path / "rows.jsonl")
    for seed in (0, 1):
        rows.make(lambda: {"fid": 1.0, "speed": {"this": 1.0}}, model="vae", seed=seed)
    rows.amend(rows.known[("vae", 0)], speed={"this": 2.0})
    rows.make(lambda: {"fid": 4.0}, model="vae", seed=2)
    found = lines(tmp_path / "rows.jsonl")
    assert [row.get("speed") for row in found] == [{"this": 2.0}, {"this": 1.0}, None]
    assert [row["fid"] for row in found] == [1.0, 1.0, 4.0]
    assert rows_of(tmp_path / "rows.jsonl").known[("vae", 0)]["speed"] == {"this": 2.0}


def test_rows_of_other_keys_are_refused_and_stay(rows_of, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"model": "vae", "seed": 0}\n{"arm": "small", "seed": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: no 'model'; .*\['model', 'seed'\]"):
        rows_of(file)
    assert len(lines(file)) == 2
