"""Tables in the terminal, as Markdown and as CSV, and the numbers in them."""

import csv
import io
import math

import pytest
from rich.console import Console

from lightning_compress.lab.report import wording
from lightning_compress.lab.report.tables import (
    csv_table,
    main_groups,
    markdown_table,
    print_summary,
)

RESULTS = {
    "model": "dcgan",
    "data": "a|b [red]<x>",
    "seed": 3,
    "dense": {
        "quality": {"fid": 20.0, "recall": 0.5, "active_units": 13},
        "bytes": {"torch": 1_000_000},
        "latency_ms": {"batch 1": {"median": 2.0, "p10": 1.9, "p90": 2.25}},
    },
    "compressed": {
        "quality": {"fid": 21.0, "precision": 0.25},
        "bytes": {"torch": 1_000_000, "lcz": 25_000, "onnx_int8": None},
        "latency_ms": {"batch 1": {"median": 4.0}},
    },
    "layers": [{"name": "w"}],
    "baseline_spread": {"fid": {"mean": 20.5, "std": 0.75, "n": 5}},
    "verdict": {
        "metric": "fid",
        "dense": 20.0,
        "compressed": 21.0,
        "difference": 1.0,
        "allowed": 0.4,
        "within": False,
        "higher_is_better": False,
    },
}


def rows(results):
    return {row.label: row for group in main_groups(results) for row in group.rows}


def test_rows_hold_the_numbers():
    found = rows(RESULTS)
    assert found["fid ↓"].cells() == (
        "fid ↓", "20.00", "21.00", "+1.00 (+5.0 %)", "", "20.50 ± 0.75 (n=5)",
    )  # fmt: skip
    assert found["active_units"].cells()[1:3] == ("13", wording.DASH)
    assert found["precision"].dense == wording.DASH
    assert found[".lcz (entropy coded)"].change == f"40.0{wording.TIMES}"
    assert found["batch 1"].dense == f"2.00 (1.90{wording.DASH}2.25)"
    assert found["batch 1"].change == f"0.50{wording.TIMES}"
    assert "ONNX, int8" not in found  # nobody asked for it


def test_terminal_summary_takes_no_markup_from_names():
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(RESULTS, console)
    text = console.export_text()
    assert "DCGAN on a|b [red]<x>: 40.0" in text
    assert "quality not within the allowed difference (fid worse by 1.00)" in text
    assert (
        "Not within. fid: 20.00 dense, 21.00 compressed; worse by 1.00, 0.400 is allowed." in text
    )


def test_markdown_cells_cannot_leave_their_column():
    odd = {**RESULTS, "metric_info": {"fid": {"label": "F|I\nD <b> `x`", "better": "lower"}}}
    lines = markdown_table(odd).splitlines()
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines)
    assert "F\\|I D &lt;b> \\`x\\` ↓" in lines[3]


def test_csv_holds_every_value_unrounded():
    read = list(csv.DictReader(io.StringIO(csv_table([RESULTS, {"model": 'with "quotes", ü'}]))))
    assert [row["model"] for row in read] == ["dcgan", 'with "quotes", ü']
    assert read[0]["dense.latency_ms.batch 1.p90"] == "2.25"
    assert read[0]["baseline_spread.fid.std"] == "0.75"
    assert read[1]["seed"] == ""
    assert "layers" not in read[0]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (wording.kilobytes, 0.0, "0.0 kB"),
        (wording.kilobytes, 12_345_678.0, "12,345.7 kB"),
        (wording.milliseconds, 0.0123, "0.012"),
        (wording.milliseconds, 12.34, "12.3"),
        (wording.milliseconds, 123.4, "123"),
        (wording.number, 0.0, "0.000"),
        (wording.number, 12345.6, "12,346"),
        (wording.number, 1e-9, f"1.000e{wording.MINUS}09"),
        (wording.number, math.nan, "NaN"),
        (wording.number, -math.inf, f"{wording.MINUS}\N{INFINITY}"),
        (wording.signed, -0.25, f"{wording.MINUS}0.250"),
        (wording.signed, None, wording.DASH),
        (wording.times, 0.953, f"0.95{wording.TIMES}"),
        (wording.times, 1712.4, f"1,712{wording.TIMES}"),
        (wording.percent, 1.0, "100.0 %"),
        (wording.count, 1234567.0, "1,234,567"),
        (wording.scalar, True, None),
        (wording.scalar, 10**400, math.inf),
        (wording.scalar, "3", None),
    ],
)
def test_formats(form, value, text):
    assert form(value) == text


def test_narrow_terminal_cuts_no_number():
    console = Console(width=60, record=True, file=io.StringIO())
    print_summary(RESULTS, console)
    assert "\N{HORIZONTAL ELLIPSIS}" not in console.export_text()
