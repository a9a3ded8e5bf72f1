"""Run folders that were made to do harm: named on the page, and the rest is there."""

import csv
import json
import os
import time
from pathlib import Path

import pytest
from reporting import make_results

from lightning_compress.lab.report.page import write_report


def run_folder(path, **changes):
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(make_results(**changes)))
    return path


def hydra(folder, name, text):
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / name).write_text(text)


def page(root):
    start = time.monotonic()
    text = write_report([root]).read_text("utf-8")
    assert time.monotonic() - start < 30
    return text


def test_nothing_of_the_readers_environment_stands_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2-in-clear")
    folder = run_folder(tmp_path / "run")
    hydra(folder, "overrides.yaml", "- a=${oc.env:MY_SECRET}\n- ${oc.env:MY_SECRET}\n")
    hydra(folder, "config.yaml", "a: ${oc.env:MY_SECRET}\n")
    text = page(tmp_path)
    assert "hunter2" not in text
    assert "${oc.env:MY_SECRET}" in text


def bomb(levels=12):
    lines = ["- &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, levels)]
    return "\n".join(lines) + "\n"


OVERRIDES = {
    "an alias bomb": bomb(),
    "a merge bomb": "a0: &a0 {k: 1}\n" + "".join(
        f"a{at}: &a{at} {{<<: [{', '.join([f'*a{at - 1}'] * 9)}]}}\n" for at in range(1, 12)
    ),
    "itself": "&a\n- *a\n",
    "deep": "[" * 20_000,
    "a tag": "- !!python/object/apply:os.system [echo]\n",
    "no list": "a: 1\n",
    "large": "- " + "x" * (2 << 20),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OVERRIDES))
def test_a_bad_record_of_the_call_is_a_note(tmp_path, case):
    folder = run_folder(tmp_path / "run")
    hydra(folder, "overrides.yaml", OVERRIDES[case])
    text = page(tmp_path)
    assert "record of the call could not be read" in text
    assert "Verdict" in text or "verdict" in text


def surrogates(folder):
    results = make_results(model="a\ud800b")
    results["layers"][0]["name"] = "\udfff"
    (folder / "results.json").write_text(json.dumps(results))
    hydra(folder, "overrides.yaml", '- "\\ud800"\n')


def curves(value):
    def change(folder):
        with (folder / "curves.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["run", "step", "metric", "value"])
            for step in range(400):
                rows.writerow(["dense", step if value else 1e308, "train/loss", value or 1])

    return change


def huge(folder):
    results = make_results()
    for side in ("dense", "compressed"):
        results[side]["bytes"] = dict.fromkeys(results[side]["bytes"], 1e308)
    results["verdict"].update(compressed=1e308)
    for layer in results["layers"]:
        layer.update(bytes=1e308, weights=1)
    (folder / "results.json").write_text(json.dumps(results))


def wrong(folder):
    results = make_results()
    results["metric_info"] = {"neg_elbo": {"label": ["x"], "better": {"a": 1}}}
    results["layers"] = [{"name": {}, "shape": 7, "bytes": "x"}]
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    "change", [surrogates, curves(1e308), curves(-1e308), curves(0), huge, wrong]
)
def test_odd_texts_and_numbers_end_no_report(tmp_path, change):
    run_folder(tmp_path / "good", place=1)
    change(run_folder(tmp_path / "odd"))
    text = page(tmp_path)
    assert text.count("<svg") > 4


def nested(depth):
    return "{" + '"a":{' * depth + "}" * depth + "}"


def deep_results(folder):
    text = json.dumps(make_results())
    (folder / "results.json").write_text(text[:-1] + f', "more": {nested(900)}}}')


def too_deep(folder):
    (folder / "results.json").write_text(nested(100_000))


def large(folder):
    (folder / "results.json").write_text(" " * (17 << 20))


def pipe(folder):
    (folder / "results.json").unlink()
    os.mkfifo(folder / "results.json")


def outside(folder):
    target = folder.parent.parent / "secret.json"
    target.write_text(json.dumps(make_results(model="SECRET")))
    (folder / "results.json").unlink()
    (folder / "results.json").symlink_to(target)


@pytest.mark.parametrize("change", [deep_results, too_deep, large, pipe, outside])
def test_a_bad_folder_is_named_and_the_rest_is_there(tmp_path, change):
    run_folder(tmp_path / "runs" / "good", place=1)
    change(run_folder(tmp_path / "runs" / "odd"))
    text = page(tmp_path / "runs")
    assert "VAE on digits" in text
    assert "Could not be read" in text
    assert "odd/results.json" in text
    assert "SECRET" not in text


def test_files_that_are_pipes_or_links_out_are_notes(tmp_path):
    folder = run_folder(tmp_path / "runs" / "run")
    (tmp_path / "secret").write_text("SECRET")
    os.mkfifo(folder / "curves.csv")
    hydra(folder, "overrides.yaml", "- seed=1\n")
    (folder / ".hydra" / "config.yaml").symlink_to(tmp_path / "secret")
    text = page(tmp_path / "runs")
    assert "curves.csv is no regular file" in text
    assert "config.yaml is a link out of the folder" in text
    assert "SECRET" not in text


def lead_out(folder, target):
    (folder / "plots").symlink_to(target, target_is_directory=True)


def block(folder, target):
    (folder / "plots").write_text("")


@pytest.mark.parametrize("change", [lead_out, block])
def test_figures_are_not_saved_through_a_link_or_over_a_file(tmp_path, change):
    (tmp_path / "target").mkdir()
    for name in ("one", "two"):
        run_folder(tmp_path / "runs" / name, place=len(name))
    for folder in (tmp_path / "runs" / "one", tmp_path / "runs"):
        change(folder, tmp_path / "target")
    text = page(tmp_path / "runs")
    assert not list((tmp_path / "target").iterdir())
    assert "no figure is saved there" in text
    assert (tmp_path / "runs" / "two" / "plots").is_dir()
    assert text.count("<svg") > 4


def test_many_metrics_are_cut_with_a_word(tmp_path):
    folder = run_folder(tmp_path / "run")
    lines = [f"dense,1,m{at},1.0" for at in range(5000)]
    (folder / "curves.csv").write_text("run,step,metric,value\n" + "\n".join(lines))
    assert "5000 metrics: the first 100 are drawn" in page(tmp_path)


def test_a_folder_of_no_text_name_is_shown(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    run_folder(folder)
    assert "\\udcff" in page(tmp_path)
