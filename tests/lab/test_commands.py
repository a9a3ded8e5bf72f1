"""The commands on files: checkpoints in, `.lcz` out and back, without the model's code."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress import inspect_compressed, load_compressed, write_tensors
from lightning_compress.lab.app import main
from lightning_compress.lab.commands import run_command


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    model[3].weight.data[:, 1:] = 0
    return model.state_dict()


def checkpoint(path, state):
    """The file that a trainer of this kind writes."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".ckpt":
        content = {"epoch": 3, "optimizer_states": [{"lr": 0.1}], "state_dict": state}
        torch.save({**content, "pytorch-lightning_version": lightning.pytorch.__version__}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("back", [".pt", ".safetensors"])
def test_checkpoints_come_back(tmp_path, capsys, state, suffix, back):
    path = checkpoint(tmp_path / f"model{suffix}", state)
    assert run_command(["pack", str(path)]) == 0
    assert "x smaller" in capsys.readouterr().out
    out = tmp_path / f"back{back}"
    assert run_command(["unpack", str(tmp_path / "model.lcz"), "--out", str(out)]) == 0
    found = load_file(out) if back == ".safetensors" else torch.load(out, weights_only=True)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert run_command(["diff", str(path), str(out)]) == 0
    assert f"{len(state)} tensors, all the same" in capsys.readouterr().out


def test_inspect_shows_each_tensor(tmp_path, capsys, state):
    path = checkpoint(tmp_path / "model.pt", state)
    target = tmp_path / "x.lcz"
    run_command(["pack", str(path), "--out", str(target), "--codec", "raw"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(target)])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    info = inspect_compressed(target)
    assert [line.split()[0] for line in lines[1:-2]] == list(info.per_tensor)
    assert next(line for line in lines if line.startswith("3.weight")).split()[1:4] == [
        "3x4", "float32", "75.00%",
    ]  # fmt: skip
    assert lines[-2].split() == ["all", str(info.bytes), str(info.entropy_bound_bytes)]


def test_what_was_packed_loads_into_the_module(tmp_path, state):
    path = checkpoint(tmp_path / "model.ckpt", state)
    run_command(["pack", str(path)])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    load_compressed(tmp_path / "model.lcz", model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_diff_names_what_differs(tmp_path, capsys, state):
    one = checkpoint(tmp_path / "one.pt", state)
    changed = {**state, "3.bias": state["3.bias"] + 0.5, "new": torch.zeros(1, dtype=torch.cfloat)}
    del changed["0.bias"]
    changed["1.weight"] = changed["1.weight"].double()
    other = checkpoint(tmp_path / "other.pt", changed)
    assert run_command(["diff", str(one), str(other)]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "0.bias: only in the first",
        "1.weight: torch.float32 (4,) against torch.float64 (4,)",
        "3.bias: 3 of 3 values differ, by 0.5 at most",
        "new: only in the second",
    ]


def test_float_dtype_is_lossy_as_told(tmp_path, state):
    path = checkpoint(tmp_path / "model.pt", state)
    run_command(["pack", str(path), "--float-dtype", "fp16", "--workers", "2"])
    run_command(["unpack", str(tmp_path / "model.lcz")])
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["0.weight"], state["0.weight"].half().float())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("a.txt", lambda path: path.write_text("x"), "valid suffixes are .lcz, .safetensors, .pt"),
        ("a.pt", lambda path: torch.save(Evil(), path), "without running code of its own"),
        ("a.pt", lambda path: path.write_bytes(b"junk"), "no PyTorch checkpoint: its first bytes"),
        ("a.pt", lambda path: path.write_bytes(b"\x80junk"), "without running code"),
        ("a.pt", Path.touch, "a.pt is empty"),
        ("a.pt", Path.mkdir, "a.pt is a folder: name a file"),
        ("a.onnx", Path.touch, "a.onnx is empty"),
        ("a.pt", lambda path: torch.save([1], path), "holds no named tensors"),
        ("a.pt", lambda path: torch.save({"lr": 1}, path), "'lr' is a int, no tensor; try --key"),
        ("a.safetensors", lambda path: path.write_bytes(b"junk"), "no safetensors file"),
        ("a.pt", lambda path: None, "no file"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path, capsys, monkeypatch, name, make, why):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    assert run_command(["pack", name]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()
    assert not list(tmp_path.glob("*.lcz"))


def test_a_key_chooses_the_entry(tmp_path, capsys, state):
    torch.save({"ema": state, "step": 3}, tmp_path / "a.pt")
    assert run_command(["pack", str(tmp_path / "a.pt"), "--key", "ema"]) == 0
    assert run_command(["pack", str(tmp_path / "a.pt"), "--key", "none"]) == 2
    assert "no 'none'; there are 'ema', 'step'" in capsys.readouterr().err


def test_a_bomb_is_not_unpacked(tmp_path, capsys):
    torch.save({"zeros": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    assert run_command(["pack", str(tmp_path / "a.pt")]) == 0
    assert (tmp_path / "a.lcz").stat().st_size < 300
    assert run_command(["unpack", str(tmp_path / "a.lcz"), "--max-bytes", "1000000"]) == 2
    assert "4194304 bytes of tensors, above max_bytes=1000000" in capsys.readouterr().err


def test_tensors_that_a_format_cannot_hold_are_named(tmp_path, capsys):
    run = torch.zeros(2, dtype=torch.cdouble)
    torch.save({"z": run}, tmp_path / "a.pt")
    run_command(["pack", str(tmp_path / "a.pt")])
    assert run_command(["unpack", str(tmp_path / "a.lcz")]) == 2
    assert "safetensors cannot hold these tensors" in capsys.readouterr().err
    assert run_command(["unpack", str(tmp_path / "a.lcz"), "--out", str(tmp_path / "b.zip")]) == 2
    assert "b.zip: valid suffixes are .safetensors, .pt" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["inspect", "model.lcz"], ["--help"]], ids=["inspect", "help"])
def test_a_reader_that_ends_first_is_no_error(tmp_path, words):
    if "inspect" in words:  # more lines than a pipe's buffer takes
        state = {f"layer{number}.weight": torch.zeros(1) for number in range(1000)}
        write_tensors(state, tmp_path / "model.lcz", codec="raw")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lightning_compress.lab.app", *words],
            cwd=tmp_path,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture
def onnx_file(tmp_path):
    values = np.random.default_rng(0).integers(-3, 4, (60, 20)).astype(np.int8)
    weight = numpy_helper.from_array(values, "weight")
    out = helper.make_tensor_value_info("out", weight.data_type, weight.dims)
    node = helper.make_node("Identity", ["weight"], ["out"])
    model = helper.make_model(helper.make_graph([node], "g", [], [out], [weight]))
    path = tmp_path / "model.int8.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_an_onnx_file_comes_back_to_the_byte(tmp_path, capsys, onnx_file):
    assert run_command(["pack", str(onnx_file)]) == 0
    assert "smaller than the ONNX file" in capsys.readouterr().out
    packed, back = tmp_path / "model.lcz", tmp_path / "back.onnx"
    assert packed.stat().st_size < onnx_file.stat().st_size
    assert run_command(["unpack", str(packed), "--onnx", str(back)]) == 0
    assert back.read_bytes() == onnx_file.read_bytes()
    capsys.readouterr()
    assert run_command(["inspect", str(packed)]) == 0
    shown = capsys.readouterr().out
    assert "graph: weight" in shown
    assert f"an ONNX file of {onnx_file.stat().st_size}" in shown


def test_packing_a_graph_spares_the_weights_beside_it(tmp_path, capsys, onnx_file, state):
    write_tensors(state, tmp_path / "model.lcz")
    before = (tmp_path / "model.lcz").read_bytes()
    assert run_command(["pack", str(onnx_file)]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "model.lcz").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "keyword"),
    [
        (["unpack", "w.lcz", "--onnx", "x.onnx"], "holds no graph"),
        (["unpack", "g.lcz"], "--onnx"),
        (["unpack", "g.lcz", "--onnx", "x.onnx", "--out", "x.pt"], "--out"),
        (["unpack", "g.lcz", "--onnx", "x.onnx", "--graph", "b"], "no graph 'b'"),
        (["unpack", "w.lcz", "--graph", "b"], "--onnx"),
        (["unpack", "g.lcz", "--onnx", "x.onnx", "--max-bytes", "9"], "max_bytes=9"),
        (["pack", "text.onnx"], "no ONNX model"),
        (["pack", "none.onnx"], "none.onnx"),
        (["pack", "model.int8.onnx", "--float-dtype", "fp16", "--out", "y.lcz"], "--float-dtype"),
        (["pack", "model.int8.onnx", "--key", "model", "--out", "y.lcz"], "--key"),
    ],
)
def test_what_cannot_be_packed_or_unpacked_says_so_in_a_line(
    tmp_path, monkeypatch, capsys, onnx_file, state, words, keyword
):
    monkeypatch.chdir(tmp_path)
    write_tensors(state, "w.lcz")
    assert run_command(["pack", onnx_file.name, "--out", "g.lcz"]) == 0
    (tmp_path / "text.onnx").write_text("no model")
    capsys.readouterr()
    assert run_command(words) == 2
    error = capsys.readouterr().err
    assert keyword in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x.onnx").exists()
    assert not (tmp_path / "y.lcz").exists()


