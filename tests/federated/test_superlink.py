"""The example app under a real SuperLink and two SuperNodes on loopback: one killed, one late."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra federated is not installed")

ROOT = Path(__file__).parents[2]
APP = ROOT / "experiments" / "examples" / "federated_app"
TIMEOUT = 600  # each task of Flower's is a process that imports PyTorch anew
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Network:
    """Processes of one test, each a session of its own that `stop` ends as a whole."""

    def __init__(self, folder):
        self.folder, self.port, self.processes = folder, free_port(), []
        self.bin = Path(sys.executable).parent
        home = folder / "home"
        home.mkdir()
        address = f'address = "127.0.0.1:{self.port}"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n[superlink.local]\n{address}\ninsecure = true\n'
        )
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        self.env = {**os.environ, "FLWR_HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": path,
                    "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def begin(self, name, *words):
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [self.bin / words[0], *words[1:]], env=self.env, cwd=self.folder,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def link(self):
        self.begin(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1",
            "--port", str(self.port), "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.until(self.answers, "the SuperLink")

    def answers(self):
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def node(self, place):
        return self.begin(
            f"node{place}", "flower-supernode", "--insecure",
            "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f"partition-id={place} num-partitions=2",
        )  # fmt: skip

    def run(self, **config):
        words = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
                         for key, value in config.items())  # fmt: skip
        app = self.folder / "app"
        shutil.copytree(APP, app)
        command = [self.bin / "flwr", "run", str(app), "local", "--run-config", words]
        subprocess.run(command, env=self.env, cwd=self.folder, check=True, timeout=TIMEOUT)

    def until(self, ready, what):
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if ready():
                return
            time.sleep(0.5)
        logs = "\n".join(
            f"{one.name}: {one.read_text()[-1500:]}" for one in self.folder.glob("*.log")
        )
        pytest.fail(f"waited {TIMEOUT} s for {what}\n{logs}")

    def has(self, name, text):
        return lambda: text in (self.folder / f"{name}.log").read_text(errors="replace")

    @staticmethod
    def stop(process, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(timeout=30)

    def close(self):
        for process in reversed(self.processes):
            self.stop(process)


@pytest.fixture
def network(tmp_path):
    found = Network(tmp_path)
    yield found
    found.close()


def test_one_node_is_killed_in_a_round_and_another_joins_late(network, tmp_path):
    network.link()
    first = network.node(0)
    network.until(network.has("node0", "SuperNode ID"), "the first node")
    network.run(rounds=3, nodes=1, timeout=90, folder=str(tmp_path))

    def row(number):
        path = tmp_path / f"round-{number}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    network.until(lambda: row(1), "the first round")
    assert row(1)["clients"] == 1
    assert row(1)["refused"] == {}
    network.node(1)  # late: it has none of the first round
    network.until(network.has("node1", "SuperNode ID"), "the late node")
    network.stop(first)  # in the second round
    network.until(lambda: row(3), "the last round")
    assert row(3)["clients"] == 1  # the late one alone: it was brought up to the server's version
    assert 0 < row(3)["up"] < 100_000
