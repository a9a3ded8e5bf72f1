"""Samples of a run as the page shows them: the file's suffix says whether they are seen or heard.

`results.json` names them under `samples`: a key, and a file in the run's folder. `grid` is the
comparison, `dense` and `compressed` are its two sides, `real` what they should be and `condition`
what they were made from; further ones are `dense_<name>`, `compressed_<name>` and so on. Nothing
here knows what a model draws.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from lightning_compress.lab.report import wording
from lightning_compress.lab.report.loading import Run

__all__ = ["AUDIO_TYPES", "IMAGE_TYPES", "Sample", "SampleView", "data_uri", "samples"]

# Raster formats every browser shows; SVG is left out since it may carry scripts.
IMAGE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
AUDIO_TYPES = {
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".flac": "audio/flac",
}
MOST_BYTES = 1 << 25  # of a sample file
MOST_FILES = 40  # of one run
CAPTIONS = {
    "grid": "Samples from the same latents or conditions: each dense row above its compressed row",
    "dense": "Dense samples",
    "compressed": "Compressed samples",
    "real": "Real samples",
    "condition": "Conditions",
}


def data_uri(content: str | bytes, media_type: str) -> str:
    """Return a `data:` address that carries the content itself.

    >>> data_uri("a", "text/csv")
    'data:text/csv;base64,YQ=='
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


@dataclass(frozen=True)
class Sample:
    """One file: kind "image" or "audio", its caption, its alternative text and its content."""

    kind: str
    caption: str
    alt: str
    uri: str


@dataclass(frozen=True)
class SampleView:
    """Samples shown together: the comparison, and both sides for the difference of two images.

    Attributes:
        title: of further pairs, their name; else empty.
        grid: dense rows above compressed rows.
        dense: one side.
        compressed: the other side.
        real: what they should be, where that is known.
        condition: what they were made from, where that can be shown.
    """

    title: str = ""
    grid: Sample | None = None
    dense: Sample | None = None
    compressed: Sample | None = None
    real: Sample | None = None
    condition: Sample | None = None

    @property
    def sides(self) -> list[Sample]:
        """Both sides, the condition and the real one, as far as they are there."""
        every = (self.condition, self.real, self.dense, self.compressed)
        return [one for one in every if one is not None]

    @property
    def has_difference(self) -> bool:
        """Whether both sides are images, which can be laid over each other."""
        both = (self.dense, self.compressed)
        return all(one is not None and one.kind == "image" for one in both)


def samples(run: Run) -> tuple[list[SampleView], list[str]]:
    """What the page shows of a run's samples, and notes on what is missing."""
    notes: list[str] = []
    found: dict[str, dict[str, Sample]] = {}
    named = {k: v for k, v in wording.section(run.results, "samples").items() if v}
    if len(named) > MOST_FILES:
        notes.append(f"Samples: {len(named)} files are named, the first {MOST_FILES} are shown.")
    for key, name in list(named.items())[:MOST_FILES]:
        side, _, title = str(key).partition("_")
        if side not in CAPTIONS:
            side, title = "dense", str(key)
        try:
            one = _sample(run, str(name), _caption(side, title, str(key)))
        except (ValueError, OSError) as error:
            notes.append(f"Samples: {error}.")
            continue
        found.setdefault(title, {})[side] = one
    return [SampleView(title, **sides) for title, sides in found.items()], notes


def _caption(side: str, title: str, key: str) -> str:
    if not title:
        return CAPTIONS[side]
    return key if title == key else f"{CAPTIONS[side]}, {title.replace('_', ' ')}"


def _sample(run: Run, name: str, caption: str) -> Sample:
    suffix = Path(name).suffix.lower()
    kind, types = ("audio", AUDIO_TYPES) if suffix in AUDIO_TYPES else ("image", IMAGE_TYPES)
    uri = file_uri(run.folder, name, kind, types)
    return Sample(kind, caption, f"{caption} of {wording.model_name(run.results)}", uri)


def file_uri(folder: Path, name: str, kind: str, types: dict[str, str]) -> str:
    """Inline a file that lies inside a run folder.

    Raises:
        ValueError: when the name leaves the folder, has another suffix, or does not exist.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{kind} {name!r} lies outside the run folder")
    if path.suffix.lower() not in types:
        raise ValueError(f"{kind} {name!r} is none of {', '.join(sorted(types))}")
    if not path.is_file():
        raise ValueError(f"{kind} {name!r} is named in results.json but not in the folder")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{kind} {name!r} takes {size} bytes, above {MOST_BYTES}")
    return data_uri(path.read_bytes(), types[path.suffix.lower()])
