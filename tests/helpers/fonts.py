"""Two typefaces that are installed wherever matplotlib is, and characters that both have."""

import string
from pathlib import Path

import matplotlib

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, SERIF = str(FOLDER / "DejaVuSans.ttf"), str(FOLDER / "DejaVuSerif.ttf")
GREEK, CYRILLIC = (
    "".join(map(chr, range(first, last))) for first, last in ((0x3B1, 0x3CA), (0x410, 0x450))
)
CHARACTERS = string.ascii_letters + string.digits + GREEK + CYRILLIC
GLYPHS = [f"data.source={SANS}", f"data.target={SERIF}", f"data.characters='{CHARACTERS}'"]
