"""The headline's benchmark: its plan names rows that there are, its tables say what rows say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import bernoulli

from lightning_compress import inspect_compressed
from lightning_compress.lab.data import Digits
from lightning_compress.lab.evaluation import latency
from lightning_compress.lab.models import DCGAN

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MEASURE = {
    "feature": "a network",
    "feature_accuracy": 0.9,
    "samples": 397,
    "floor": {"fid": 4.3, "kid": 0.01, "precision": 0.95, "recall": 0.94},
}


def row(arm, seed, value, ratio, **more):
    speed = {f"this{engine}, batch {n}": 1.0 for engine in ("", ", OpenVINO") for n in (1, 16)}
    row = {"model": "vae", "seed": seed, "arm": arm, "neg_elbo": value, "ratio": ratio}
    row |= {"active_units": 20, "fid": 9.0, "precision": 0.8, "recall": 0.5, "file": ".lcz"}
    return row | {"bytes": 1000, "macs_left": 1.0, "speed": speed} | more


def test_each_row_of_the_plan_is_there_and_each_that_is_there_is_planned():
    from shared.headline_arms import ARMS, PEERS
    from shared.headline_runs import OTHERS, SETS, TORCH_PRUNING

    models = [model for group in SETS.values() for model in group.values()]
    plans = [model.plan(first=True) for model in models]
    assert all(len(set(plan)) == len(plan) and plan[0] == "dense" for plan in plans)
    for model, plan in zip(models, plans, strict=True):
        assert model.plan(first=False) == plan[: len(model.main)] == [*model.main]
    assert {arm for plan in plans for arm in plan} == set(ARMS)
    assert set(PEERS) == {*OTHERS, TORCH_PRUNING}
    for plan in plans:  # its weights are those of the row before
        for arm in (one for one in plan if one.endswith(", nncodec")):
            assert plan.index(arm) > plan.index(arm.removesuffix(", nncodec"))


def test_the_tables_say_what_is_no_loss_and_how_far_real_images_are_apart(tmp_path):
    from show_headline import main

    home, page = tmp_path / "rows" / "digits", tmp_path / "headline.md"
    home.mkdir(parents=True)
    main_rows = [
        row("dense", 0, 25.0, 1.2, measure=MEASURE, neg_iwae=24.5),
        row("dense", 1, 25.2, 1.2),
    ]
    others = [
        row("zeros and grids, 90 %", 0, 25.15, 50.0, neg_iwae=24.9),
        row("90 % zeros", 1, 25.3, 10.0),
        row("nncodec", 0, 25.1, 9.0, speed={"this, batch 1": 1.5, "this, batch 16": 2.0}),
    ]
    text = "".join(json.dumps(one) + "\n" for one in [*main_rows, *others])
    (home / "vae.jsonl").write_text(text)
    between = "<!-- headline: fashion -->\nas it was\n<!-- /headline: fashion -->\n"
    own = "<!-- headline: digits -->\n<!-- /headline: digits -->\n"
    page.write_text(f"before\n{between}{own}after\n")
    main(tmp_path / "rows", tmp_path)
    said = page.read_text()
    assert said.startswith(f"before\n{between}")  # of which there are no rows
    assert not (tmp_path / "headline.png").exists()
    assert said.endswith("after\n")
    # 2 % of what is above the entropy of the digits' own pixels, which the table computes.
    data = Digits()
    data.setup()
    entropy = bernoulli(data.test_dataset.tensors[0].double().numpy()).entropy()
    margin = 0.02 * (25.1 - entropy.reshape(len(entropy), -1).sum(1).mean())
    assert "Dense: 25.10 ± 0.14 (± standard deviation over seeds); no loss means" in said
    assert f"at most {margin:.3g} worse (2 % of the reducible part)" in said
    assert "right on 90.0% of the test images" in said
    assert "Fréchet distance 4.3, precision 0.950, recall 0.940" in said
    lines = {line.split("|")[1].strip(): line for line in said.splitlines() if line[:2] == "| "}
    assert "| 50.0× | 25.15 | +0.15, +" in lines["zeros and grids, 90 %"]  # of seed 0
    assert "| not established | 24.90 |" in lines["zeros and grids, 90 %"]
    assert "| 10.0× | 25.30 | +0.1, +" in lines["90 % zeros"]  # of seed 1
    assert "| 1.2× | 25.10 ± 0.14 | +0, +0.0% | – | – |" in lines["dense"]  # −IWAE of one seed
    assert lines["nncodec"].endswith("| all | 1.5× / 2.0× | – / – | 1 |")
    assert (tmp_path / "headline_digits.png").stat().st_size > 10_000


def test_speeds_of_all_parts_stand_under_the_table():
    from show_headline import Table

    speeds = [
        {"this, batch 1": 2.0, "this, batch 16": 3.0},
        {"this, batch 1": 2.4, "this, batch 16": 4},
    ]
    rows = [row("dense", 0, 25.0, 1.2), row("dense", 1, 25.0, 1.2)]
    rows += [row("zeros and grids, 90 %", n, 25, 50, speed_of_all=speeds[n]) for n in (0, 1)]
    whole = speeds[0] | {"int8, batch 1": 5.0, "int8, batch 16": 7.0}
    quarter = "a quarter of the MACs, int8, taught"
    rows += [row(quarter, 0, 25, 10, speed_of_all=whole), row(quarter, 1, 25, 10)]
    assert Table("digits", "vae", rows).markdown().splitlines()[-1] == (
        "All parts one after the other, faster: zeros and grids, 90 %: 2.2× / 3.5× in fp32 "
        f"(n = 2); {quarter}: 2.0× / 3.0× in fp32, 5.0× / 7.0× in int8 (n = 1)."
    )


def kept(name, model):
    from shared.rows import read_rows
    from show_headline import Table

    path = EXPERIMENTS / "rows" / "headline" / name / f"{model}.jsonl"
    return Table(name, model, read_rows(path))


def test_the_page_holds_the_tables_of_the_rows_that_are_kept():
    from shared.headline_runs import SETS

    page = (EXPERIMENTS.parent / "docs" / "headline.md").read_text(encoding="utf-8")
    for name, models in SETS.items():
        for model in models:
            assert kept(name, model).markdown() in page, (name, model)


@pytest.mark.parametrize(
    ("line", "model", "arm"),
    [
        ("loses half of its multiplications", "vae", "half of the MACs, 90 % zeros, grids, taught"),
        ("the same VAE with a quarter", "vae", "a quarter of the MACs, int8, taught"),
        ("a VAE of width 64 with an eighth", "vae_wide", "an eighth of the MACs, int8, taught"),
        (
            "reads Fashion-MNIST row by row",
            "recurrent_vae",
            "half of the MACs, 65 % zeros, grids, taught",
        ),
        ("width 32: ", "dcgan", "a sixteenth of the MACs, 60 % zeros, grids, taught"),
        (
            "width 64, as it ships",
            "dcgan_wide",
            "a sixteenth of the MACs, 70 % zeros, grids, taught",
        ),
        (
            "a WGAN-GP is where it ends",
            "wgan_gp",
            "a sixteenth of the MACs, 60 % zeros, grids, taught",
        ),
    ],
)
def test_the_readme_says_what_the_rows_say(line, model, arm):
    """Its figures are typed by hand: ratio, quality of the row, and of the dense one."""
    readme = (EXPERIMENTS.parent / "README.md").read_text(encoding="utf-8")
    (said,) = [one for one in readme.splitlines() if line in one]
    said = said[said.index(line) :]
    table = kept("fashion", model)
    ratio = table.ratio(arm)
    assert f"{ratio:.0f}×" in said or f"{ratio:.1f}×" in said
    for which in (arm, "dense"):
        values = [one[table.metric] for one in table.arms[which]]
        assert f"{mean(values):.1f} ± {stdev(values):.1f}" in said
    speeds = [one["speed"] for one in table.arms[arm]]
    for batch in (1, 16) if "faster" in said else ():
        kind = "int8" if f"int8, batch {batch}" in speeds[0] else "this"
        assert f"{mean(one[f'{kind}, batch {batch}'] for one in speeds):.1f}×" in said
    both = [one["speed_of_all"] for one in table.arms[arm]] if "together" in said else []
    for key in both[0] if both else ():  # fp32 and int8, batch 1 and 16
        assert f"{mean(one[key] for one in both):.1f}×" in said


@pytest.mark.parametrize(
    ("told", "made"),
    [([], ["0 a", "0 b", "1 a", "2 a"]), (["--seeds", "1", "4"], ["1 a", "1 b", "4 a", "4 b"])],
)
def test_each_model_has_its_own_seeds_where_none_are_told(tmp_path, monkeypatch, told, made):
    import bench_headline

    models = {
        name: SimpleNamespace(seeds=seeds, plan=lambda first: ["dense"])
        for name, seeds in {"a": 3, "b": 1}.items()
    }
    seen = []
    monkeypatch.setattr(bench_headline, "SETS", {"fashion": models})
    monkeypatch.setattr(
        bench_headline, "make_missing", lambda runs, *_: seen.append(f"{runs.seed} {runs.name}")
    )
    monkeypatch.setattr(
        bench_headline,
        "Runs",
        lambda name, model, seed, _: SimpleNamespace(name=name, seed=seed, model=model),
    )
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), *told])
    bench_headline.main()
    assert seen == made


def test_the_verdicts_of_a_table_are_paired_and_tell_what_fell_and_what_collapsed():
    from show_headline import Table

    noise = [0.0, 0.01, -0.01, 0.02, 0.0]
    rows = [row("dense", n, 250.0 + 10 * n, 1.2, kl=20.0 + 0.1 * n) for n in range(5)]
    rows += [row("90 % zeros", n, 250.1 + 10 * n + noise[n], 10, kl=15.0) for n in range(5)]
    rows += [row("nncodec", n, 255.0 + 10 * n + noise[n], 10, kl=20.3) for n in range(5)]
    rows += [row("trained W8A8", n, 240.0 + 10 * n, 10, kl=20.0) for n in range(4)]
    lines = Table("fashion", "vae", rows).markdown().splitlines()
    said = {line.split("|")[1].strip(): line for line in lines if line[:2] == "| "}
    assert f"at most {0.02 * (270 - 189.86):.3g} worse (2 % of the reducible part)" in lines[0]
    assert "| established; KL −5.2 |" in said["90 % zeros"]
    assert "| +5 ± 0.0051 (SE), +6.2% | worse |" in said["nncodec"]
    assert "| not established |" in said["trained W8A8"]  # four pairs
    rows = [{**one, "kl": 0.01} if one["arm"] == "dense" else one for one in rows]
    text = Table("fashion", "vae", rows).markdown()
    assert "**Dense baseline: posterior collapsed: KL 0.01 nats, 20 active units (5 of 5" in text
    assert "| established" not in text


def test_compressed_rows_have_as_many_epochs_as_the_dense_one(monkeypatch, tmp_path):
    from shared.headline_runs import SETS, Runs

    seen = []
    model = torch.nn.Linear(1, 1)
    runs = Runs.__new__(Runs)
    runs.name, runs.seed, runs.folder = "vae", 0, tmp_path
    runs.model = SETS["digits"]["vae"]
    start = SimpleNamespace(model=lambda: model)
    start.fit = lambda _, callbacks, **more: seen.append((len(callbacks), more))
    runs.start = start
    runs.dense()
    runs.fit(model, [SimpleNamespace(), SimpleNamespace()])
    (dense, of_dense), (compressed, of_compressed) = seen
    assert (dense, compressed) == (1, 3)  # beside the learning rate's
    assert of_dense == of_compressed == {"epochs": SETS["digits"]["vae"].epochs[1], "steps": None}


def test_the_ratio_is_that_of_the_generator_alone(monkeypatch, tmp_path):
    from shared import headline_files

    gan = DCGAN(image_size=8, width=8, discriminator_width=8)
    torch.save(gan.generator.state_dict(), tmp_path / "model.pt")
    size = (tmp_path / "model.pt").stat().st_size
    runs = SimpleNamespace(fresh=lambda: gan, start=SimpleNamespace(quality=lambda _: {"kid": 1.0}))
    monkeypatch.setattr(headline_files, "speeds", lambda *_: {})
    shipped = headline_files.Shipped(gan, ".lcz", 1000, tmp_path)
    found = headline_files.measured(runs, shipped, tmp_path, 1)
    assert (found["dense_bytes"], found["ratio"]) == (size, round(size / 1000, 2))


def test_all_seeds_are_trained_and_judged_on_the_same_pictures(tmp_path):
    from shared.finetuning import Start
    from shared.headline_runs import SETS

    plan = SETS["digits"]["vae"]
    first, second = (
        Start("vae", seed, tmp_path, {"vae": ([*plan.overrides], 1, [])}, data=plan.data)
        for seed in (0, 1)
    )
    assert (first.cfg.seed, second.cfg.seed) == (0, 1)
    assert first.data.fingerprint == second.data.fingerprint  # which names the network
    for split in ("train_dataset", "test_dataset"):
        pair = [getattr(start.data, split).tensors[0] for start in (first, second)]
        assert torch.equal(*pair)


@pytest.mark.parametrize(("name", "spared"), [("digits", []), ("fashion", ["*.weight_ih_l0"])])
def test_other_pruners_are_given_a_recurrent_layers_weights(name, spared):
    from shared.headline_arms import matrices
    from shared.headline_runs import SETS

    from lightning_compress.lab.models import RecurrentVAE

    plan = SETS[name]["recurrent_vae"]
    assert [one for one in plan.spared if "weight" in one] == spared
    model = RecurrentVAE(steps=4, features=4, hidden=8, latent_dim=2)
    found = matrices(SimpleNamespace(model=plan), model)
    wanted = {"weight_hh_l0"} | (set() if spared else {"weight_ih_l0"})
    for layer in (model.encoder.gru, model.decoder.gru):
        assert {name for one, name in found if one is layer} == wanted
    dense = {name for one, name in found if isinstance(one, torch.nn.Linear)}
    assert dense == (set() if spared else {"weight"})


def test_an_unknown_row_is_refused_by_name(tmp_path, monkeypatch, capsys):
    import bench_headline

    words = ["--arms", "95 % zeros", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as stop:
        bench_headline.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "invalid choice: '95 % zeros'" in said
    assert "'90 % zeros'" in said


def test_what_a_benchmark_needs_is_what_its_command_installs():
    """A fresh machine has no more than `make bench` asks pip for."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((EXPERIMENTS.parent / "pyproject.toml").read_text())["project"]
    makefile = (EXPERIMENTS.parent / "Makefile").read_text()
    installed = re.search(r"\nbench: .*\n.*install.*\[(.+?)\]\"", makefile)
    assert installed is not None
    asked = [f"lightning-compress[{installed.group(1)}]"]
    for one in asked:  # which grows
        extras = re.fullmatch(r"lightning-compress\[(.+)\]", one)
        for extra in extras.group(1).split(",") if extras else []:
            asked += project["optional-dependencies"][extra]
    names = {re.split(r"[^\w-]", one)[0] for one in [*asked, *project["dependencies"]]}
    wanted = set(re.findall(r"require\(\s*\"([\w.]+)\"", latency_source()))
    assert {"onnxruntime", "openvino"} <= wanted
    assert wanted | {"torch-pruning"} <= names


