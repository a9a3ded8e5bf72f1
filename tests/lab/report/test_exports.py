"""The report as Markdown and as CSV."""

import csv
import io

import pytest
from reporting import make_results, make_run

from lightning_compress.lab.app import main
from lightning_compress.lab.report.tables import write_export


def test_markdown_has_every_run_and_tables_of_equal_width(tmp_path):
    for place in range(2):
        results = make_results(place=place)
        make_run(tmp_path / "m" / f"a|b{place}", results, curves=False, samples=False)
    text = write_export([tmp_path / "m"], tmp_path / "all.md").read_text("utf-8")
    assert text.startswith("# All runs\n")
    for words in ("## 1. a|b0", "1 QGemm", "### Stored tensors", "encoder.0.weight", "31.2×"):
        assert words in text
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 1 + 2 * 3
    for block in blocks:
        bars = {line.replace("\\|", "").count("|") for line in block.strip().splitlines()}
        assert len(bars) == 1, block


def test_csv_names_the_runs_and_rounds_nothing(tmp_path):
    for place in range(2):
        make_run(
            tmp_path / "m" / str(place), make_results(place=place), curves=False, samples=False
        )
    text = write_export([tmp_path / "m"], tmp_path / "all.csv").read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["run"] for row in rows] == ["0", "1"]
    assert float(rows[1]["compressed.quality.kid"]) == 0.01234 * (1 + 0.011 * 2)


def test_the_command_line_goes_by_the_suffix(tmp_path, capsys):
    run = make_run(tmp_path / "run", curves=False, samples=False)
    for name in ("page.html", "page.md", "page.csv"):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(run), "--out", str(tmp_path / name)])
        assert stop.value.code == 0
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "page.md").read_text("utf-8").startswith("## 1. run")
    assert (tmp_path / "page.csv").read_text("utf-8").startswith("run,model,")
    assert "page.csv" in capsys.readouterr().out


def test_damaged_runs_and_other_suffixes_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="could not be read"):
        write_export([tmp_path], tmp_path / "a.md")
    with pytest.raises(ValueError, match=r"valid are \.html, \.md, \.csv"):
        write_export([tmp_path], tmp_path / "a.pdf")
