"""The headline's benchmark: its plan names rows that there are, its tables say what rows say."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_compress.lab.evaluation import latency
from lightning_compress.lab.models import DCGAN

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROOT = EXPERIMENTS.parent
MEASURE = {
    "feature": "a network",
    "feature_accuracy": 0.9,
    "samples": 397,
    "floor": {"fid": 4.3, "kid": 0.01, "precision": 0.95, "recall": 0.94},
}
RD = "rate-distortion, λ = {}"


def row(arm, seed, value, size=1000, **more):
    row = {"model": "vae", "seed": seed, "arm": arm, "neg_elbo": value, "validation": value}
    row |= {"active_units": 20, "kl": 20.0, "fid": 9.0, "precision": 0.8, "recall": 0.5}
    row |= {"neg_iwae": value - 1, "file": ".lcz", "bytes": size, "ratio": 100_000 / size}
    row |= {"speed": {"batch 1": 1.0, "batch 16": 2.0}, "macs_left": 1.0, "nonzero_left": 0.5}
    return row | {"machine": "a", "measure": MEASURE} | more


def table(rows, **more):
    from shared.headline_tables import Table

    return Table("fashion", "vae", rows, **({"converged": True} | more))


def five(arm, value, size, noise=(0.0, 0.01, -0.01, 0.02, 0.0), **more):
    return [row(arm, n, value + 10 * n + noise[n], size, **more) for n in range(5)]


def test_each_row_of_the_plan_is_there_and_each_that_is_there_is_planned():
    from shared.baseline_plans import PLANS
    from shared.headline_arms import ARMS, PEERS
    from shared.headline_runs import SETS
    from shared.headline_tables import DENSE, FAMILIES

    models = [model for group in SETS.values() for model in group.values()]
    for model in models:
        plan = model.plan(0)
        assert len(set(plan)) == len(plan)
        assert plan[0] == "dense"
        assert model.plan(4) == [*model.main]
        assert set(model.peers) <= set(PEERS)
        assert PLANS[model.baseline[0]][model.baseline[1]].metric == model.metric
        for arm in (one for one in plan if one.startswith("nncodec")):
            assert plan.index(arm) > plan.index("dense, trained on")  # whose weights it codes
    assert {arm for model in models for arm in model.plan(0)} == set(ARMS)
    assert {*DENSE, *(arm for family in FAMILIES.values() for arm in family)} == set(ARMS)


def test_the_reference_is_the_best_dense_model_on_the_validation_split():
    rows = [*five("dense", 250.0, 9000), *five("dense, trained on", 249.0, 9000)]
    assert table(rows).reference == "dense, trained on"
    for one in rows[5:]:
        one["validation"] += 5  # what the test split says does not count
    assert table(rows).reference == "dense"
    assert table([*rows[:5], *five("dense, taught", 240.0, 9000)[:4]]).reference == "dense"


def test_settings_are_chosen_on_the_validation_split_not_on_the_test_split():
    rows = [*five("dense", 250.0, 9000), *five(RD.format(2), 250.1, 3000)]
    rows += [*five(RD.format(4), 250.2, 2000), *five(RD.format(0.5), 250.3, 1000, validation=999.0)]
    rows += five("int8", 260.0, 2500)
    made = table(rows)
    assert made.chosen() == [RD.format(4), "int8"]  # the last has no setting within it
    assert made.smallest() == RD.format(0.5)  # bytes at dense quality: on the test split
    # Its one seed is the easiest: below the dense mean, and worse than the dense model beside it.
    rows += [row(RD.format(1), 0, 255.0, 100)]
    assert table(rows).chosen() == [RD.format(4), "int8"]
    rows[-1]["neg_elbo"] = 250.0
    assert table(rows).smallest() == RD.format(0.5)  # a single seed is no dense quality


def test_a_verdict_is_paired_by_seed_and_machine_and_needs_a_converged_baseline():
    rows = [*five("dense", 250.0, 9000), *five(RD.format(4), 250.1, 2000, kl=15.0)]
    rows += [*five("int8", 255.0, 2000, kl=20.3), *five(RD.format(2), 240.0, 2000)[:4]]
    for n, one in enumerate(rows[:5]):
        one["kl"] += 0.1 * n
    made = table(rows)
    assert made.margin.margin == pytest.approx(0.02 * (270.004 - 189.86))
    assert made.word(RD.format(4)) == "established; KL −5.2"
    assert made.word("int8") == "worse"
    assert made.word(RD.format(2)) == "not established"  # four pairs
    cells = made.cells("int8")
    assert cells[5] == "+5 ± 0, +6.2%"
    told = table(rows, converged=False)
    assert "has not converged" in told.word(RD.format(4))
    assert "no loss is established for no row" in told.not_established()[-1]
    assert f"up to 50.0× ({RD.format(4)}), not beyond" in made.not_established()[-1]
    for one in rows[5:10]:
        one["machine"] = "b"
    assert table(rows).word(RD.format(4)) == "no pair"


def test_a_baseline_that_trains_on_to_something_better_is_told():
    rows = [*five("dense", 255.0, 9000), *five("dense, trained on", 250.0, 9000)]
    told = table(rows).not_established()[0]
    assert "and yet “dense, trained on” is 5 better" in told
    assert "and yet" not in "".join(table(five("dense", 255.0, 9000)).not_established())


def test_a_collapsed_baseline_is_named_above_its_table():
    rows = [*five("dense", 250.0, 9000, kl=0.01), *five(RD.format(4), 250.1, 2000)]
    made = table(rows)
    assert "**posterior collapsed: KL 0.01 nats, 20 active units (5 of 5 dense" in made.about()
    assert made.word(RD.format(4)).startswith("not established")


def test_tables_hold_what_rows_say_and_the_pictures_are_drawn(tmp_path):
    from shared.headline_plots import draw

    rows = [*five("dense", 250.0, 9000), *five(RD.format(4), 250.1, 2000)]
    rows += [row("Deep Compression, 90 %", 0, 300.0, 1500)]
    made = table(rows)
    lines = {line.split("|")[1].strip(): line for line in made.short().splitlines()[2:]}
    assert list(lines) == ["dense", RD.format(4), "Deep Compression, 90 %"]
    assert (
        "| .lcz | 9,000 | 11.1× | 270.00 ± 15.81 | – | the reference | 1.0× / 2.0× | 5 |"
        in (lines["dense"])
    )
    assert "| 2,000 | 50.0× |" in lines[RD.format(4)]
    assert "| not established | 1.0× / 2.0× | 1 |" in lines["Deep Compression, 90 %"]
    assert "right on 90.0% of the test images" in made.about()
    draw([made], {"VAE": [[3.0, 2.0, 1.0, 1.0]]}, tmp_path)
    found = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(found) == [
        f"headline_{one}.png" for one in ("baselines", "bytes", "pairs", "speed")
    ]
    assert min(found.values()) > 5000


def test_the_page_holds_what_the_rows_that_are_kept_say():
    from show_headline import ROWS, page, readme_table, tables_of

    tables = tables_of(ROWS)
    said = (ROOT / "docs" / "headline.md").read_text(encoding="utf-8")
    for part, text in page(tables).items():
        assert f"<!-- headline: {part} -->\n{text}\n<!-- /headline: {part} -->" in said, part
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- headline: readme -->" not in readme or readme_table(tables) in readme


@pytest.mark.parametrize(
    ("told", "made"),
    [([], ["0 a", "0 b", "1 a", "2 a"]), (["--seeds", "1", "4"], ["1 a", "1 b", "4 a", "4 b"])],
)
def test_each_model_has_its_own_seeds_where_none_are_told(tmp_path, monkeypatch, told, made):
    import bench_headline

    models = {
        name: SimpleNamespace(seeds=seeds, plan=lambda seed: ["dense"])
        for name, seeds in {"a": 3, "b": 1}.items()
    }
    seen = []
    monkeypatch.setattr(bench_headline, "SETS", {"digits": models})
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


def test_the_dense_control_has_half_as_many_steps_again_and_all_others_as_many():
    from shared.headline_arms import ARMS
    from shared.headline_runs import SETS, Runs

    seen = []
    runs = Runs.__new__(Runs)
    runs.name, runs.seed, runs.model = "vae", 0, SETS["digits"]["vae"]
    runs.start = SimpleNamespace(model=lambda: torch.nn.Linear(1, 1))
    runs.start.fit = lambda _, callbacks, **more: seen.append((len(callbacks), more["epochs"]))
    runs.fit(runs.fresh(), [SimpleNamespace()])
    runs.fit(runs.fresh(), epochs=runs.whole_compute())
    epochs = SETS["digits"]["vae"].epochs
    assert seen == [(2, epochs), (1, 1.5 * epochs)]  # beside the learning rate's
    trained = [arm for arm in ARMS if arm.startswith(("rate", "int8", "80", "90", "dense, t"))]
    assert len(trained) > 6


def test_bytes_speed_and_quality_are_those_of_one_file(monkeypatch, tmp_path):
    from shared import headline_files

    gan = DCGAN(image_size=8, width=8, discriminator_width=8).eval()
    torch.save(gan.generator.state_dict(), tmp_path / "model.pt")
    size = (tmp_path / "model.pt").stat().st_size
    opened, judged = [], []
    start = SimpleNamespace(quality=lambda model: judged.append(model.generator) or {"kid": 1.0})
    runs = SimpleNamespace(
        fresh=lambda: DCGAN(image_size=8, width=8, discriminator_width=8).eval(),
        start=start,
        kind="gan",
        validation=lambda model: judged.append(model.generator) or 2.0,
    )
    monkeypatch.setattr(headline_files, "ROUNDS", 2)
    make = headline_files.onnx_runner
    monkeypatch.setattr(
        headline_files,
        "onnx_runner",
        lambda path, *a, **k: opened.append(path) or make(path, *a, **k),
    )
    sample = gan.parts()["generator"][1][0]
    expected = gan.generator(sample).detach()
    found = headline_files.measured(runs, headline_files.packed(runs, gan, tmp_path), tmp_path)
    path = tmp_path / "model.lcz"
    assert found["bytes"] == path.stat().st_size
    assert (found["dense_bytes"], found["ratio"]) == (size, round(size / found["bytes"], 2))
    assert set(opened) == {path}
    assert {type(one).__name__ for one in judged} == {"OnnxPart"}
    torch.testing.assert_close(judged[0](sample), expected, atol=1e-4, rtol=0)
    assert set(found["speed"]) == {"batch 1", "batch 16"}


def test_lightnings_amounts_end_at_the_sparsity_that_was_asked():
    from shared.headline_arms import amounts

    left = 1.0
    for n, amount in enumerate(amounts(10)):
        left *= 1 - amount
        assert n < 4 or left == pytest.approx(0.1)
    assert amounts(1) == [pytest.approx(0.9)]


def test_rows_say_their_machine(tmp_path):
    import platform

    from shared.rows import Rows

    found = Rows(tmp_path / "rows.jsonl", keys=("seed",)).make(lambda: {"fid": 1.0}, seed=0)
    assert f"torch {torch.__version__.partition('+')[0]}" in found["machine"]
    assert platform.node() not in found["machine"]


def test_a_baseline_that_is_not_there_is_named_with_its_command(tmp_path):
    from shared.baseline_plans import baseline_file

    with pytest.raises(
        FileNotFoundError, match=r"'vae', seed 7: .*--models vae --seeds 7 makes it"
    ):
        baseline_file("digits", "vae", 7, folders=(tmp_path,))
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "vae-7.lcz").touch()
    assert baseline_file("digits", "vae", 7, (tmp_path,)).name == "vae-7.lcz"


def test_all_seeds_are_trained_and_judged_on_the_same_pictures(tmp_path):
    from shared.finetuning import Start
    from shared.headline_runs import SETS

    plan = SETS["digits"]["vae"]
    first, second = (
        Start("vae", seed, tmp_path, {"vae": (plan.overrides, 1, [])}, data=plan.data)
        for seed in (0, 1)
    )
    assert (first.cfg.seed, second.cfg.seed) == (0, 1)
    assert first.data.fingerprint == second.data.fingerprint  # which names the network
    for split in ("train_dataset", "test_dataset"):
        pair = [getattr(start.data, split).tensors[0] for start in (first, second)]
        assert torch.equal(*pair)


@pytest.mark.parametrize("spared", [[], ["*.weight_ih_l0"]])
def test_other_pruners_are_given_a_recurrent_layers_weights(spared):
    from shared.headline_arms import matrices

    from lightning_compress.lab.models import RecurrentVAE

    model = RecurrentVAE(steps=4, features=4, hidden=8, latent_dim=2)
    found = matrices(SimpleNamespace(model=SimpleNamespace(spared=spared)), model)
    wanted = {"weight_hh_l0"} | (set() if spared else {"weight_ih_l0"})
    for layer in (model.encoder.gru, model.decoder.gru):
        assert {name for one, name in found if one is layer} == wanted
    dense = {name for one, name in found if isinstance(one, torch.nn.Linear)}
    assert dense == {"weight"}


def test_an_unknown_row_is_refused_by_name(tmp_path, monkeypatch, capsys):
    import bench_headline

    words = ["--arms", "95 % zeros", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as stop:
        bench_headline.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "invalid choice: '95 % zeros'" in said
    assert "'int8'" in said


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
def test_rows_are_made_from_a_kept_baseline_once(tmp_path):
    arms = ["dense", "int8"]
    told = ["--set", "digits", "--models", "vae", "--seeds", "0", "--out", str(tmp_path)]
    told += ["--files", str(tmp_path / "files"), "--arms", *arms]
    done = bench(*told)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "digits" / "vae.jsonl"
    rows = {one["arm"]: one for one in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == arms
    assert rows["dense"]["measure"]["feature"].startswith("digits-shipped-")
    for arm, one in rows.items():
        home = tmp_path / "files" / "digits" / "vae-0" / as_file(arm)
        assert one["bytes"] == (home / "model.lcz").stat().st_size
        assert one["neg_iwae"] < one["neg_elbo"]
    before = file.read_bytes()
    assert bench(*told).returncode == 0
    assert file.read_bytes() == before


def as_file(arm):
    from shared.rows import as_file_name

    return as_file_name(arm)


def test_a_row_is_measured_beside_the_dense_rows_files_also_where_these_are_gone(
    tmp_path, monkeypatch
):
    import bench_headline
    from shared.rows import Rows

    def made(runs, arm):
        home = bench_headline.home_of(runs, arm)
        home.mkdir(exist_ok=True)
        (home / "model.lcz").touch()
        return {"after": [one["arm"] for one in rows.known.values()]}

    monkeypatch.setattr(bench_headline, "row", made)
    runs = SimpleNamespace(name="vae", seed=0, folder=tmp_path)
    rows = Rows(tmp_path / "vae.jsonl", keys=("model", "seed", "arm"))
    bench_headline.make_missing(runs, rows, ["int8"], math.inf)
    assert [one["arm"] for one in rows.known.values()] == ["dense", "int8"]
    (tmp_path / "dense" / "model.lcz").unlink()
    bench_headline.make_missing(runs, rows, ["int8"], math.inf)  # nothing to make
    assert rows.known["vae", 0, "dense"]["after"] == []
    bench_headline.make_missing(runs, rows, ["int8", "dense, taught"], math.inf)
    assert rows.known["vae", 0, "dense"]["after"] == ["int8"]
    assert rows.known["vae", 0, "dense, taught"]["after"] == ["int8", "dense"]
    assert (tmp_path / "dense" / "model.lcz").exists()
