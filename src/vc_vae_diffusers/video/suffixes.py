"""Which files are pictures: the one table of suffixes, and how folders and list files are searched for them.

Not in the paper.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..files import read_text

# Read and written by Pillow as one picture; HEIC needs the package pillow-heif.
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".heif"}
)
# Read and written.
WRITABLE_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif"})
# What folders are searched for. A video named in full is read whatever its suffix, if FFmpeg knows its content.
VIDEO_SUFFIXES = WRITABLE_VIDEO_SUFFIXES | {
    *(".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".flv", ".ogv", ".wmv", ".mxf", ".3gp", ".y4m"),
}
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


def is_media_name(name: str, suffixes: Iterable[str] = MEDIA_SUFFIXES) -> bool:
    """Whether a relative path names such a file; a hidden one is none: macOS keeps `._clip.mp4` beside `clip.mp4`."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in suffixes


def find_media(root: Path, suffixes: Iterable[str] = MEDIA_SUFFIXES) -> list[str]:
    """The files of a folder and its subfolders with such suffixes, by their paths below it with `/`, sorted."""
    files = (Path(folder, file) for folder, _, files in os.walk(root, followlinks=True) for file in files)
    names = (path.relative_to(root).as_posix() for path in files)
    return sorted(name for name in names if is_media_name(name, suffixes) and (root / name).is_file())


def list_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a list file with their numbers: stripped, without empty ones, comments and a byte order mark.

    `#` begins a comment at the start of a line, and behind a space unless the line ends like the name of a file:
    `cat #shorts.mp4` is one, `cat.mp4 # a cat` names `cat.mp4`.

    Raises:
        ValueError: for what is not text, and what may never end.
    """
    try:
        lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").splitlines()]
    except ValueError as error:
        raise ValueError(f"{error}; give a text file with one name a line") from error
    named = (line if is_media_name(line.split("/")[-1]) else re.split(r"\s#", line)[0].rstrip() for line in lines)
    return [(number, line) for number, line in enumerate(named, start=1) if line and not line.startswith("#")]


def is_shards(data: str) -> bool:
    """Return whether ``data`` names webdataset shards: ``x-{0000..0127}.tar``, ``DIR/*.tar``, ``pipe:…``."""
    return data.startswith("pipe:") or data.endswith((".tar", ".tar.gz", ".tgz"))
