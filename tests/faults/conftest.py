"""Processes that begin at once, small and read-only disks, and one finished run."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

# Python 3.11's server does not have the path of the one that starts it, and keeps silent on what
# it cannot import: each process would then import all of it, and be killed while it does.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fault_jobs"])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def start():
    """Starts a job in a process; what still runs when the test ends is killed."""
    begun = []

    def begin(job, *arguments):
        process = CONTEXT.Process(target=job, args=tuple(map(_plain, arguments)))
        process.start()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def finish():
    """Runs a job to its end, which must be a good one."""

    def run(job, *arguments):
        process = CONTEXT.Process(target=job, args=tuple(map(_plain, arguments)))
        process.start()
        process.join(300)
        code = process.exitcode
        process.kill()
        process.join()
        assert code == 0, code

    return run


@pytest.fixture(scope="session")
def outcome():
    """Has `fault_jobs.write` write something; None, or (type, whether an OSError, message)."""
    import fault_jobs

    def run(what, folder, fill, limit=None, temporary=None):
        here, there = CONTEXT.Pipe(duplex=False)
        arguments = (there, what, str(folder), fill, limit, temporary)
        process = CONTEXT.Process(target=fault_jobs.write, args=arguments)
        process.start()
        there.close()
        try:
            return here.recv()
        finally:
            process.join()

    return run


def _plain(argument):
    return str(argument) if isinstance(argument, os.PathLike) else argument


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the feature network is kept that all runs share."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, finish, cache):
    """A run that nothing happened to."""
    import fault_jobs

    folder = tmp_path_factory.mktemp("whole")
    finish(fault_jobs.run, folder, cache)
    return folder


@pytest.fixture
def mount(tmp_path):
    """Mounts a small disk in memory: `mount(size, read_only)`; skips where that is not allowed."""
    disk, mounted = tmp_path / "disk", []

    def make(size="4m", *, read_only=False):
        disk.mkdir(exist_ok=True)
        options = "remount,ro" if read_only else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk of a few megabytes can be mounted here: {error}")
        mounted.append(disk)
        return disk

    yield make
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def read_only(mount, tmp_path):
    """Makes a folder, fills it by a function, and lets nothing more be written there."""

    def make(fill=lambda folder: None):
        if os.geteuid() == 0:
            disk = mount()
            fill(disk)
            return mount(read_only=True)
        folder = tmp_path / "closed"
        folder.mkdir()
        fill(folder)
        folder.chmod(0o555)
        return folder

    return make


@pytest.fixture
def wait():
    """Waits until something is true; fails when the process ends before, or after two minutes."""

    def until(condition, process):
        deadline = time.monotonic() + 120
        while not condition():
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return until


@pytest.fixture
def terminate():
    """Sends SIGTERM, and gives the seconds that the process took to end."""

    def send(process):
        begin = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        return time.monotonic() - begin

    return send
