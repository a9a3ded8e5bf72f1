import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_compress import files
from lightning_compress.files import atomic_file, check_writable, write_atomically


def test_writing_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.lcz"
    path.write_bytes(b"old")
    assert write_atomically(path, b"new") == path
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    path = tmp_path / "a.lcz"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "a.lcz", tmp_path / "file" / "a.lcz", tmp_path / "folder"):
        with pytest.raises(OSError, match="cannot write the file") as caught:
            write_atomically(path, b"new")
        assert caught.value.filename == str(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_text_is_utf8_and_missing_folders_are_made_on_request(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomically(path, "ü", parents=True)
    assert path.read_bytes() == "ü".encode()


def test_a_block_that_raises_writes_nothing(tmp_path):
    def half():
        with atomic_file(tmp_path / "a") as stream:
            stream.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("age", [-86_400, 0, 86_400])
def test_a_write_removes_what_a_killed_one_left_whatever_its_age(tmp_path, age):
    path = tmp_path / "a[1].lcz"
    rest, others = tmp_path / ".a[1].lcz.0123abcd.tmp", tmp_path / ".b.lcz.0123abcd.tmp"
    for one in (rest, others):
        one.write_bytes(b"half")
        os.utime(one, (time.time() - age,) * 2)
    write_atomically(path, b"new")
    assert set(tmp_path.iterdir()) == {path, others}


def test_a_write_leaves_that_of_another_alone(tmp_path):
    path = tmp_path / "a.lcz"
    with atomic_file(path) as stream:
        stream.write(b"first")
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("letter", ["a", "ü", "模"])
def test_the_longest_names_can_be_written(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_looked_at_without_leaving_anything(tmp_path):
    check_writable(tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot write to the folder .*/file .*: choose another"):
        check_writable(tmp_path / "file", hint=": choose another")


LOOP = """
import sys, pathlib, runpy
write_atomically = runpy.run_path(sys.argv[1])["write_atomically"]  # without the whole package
path = pathlib.Path(sys.argv[2])
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(path, bytes([letter]) * 5_000_000)
"""


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"a" * 5_000_000)
    for attempt in range(4):
        command = [sys.executable, "-c", LOOP, files.__file__, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.03 + 0.017 * attempt)
            child.send_signal(signal.SIGKILL)
        assert path.read_bytes() in (b"a" * 5_000_000, b"b" * 5_000_000)


def test_the_permissions_of_a_file_stay(tmp_path):
    path = tmp_path / "a.lcz"
    seen = []
    for mode in (0o600, 0o640, 0o444, 0o666):
        path.write_bytes(b"old") if not path.exists() else None
        path.chmod(mode)
        with atomic_file(path) as stream:
            (temporary,) = [one for one in tmp_path.iterdir() if one != path]
            seen.append(temporary.stat().st_mode & 0o077)
            stream.write(b"new")
        assert path.stat().st_mode & 0o777 == mode
        assert path.read_bytes() == b"new"
    assert seen == [0] * 4  # what is half written, nobody else reads
    os.umask(old := os.umask(0o022))
    write_atomically(tmp_path / "b", b"")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o666 & ~old


def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="pipe or socket, no regular file"):
            write_atomically(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="/dev/null"):
        write_atomically(files.Path("/dev/null"), b"new")
    assert not files.Path("/dev/null").is_file()


def test_a_pipe_in_the_place_of_a_left_over_does_not_hang(tmp_path):
    rest = tmp_path / ".a.lcz.0123abcd.tmp"
    os.mkfifo(rest)
    write_atomically(tmp_path / "a.lcz", b"new")
    assert rest.is_fifo()


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_an_empty_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="names a folder"):
        write_atomically(files.Path(name), b"new")
    assert not list(tmp_path.iterdir())


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "far").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "far")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "far").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()
