"""Fuzz the decoders, guided by coverage. Needs `pip install atheris`; stop it with Ctrl-C.

python tests/fuzz/run.py [tests/fuzz/corpus] [-max_total_time=600] [other libFuzzer options]
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["lightning_compress.lcz"]):
    import target

if __name__ == "__main__":
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()
