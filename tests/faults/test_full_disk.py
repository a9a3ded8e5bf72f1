"""Every file on a full or a read-only disk: the old one stays, the error says which and why."""

import contextlib
import json
import re
import shutil

import fault_jobs
import pytest

from lightning_compress.files import check_writable

pytestmark = pytest.mark.faults

LIMIT = 900  # bytes that a file may have: less than any of these
NAMES = {
    "save_compressed": "model.lcz",
    "save_compressed, spooled": "model.lcz",
    "write_tensors": "model.lcz",
    "export_onnx": "m.onnx",
    "export_onnx int8": r"(m|tmp\w+/optimized).onnx",
    "report": r"(report.html|plots/\S+\.svg)",
    "EpochCheckpoint": "(last|broken).ckpt",
    "ArtifactCallback": "model.lcz",
    "results.json": "results.json",
}


@pytest.fixture
def before(outcome, whole_run):
    """Leaves an older file in a folder."""

    def leave(folder, what):
        if what == "report":
            shutil.copytree(whole_run, folder, dirs_exist_ok=True)
            # A report that is made again is no news; that of other results is another file.
            results = json.loads((folder / "results.json").read_text())
            results["ratio"] += 1
            results["layers"][0]["bytes"] *= 3
            (folder / "results.json").write_text(json.dumps(results))
        else:
            assert outcome(what, folder, 0) is None

    return leave


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", NAMES)
def test_a_file_that_may_not_grow(tmp_path, outcome, before, what):
    before(tmp_path, what)
    old = contents(tmp_path)
    kind, expected, message = outcome(what, tmp_path, 1, LIMIT, str(tmp_path))
    assert expected, (kind, message)
    assert re.search(rf"{re.escape(str(tmp_path))}/{NAMES[what]}", message), message
    assert "File too large" in message
    assert contents(tmp_path) == old  # not even a temporary rest
    assert outcome(what, tmp_path, 1) is None  # with room again, it works
    assert contents(tmp_path) != old


@pytest.mark.parametrize("what", NAMES)
def test_a_full_disk(outcome, before, mount, what):
    disk = mount("6m")
    folder = disk / "run"
    folder.mkdir()
    before(folder, what)
    old = contents(folder)
    fill(disk / "ballast")
    kind, expected, message = outcome(what, folder, 1)
    assert expected, (kind, message)
    assert re.search(rf"{re.escape(str(folder))}(/{NAMES[what]})?", message), message
    assert "No space left on device" in message
    assert contents(folder) == old
    (disk / "ballast").unlink()
    assert outcome(what, folder, 1) is None
    assert contents(folder) != old


def fill(path):
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    assert shutil.disk_usage(path.parent).free == 0


@pytest.mark.parametrize("what", NAMES)
def test_a_read_only_disk(outcome, before, read_only, what):
    folder = read_only(lambda folder: before(folder, what))
    old = contents(folder)
    kind, expected, message = outcome(what, folder, 1)
    assert expected, (kind, message)
    assert str(folder) in message
    assert re.search("Read-only file system|Permission denied", message)
    assert contents(folder) == old


def test_a_run_on_a_read_only_disk_ends_before_anything_is_trained(
    tmp_path, start, cache, read_only, whole_run
):
    folder = read_only()
    process = start(fault_jobs.app, tmp_path, [*words(cache), f"hydra.run.dir={folder}/run"])
    process.join(60)
    assert process.exitcode == 1
    (errors,) = tmp_path.glob("*.err")
    assert re.search(rf"error: .*(Read-only|denied).*{folder}/run", errors.read_text())
    with pytest.raises(OSError, match=rf"cannot write to the folder {folder} \(.*\), so choose"):
        check_writable(folder, hint=", so choose another")


def test_a_callback_says_at_start_that_it_cannot_write_at_the_end(tmp_path, outcome, read_only):
    folder = read_only()
    kind, _, message = outcome("ArtifactCallback, elsewhere", tmp_path, str(folder))
    assert kind in ("OSError", "PermissionError"), message
    assert f"cannot write to the folder {folder}" in message
    assert not (tmp_path / "begun").exists()  # no batch was trained


def test_a_cache_that_cannot_be_kept_costs_no_run(tmp_path, start, read_only):
    folder = read_only()
    process = start(fault_jobs.app, tmp_path, [*words(folder), "hydra.run.dir=run"])
    process.join(300)
    (errors,) = tmp_path.glob("*.err")
    assert process.exitcode == 0, errors.read_text()
    assert "it is trained again next time" in errors.read_text()
    assert (tmp_path / "run" / "report.html").exists()


def words(cache):
    return [*fault_jobs.SMALL, "trainer.max_epochs=1", f"evaluate.cache_dir={cache}"]


def test_a_full_temporary_folder_is_named(outcome, mount, tmp_path):
    disk = mount("1m")
    fill(disk / "ballast")
    for what in ("file_sizes", "export_onnx int8"):
        kind, expected, message = outcome(what, tmp_path, 1, None, str(disk))
        assert expected, (kind, message)
        assert str(disk) in message, message