def latency_source():
    return Path(latency.__file__).read_text()


def bench(*args):
    command = [sys.executable, str(EXPERIMENTS / "benchmarks" / "bench_headline.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rows_are_made_from_nothing_and_kept(tmp_path):
    from shared.headline_runs import SETS

    arms = ["dense", "zeros and grids, 90 %", "post-training W8A8"]
    told = ["--set", "digits", "--models", "recurrent_vae", "--seeds", "0", "--out", str(tmp_path)]
    done = bench(*told, "--arms", *arms)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "digits" / "recurrent_vae.jsonl"
    rows = {one["arm"]: one for one in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == arms
    assert rows["dense"]["measure"]["floor"]["samples"] == 198
    for arm in SETS["digits"]["recurrent_vae"].main:
        assert rows[arm]["neg_iwae"] < rows[arm]["neg_elbo"]
    small = rows["zeros and grids, 90 %"]
    path = tmp_path / "digits" / "recurrent_vae-0" / "zeros-and-grids--90--" / "model.lcz"
    assert small["bytes"] == path.stat().st_size == inspect_compressed(path).bytes
    assert small["ratio"] > 20
    assert small["nonzero_left"] < 0.2
    assert rows["post-training W8A8"]["int8_bytes"] > 0
    assert {one["arm"] for one in rows.values() if "speed_of_all" in one} == {small["arm"]}
    assert set(small["speed_of_all"]) == {"this, batch 1", "this, batch 16"}
    assert min(small["speed_of_all"].values()) > 0.3
    before = file.read_bytes()
    assert bench(*told, "--arms", *arms).returncode == 0
    assert file.read_bytes() == before
    written = next(path.parent.with_name("post-training-W8A8").glob("*.int8.onnx"))
    stored = written.read_bytes()
    written.write_bytes(b"")  # as an earlier exporter may have left it
    assert bench(*told, "--again", "speed").returncode == 0
    assert written.read_bytes() == stored
    assert file.read_bytes() != before
    again = {one["arm"]: one for one in map(json.loads, file.read_text().splitlines())}
    timed = ("speed", "speed_of_all")
    for arm, one in rows.items():
        assert again[arm].keys() == one.keys()
        assert all(again[arm][key] == one[key] for key in one if key not in timed)


def test_a_row_is_measured_beside_the_dense_rows_files_also_where_these_are_gone(
    tmp_path, monkeypatch
):
    import bench_headline
    from shared.rows import Rows

    def made(runs, arm):
        home = bench_headline.home_of(runs, arm)
        home.mkdir(exist_ok=True)
        (home / "decoder.onnx").touch()
        return {"after": [one["arm"] for one in rows.known.values()]}

    monkeypatch.setattr(bench_headline, "row", made)
    runs = SimpleNamespace(name="vae", seed=0, folder=tmp_path)
    rows = Rows(tmp_path / "vae.jsonl", keys=("model", "seed", "arm"))
    bench_headline.make_missing(runs, rows, ["90 % zeros"])
    assert [one["arm"] for one in rows.known.values()] == ["dense", "90 % zeros"]
    (tmp_path / "dense" / "decoder.onnx").unlink()
    bench_headline.make_missing(runs, rows, ["90 % zeros"])  # nothing to make
    assert rows.known["vae", 0, "dense"]["after"] == []
    bench_headline.make_missing(runs, rows, ["90 % zeros", "trained W8A8"])
    assert rows.known["vae", 0, "dense"]["after"] == ["90 % zeros"]
    assert rows.known["vae", 0, "trained W8A8"]["after"] == ["90 % zeros", "dense"]
    assert (tmp_path / "dense" / "decoder.onnx").exists()
