"""Samples by kind: images with their difference, audio with a player, and the command to copy."""

import base64
import json
import wave

import torch
from reporting import make_results, make_run

from lightning_compress.lab.evaluation.verdict import verdict
from lightning_compress.lab.report.loading import Run
from lightning_compress.lab.report.media import MOST_FILES, samples
from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.report.sample_grids import save_grid


def save_audio(path):
    """A short 16-bit waveform."""
    with wave.open(str(path), "wb") as stream:
        stream.setparams((1, 2, 8000, 0, "NONE", ""))
        stream.writeframes(bytes(range(256)))


def test_audio_is_played_and_colour_is_shown(tmp_path):
    named = {
        "dense": "dense.wav",
        "compressed": "compressed.wav",
        "dense_maps": "d.png",
        "compressed_maps": "c.png",
        "input": "input.png",
        "real": "real.png",
        "real_0.wav": "real.wav",
        "dense_0.wav": "dense.wav",
    }
    run = make_run(tmp_path / "run", make_results(samples=named), samples=False)
    for name in ("dense.wav", "compressed.wav", "real.wav"):
        save_audio(run / name)
    for name in ("d.png", "c.png", "input.png", "real.png"):
        save_grid(torch.rand(2, 3, 4, 4), run / name)
    source = write_report([run]).read_text("utf-8")
    for name in ("dense.wav", "compressed.wav"):
        held = base64.b64encode((run / name).read_bytes()).decode()
        assert f'<audio controls preload="metadata" src="data:audio/wav;base64,{held}"' in source
    assert "media-src data:" in source
    assert source.count('class="stack"') == 1  # of the images: sounds have no difference view
    for name in ("input.png", "real.png"):
        assert source.count("data:image/png;base64," + _held(run / name)) == 1
    assert "Real samples, 0.wav</figcaption>" in source
    assert source.count("<audio ") == 2 + 2


def _held(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_difference_lays_one_side_over_the_other(tmp_path):
    run = make_run(tmp_path / "run")
    source = write_report([run]).read_text("utf-8")
    stack = source.split('class="stack"')[2 - 1].split("</div>")[0]
    assert [_held(run / name) in stack for name in ("d.png", "c.png")] == [True, True]
    assert "mix-blend-mode: difference" in source
    assert source.count('type="radio"') == 4
    assert source.count(" checked>") == 1


def test_a_comparison_alone_is_shown(tmp_path):
    run = make_run(tmp_path / "run", make_results(samples={"grid": "samples.png"}))
    source = write_report([run]).read_text("utf-8")
    assert source.count(_held(run / "samples.png")) == 1
    assert 'class="stack"' not in source


def test_files_outside_or_of_another_kind_are_named(tmp_path):
    (tmp_path / "secret.wav").write_bytes(b"secret")
    named = {"dense": "../secret.wav", "compressed": "gone.wav", "dense_x": "a.html"}
    views, notes = samples(Run(tmp_path / "run", make_results(samples=named)))
    assert views == []
    for part in ("lies outside", "not in the folder", "is none of .gif"):
        assert any(part in note for note in notes), notes
    many = {f"dense_{at}": "gone.png" for at in range(MOST_FILES + 3)}
    _, notes = samples(Run(tmp_path, make_results(samples=many)))
    assert (
        notes[0] == f"Samples: {MOST_FILES + 3} files are named, the first {MOST_FILES} are shown."
    )
    assert len(notes) == 1 + MOST_FILES


def test_the_command_that_made_the_run_can_be_copied(tmp_path):
    run = make_run(tmp_path / "run", curves=False, samples=False)
    assert 'class="copy"' not in write_report([run]).read_text("utf-8")
    results = make_results(command="lightning-compress model=vae 'compression=[prune]'")
    (run / "results.json").write_text(json.dumps(results))
    source = write_report([run]).read_text("utf-8")
    assert '<button type="button" class="copy" hidden>' in source
    assert "compression=[prune]" in source


def test_the_file_to_take_comes_first(tmp_path):
    results = make_results()
    run = make_run(tmp_path / "run", results, curves=False, samples=False)
    source = write_report([run]).read_text("utf-8")
    assert source.index("One .lcz file with its int8 graph") < source.index('dl class="facts"')
    results["compressed"]["bytes"]["lcz_graph"] = None
    (run / "results.json").write_text(json.dumps(results))
    assert "ONNX, int8</strong> <code>compressed/*.int8.onnx" in write_report([run]).read_text()
    results["compressed"]["bytes"] = {"lcz": 100}
    (run / "results.json").write_text(json.dumps(results))
    assert "weights alone</strong>" in write_report([run]).read_text()


def test_the_banner_of_one_run_and_of_all_seeds_says_what_fell(tmp_path):
    for seed in range(2):
        dense = {"neg_elbo": 25.0 + seed, "active_units": 13}
        compressed = {"neg_elbo": 25.0 + seed, "active_units": 7}
        results = make_results(place=seed, ratio=31.2)
        results["compression"] = {"prune": {}}
        for side, quality in (("dense", dense), ("compressed", compressed)):
            results[side]["quality"] = quality
        results["baseline_spread"] = {}
        results["verdict"] = verdict("neg_elbo", [dense], [compressed]).record()
        make_run(tmp_path / "m" / str(seed), results, curves=False, samples=False)
    source = write_report([tmp_path / "m"]).read_text("utf-8")
    lead = '<p class="verdict unknown"><strong>No loss: not established; active units fell from '
    assert source.count(lead + "13 to 7.</strong>") == 2 + 1  # each run, and both together
    assert "in 2 a measure beside it fell" in source
