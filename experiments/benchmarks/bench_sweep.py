"""Twelve small runs one after another, then two at a time by joblib: seconds and their ratio.

Each way has a folder and a store of dense models of its own. Ends in a line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ["trainer.max_epochs=20", "evaluate.latency_repeats=5", "threads=1"]
SWEPT = [
    "compression.prune.final_sparsity=0.5,0.8,0.9,0.95",
    "compression.quantize.weight_bits=4,6,8",
]
WAYS = {
    "one after another": [],
    "joblib, 2 jobs": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


def seconds(launcher: list[str], folder: Path, cache: Path) -> float:
    """How long the sweep takes in an empty folder, with the feature network ready."""
    start = time.monotonic()
    words = [*SETTINGS, *SWEPT, f"evaluate.cache_dir={cache}", *launcher]
    command = [sys.executable, "-m", "lightning_compress.lab.app", "-m", *words]
    subprocess.run(command, cwd=folder, check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    root = (parser.parse_args().out or Path(tempfile.mkdtemp())).absolute()
    cache = root / "features"
    (root / "warm").mkdir(parents=True, exist_ok=True)
    warm = [*SETTINGS, "trainer.max_epochs=1", f"evaluate.cache_dir={cache}"]
    subprocess.run(
        [sys.executable, "-m", "lightning_compress.lab.app", *warm], cwd=root / "warm", check=True
    )
    found = {}
    for place, (way, launcher) in enumerate(WAYS.items()):
        folder = root / str(place)
        folder.mkdir()
        found[way] = round(seconds(launcher, folder, cache), 1)
    one, two = found.values()
    print(json.dumps({**found, "ratio": round(two / one, 3)}))


if __name__ == "__main__":
    main()
