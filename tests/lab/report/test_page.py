"""The HTML page: parsed, searched for every number, fed hostile input, and shown to a browser."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting import make_results, make_run

from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.report.wording import count, kilobytes, milliseconds, number

CHROMIUM = "/usr/bin/chromium"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests ask for, and fails on tags that do not match."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags, self.addresses, self.ids, self.scripts = [], [], [], []
        self.text, self.open, self.images = "", [], []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [values[k] for k in ("src", "href", "xlink:href") if values.get(k)]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img" or values.get("role") == "img":
            self.images.append(values.get("alt") or values.get("aria-label"))
        assert not any(key.startswith("on") for key in values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


ORDER = ["train/loss", "compress/sparsity", "val/kid: KID"]


def test_one_run_is_self_contained_and_well_formed(tmp_path):
    path = write_report([make_run(tmp_path / "a run with spaces, größe 数字")])
    assert path == tmp_path / "a run with spaces, größe 数字" / "report.html"
    page = Page(path)
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|fetch\(", page.source)
    assert len(page.ids) == len(set(page.ids))
    assert '<html lang="en">' in page.source
    assert page.source.startswith("<!DOCTYPE html>")
    # Comparison, both sides, both again for their difference; curves; layers, bytes and files.
    assert len(page.images) == 1 + 2 + 2 + 3 + 3
    assert all(page.images)
    places = [page.source.index(f"{name} over training steps") for name in ORDER]
    assert places == sorted(places)
    assert "−ELBO (nats) ↓" in page.text
    assert "Recall ↑" in page.text
    assert "multiply them all the same" in page.text
    assert {p.suffix for p in (path.parent / "plots").iterdir()} == {".svg"}


def test_every_number_of_the_results_is_on_the_page(tmp_path):
    results = make_results()
    text = Page(write_report([make_run(tmp_path / "run", results)])).text
    expected = ["31.2×", "98.2 %", "397", "600", "610", kilobytes(results["entropy_bound_bytes"])]
    for side in (results["dense"], results["compressed"]):
        expected += [number(value) for value in side["quality"].values()]
        expected += [kilobytes(size) for size in side["bytes"].values() if size is not None]
        expected += [milliseconds(value) for value in leaves(side["latency_ms"])]
        expected += [count(side[key]) for key in ("params", "nonzero_params", "macs")]
        expected += [number(side["train_seconds"])]
    expected += [number(value) for value in results["evaluator"]["floor"].values()]
    expected += ["3 QLinearConv, 1 QGemm", "1 Sigmoid", "0.0039 (onnxruntime)"]
    expected += ["25.51 ± 0.31 (n=3)", "worse by 0.280, 0.313 is allowed."]
    for layer in results["layers"]:
        expected += [layer["name"], count(layer["weights"]), kilobytes(layer["bytes"])]
        expected += [kilobytes(layer["bound_bytes"]), f"{100 * layer['sparsity']:.1f} %"]
    assert [value for value in expected if value not in text] == []
    # By hand: 25.431 * 0.011 = 0.2797 nats, and 1,345,678 bytes / 31.2 = 43,131 bytes.
    assert "+0.280 (+1.1 %)" in text
    assert "43.1 kB" in text


@pytest.mark.parametrize(
    ("within", "words"),
    [
        (True, "31.2× smaller, quality within the dense baseline's seed spread"),
        (False, "quality not within the allowed difference (−ELBO (nats) worse by 0.280)"),
        (None, "31.2× smaller, quality not judged"),
    ],
)
def test_headline_says_what_the_verdict_says(tmp_path, within, words):
    page = Page(write_report([make_run(tmp_path / "run", make_results(within=within))]))
    assert f"VAE on digits: {words}" in page.text or words in page.text
    state = {True: "within", False: "outside", None: "unknown"}[within]
    assert f'class="verdict {state}"' in page.source


OPTIONAL = [
    "compression", "steps", "evaluator", "ratio", "entropy_bound_bytes", "baseline_spread",
    "verdict", "layers", "samples", "metric_info", "seed", "created",
]  # fmt: skip


@pytest.mark.parametrize("missing", [*([key] for key in OPTIONAL), OPTIONAL])
def test_missing_sections_leave_their_place_out(tmp_path, missing):
    results = make_results()
    for key in missing:
        results[key] = None  # null means the same as absence
        if len(missing) == 1:
            del results[key]
    few = {"curves": False, "samples": False}
    page = Page(write_report([make_run(tmp_path / "run", results, **few)]))
    assert "curves.csv is missing" in page.text
    if "layers" in missing:
        assert "No per-layer list in results.json." in page.text
        assert "Stored tensors" not in page.text
    if "verdict" in missing:
        assert "quality not judged: results.json holds no verdict" in page.text


def test_almost_nothing_is_still_a_page(tmp_path):
    bare = {"model": "m", "data": "d", "dense": {}, "compressed": {}}
    page = Page(write_report([make_run(tmp_path / "r", bare, curves=False, samples=False)]))
    assert "m on d: size ratio unknown, quality not judged" in page.text
    for what in ("quality", "file sizes", "latency"):
        assert f"No {what} of the dense model" in page.text


HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>$x_"


def test_hostile_strings_are_shown_not_obeyed(tmp_path):
    results = make_results()
    results.update(model=HOSTILE, data=HOSTILE, created=HOSTILE, compression={HOSTILE: HOSTILE})
    results["evaluator"]["feature"] = HOSTILE
    results["verdict"]["metric"] = HOSTILE
    results["metric_info"][HOSTILE] = {"label": HOSTILE, "better": HOSTILE}
    for side in ("dense", "compressed"):
        for key in ("quality", "bytes"):
            results[side][key][HOSTILE] = 1.0
        results[side]["latency_ms"][HOSTILE] = {"median": 1.0}
    for layer in results["layers"]:
        layer.update(name=HOSTILE, codec=HOSTILE, shape=[HOSTILE])
    first = make_run(tmp_path / "r" / "a", results)
    with (first / "curves.csv").open("a", encoding="utf-8") as stream:
        stream.write(f'\n"{HOSTILE}",1,"../../{HOSTILE}",2.0\n')
    make_run(tmp_path / "r" / "b", results)
    for folders in ([first], [tmp_path / "r"]):
        page = Page(write_report(folders))
        assert page.tags.count("script") == 1
        assert all(address.startswith(("data:", "#")) for address in page.addresses)
        assert HOSTILE in page.text
    saved = {path.parent.name for path in tmp_path.rglob("*.svg")}
    assert saved == {"plots"}


def test_a_broken_value_is_named_as_such(tmp_path):
    results = make_results()
    results.update(ratio=float("nan"), entropy_bound_bytes=float("inf"))
    for side in ("dense", "compressed"):
        results[side]["quality"] = dict.fromkeys(results[side]["quality"], float("nan"))
    results["verdict"].update(compressed=float("nan"), difference=float("nan"), within=False)
    results["layers"][0].update(sparsity=float("nan"), bytes=float("nan"), weights=0)
    results["compressed"]["bytes"]["lcz"] = 10**400
    run = make_run(tmp_path / "run", results)
    (run / "curves.csv").write_text(
        "run,step,metric,value\ndense,1,val/kid,nan\ndense,2,val/kid,inf\ncompressed,1,val/kid,nan"
    )
    page = Page(write_report([run]))
    assert "NaN" in page.text
    assert "size ratio unknown, quality not within" in page.text


SECRET = bytes(range(30))


def test_pictures_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "secret.png").write_bytes(SECRET)
    samples = {"grid": "../secret.png", "dense": "gone.png", "compressed": "page.svg"}
    run = make_run(tmp_path / "run", make_results(samples=samples), samples=False)
    page = Page(write_report([run]))
    assert base64.b64encode(SECRET).decode() not in page.source
    for reason in ("lies outside the run folder", "not in the folder", "is none of .gif"):
        assert reason in page.text


def test_several_runs_with_a_damaged_one(tmp_path):
    for place in range(3):
        results = make_results(place=place, ratio=20.0 + 30 * place, within=place == 0)
        make_run(tmp_path / "multirun" / str(place), results, samples=False)
    (tmp_path / "multirun" / "3").mkdir()
    (tmp_path / "multirun" / "3" / "results.json").write_text('{"model": "vae", ')
    path = write_report([tmp_path / "multirun"], tmp_path / "out.html")
    page = Page(path)
    assert "Could not be read" in page.text
    assert "not valid JSON" in page.text
    assert (
        "3 runs: 1 within the allowed difference, 2 not within the allowed difference" in page.text
    )
    assert page.tags.count("details") == 3 * (1 + 1 + 1)  # the run, its tensors, its config
    assert {"#run-1", "#run-2", "#run-3"} <= set(page.addresses)
    assert "prune.final_sparsity=0.83, quantize.weight_bits=7" in page.text
    assert len(page.ids) == len(set(page.ids))
    assert page.source.count('<th scope="col" aria-sort="ascending"') == 1
    assert (tmp_path / "plots" / "pareto_01.svg").is_file()
    # Bigger and worse is the larger one here: every run trades size for quality.
    assert "on the Pareto front: 3, 2, 1" in " ".join(page.images)


def test_runs_that_cannot_be_compared_stand_in_pictures_of_their_own(tmp_path):
    make_run(tmp_path / "0", curves=False, samples=False)
    make_run(tmp_path / "1", make_results(data="mnist"), curves=False, samples=False)
    make_run(tmp_path / "2", make_results(verdict=None), curves=False, samples=False)
    page = Page(write_report([tmp_path]))
    assert sum("on the Pareto front" in alt for alt in page.images) == 2 * 2  # size, latency
    assert "Run 3 has no .lcz size or no judged quality" in page.text


def test_only_damaged_runs_make_a_page_that_says_so(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    page = Page(write_report([tmp_path]))
    assert "No run could be read" in page.text
    assert "must hold one JSON object, got list" in page.text


def test_hydras_record_is_shown(tmp_path):
    run = make_run(tmp_path / "run", curves=False, samples=False)
    (run / ".hydra").mkdir()
    words = "- model=vae\n- compression=[distill,prune]\n"
    (run / ".hydra" / "overrides.yaml").write_text(words)
    (run / ".hydra" / "config.yaml").write_text("trainer:\n  max_steps: 600\n")
    text = Page(write_report([run])).text
    assert "lightning-compress model=vae 'compression=[distill,prune]'" in text
    assert "max_steps: 600" in text


def test_same_runs_give_the_same_page(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first
    assert not list(run.rglob(".*"))


# Browser -----------------------------------------------------------------------------------

browser = pytest.mark.skipif(
    not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not installed on this machine"
)


def chromium(tmp_path: Path, path: Path, *options: str) -> subprocess.CompletedProcess:
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    command += [*options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@browser
def test_sorting_by_clicks_in_a_browser(tmp_path):
    ratios = [40.0, 9.5, 120.0, 9.5]
    for place, ratio in enumerate(ratios):
        results = make_results(place=place, ratio=ratio)
        make_run(tmp_path / "m" / str(place), results, curves=False, samples=False)
    unknown = {**make_results(), "ratio": float("nan")}
    make_run(tmp_path / "m" / "4", unknown, curves=False, samples=False)
    path = write_report([tmp_path / "m"])
    clicks = """<script>
      const heads = [...document.querySelectorAll("#runs th")];
      const ratio = heads.find((head) => head.textContent === "Ratio");
      for (const label of ["up", "down"]) {
        ratio.querySelector("button").click();
        const order = [...document.querySelectorAll("#runs tbody tr")]
          .map((row) => row.cells[0].textContent);
        document.body.append(`${label}:${order.join(",")}:${ratio.getAttribute("aria-sort")};`);
      }
      location.hash = "#run-2";
      addEventListener("hashchange", () => document.body.append(
        `open:${document.getElementById("run-2").open};`));
    </script></body>"""
    source = path.read_text("utf-8").replace("</body>", clicks)
    # The page's own policy would refuse a script that is not its own: shown below.
    path.write_text(re.sub(r"<meta http-equiv=.*\n", "", source), "utf-8")
    done = chromium(tmp_path, path, "--virtual-time-budget=2000", "--dump-dom")
    assert "up:2,4,1,3,5:ascending;" in done.stdout
    assert "down:3,1,2,4,5:descending;" in done.stdout
    assert "open:true;" in done.stdout
    assert "CONSOLE" not in done.stderr


@browser
def test_policy_refuses_foreign_scripts_and_page_has_no_console_errors(tmp_path):
    for place in range(2):
        make_run(tmp_path / "m" / str(place), make_results(place=place))
    path = write_report([tmp_path / "m"])
    clean = chromium(tmp_path, path, "--dump-dom")
    assert "CONSOLE" not in clean.stderr
    foreign = "<script>document.body.append('obeyed')</script></body>"
    path.write_text(path.read_text("utf-8").replace("</body>", foreign), "utf-8")
    refused = chromium(tmp_path, path, "--dump-dom")
    assert "Content Security Policy" in refused.stderr
    assert "obeyed</body>" not in refused.stdout


@browser
def test_page_is_no_wider_than_a_phone_or_a_desk(tmp_path):
    for place in range(2):
        make_run(tmp_path / "m" / ("long_name" * 9 + str(place)), make_results(place=place))
    path = write_report([tmp_path / "m"])
    # A headless window has a least width: frames are as narrow as they are asked to be.
    frames = [f'<iframe src="{path.as_uri()}" width="{width}"></iframe>' for width in (1280, 390)]
    probe = """<script>addEventListener("load", () => {
      for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument;
        for (const part of page.querySelectorAll("details")) part.open = true;
        document.body.append(`${frame.width}: ${page.documentElement.scrollWidth};`);
      }
    });</script>"""
    outer = tmp_path / "outer.html"
    outer.write_text("<style>iframe { border: 0 }</style>" + "".join(frames) + probe, "utf-8")
    done = chromium(tmp_path, outer, "--allow-file-access-from-files", "--dump-dom")
    found = dict(re.findall(r"(\d+): (\d+);", done.stdout))
    assert set(found) == {"1280", "390"}
    assert all(int(inner) <= int(width) for width, inner in found.items()), found
