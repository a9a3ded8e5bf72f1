"""Inlining pictures."""

from __future__ import annotations

import base64
from pathlib import Path

__all__ = ["data_uri", "image_uri"]

# Raster formats every browser shows; SVG is left out since it may carry scripts.
MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}


def data_uri(content: str | bytes, media_type: str) -> str:
    """Return a `data:` address that carries the content itself.

    >>> data_uri("a", "text/csv")
    'data:text/csv;base64,YQ=='
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def image_uri(folder: Path, name: str) -> str:
    """Inline a picture that lies inside a run folder.

    Raises:
        ValueError: when the name leaves the folder, is no raster image, or does not exist.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"picture {name!r} lies outside the run folder")
    if path.suffix.lower() not in MEDIA_TYPES:
        raise ValueError(f"picture {name!r} is none of {', '.join(sorted(MEDIA_TYPES))}")
    if not path.is_file():
        raise ValueError(f"picture {name!r} is named in results.json but not in the folder")
    return data_uri(path.read_bytes(), MEDIA_TYPES[path.suffix.lower()])
