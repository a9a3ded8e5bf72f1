"""A job ends with the process that launched it, also when an interrupt got lost."""

import os
import subprocess
import sys
import time

import pytest

JOB = """
import os, pathlib, signal, time
from lightning_compress.lab.sweeps import jobs as watching
seen, told = pathlib.Path("seen"), []
def interrupted(*_):  # the first one is lost, as one that comes in a finalizer is
    told.append(1)
    if len(told) == 2:
        seen.write_text("2")
        os._exit(0)
signal.signal(signal.SIGINT, interrupted)
watching.SECONDS = watching.PATIENCE = 0.1
watching.stop_with_launcher()
assert watching.WATCH not in os.environ  # its own children do not watch
seen.write_text("0")
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    time.sleep(0.01)
"""
LAUNCHER = """
import os, pathlib, subprocess, sys, time
from lightning_compress.lab.sweeps.jobs import WATCH
environment = {**os.environ, WATCH: str(os.getpid())}
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
while not pathlib.Path("seen").exists():
    time.sleep(0.01)
time.sleep(0.3)
assert job.poll() is None and pathlib.Path("seen").read_text() == "0"
"""


@pytest.mark.skipif(os.name != "posix", reason="parents are watched on POSIX alone")
def test_a_job_is_interrupted_until_it_ends(tmp_path):
    subprocess.run([sys.executable, "-c", LAUNCHER, JOB], cwd=tmp_path, check=True, timeout=60)
    deadline = time.monotonic() + 30
    while (tmp_path / "seen").read_text() != "2":
        assert time.monotonic() < deadline
        time.sleep(0.05)