def test_names_of_a_file_do_not_reach_the_terminal_raw(tmp_path, capsys):
    odd = "a\x1b[2J\u202eb\nall 0 bytes"
    write_tensors({odd: torch.ones(2)}, tmp_path / "a.lcz")
    write_tensors({odd: torch.zeros(2), "c\x9b": torch.ones(1)}, tmp_path / "b.lcz")
    assert run_command(["inspect", str(tmp_path / "a.lcz")]) == 0
    assert run_command(["diff", str(tmp_path / "a.lcz"), str(tmp_path / "b.lcz")]) == 1
    assert run_command(["inspect", str(tmp_path / "\x1b[31m.lcz")]) == 2
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert r"a\x1b[2J\u202eb\nall 0 bytes" in found.out
    assert r"\x1b[31m" in found.err


def test_a_tensor_named_as_the_header_of_safetensors_is_refused(tmp_path, capsys):
    write_tensors({"__metadata__": torch.ones(2)}, tmp_path / "a.lcz")
    assert run_command(["unpack", str(tmp_path / "a.lcz")]) == 2
    assert "'__metadata__'" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    assert run_command(["unpack", str(tmp_path / "a.lcz"), "--out", str(tmp_path / "a.pt")]) == 0
    assert torch.equal(torch.load(tmp_path / "a.pt")["__metadata__"], torch.ones(2))
