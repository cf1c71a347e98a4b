"""What GIF asks for: a palette for every frame, and its blocks one by one. Not in the paper."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av


class GifPalette:
    """Frames in the 256 colours that suit each best, dithered; one at a time, so that memory is flat."""

    def __init__(self, height: int, width: int):
        self._graph = graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 100))
        both, find, use = graph.add("split"), graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
        sink = graph.add("buffersink")
        source.link_to(both)
        both.link_to(find, 0, 0)
        both.link_to(use, 1, 0)
        find.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """An RGB frame of increasing `pts` (1/100 s) as `pal8`."""
        self._graph.push(frame)
        return self._graph.pull()


def gif_pixels(path: Path) -> int:
    """Width times height, as the header says."""
    with path.open("rb") as file:
        head = file.read(10)
    return int.from_bytes(head[6:8], "little") * int.from_bytes(head[8:10], "little")


def gif_blocks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The first byte of every block of a GIF and its position: b"," for images, b"!" for extensions, b";" for the end."""
    file.seek(10)
    _skip_palette(file, file.read(3)[:1])
    while kind := file.read(1):
        yield kind, file.tell() - 1
        if kind not in b",!":
            return
        if kind == b",":
            _skip_palette(file, file.read(9)[8:])
        file.seek(1, 1)
        while (length := file.read(1)) and length[0]:
            file.seek(length[0], 1)


def _skip_palette(file: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 128:
        file.seek(3 * 2 ** (flags[0] % 8 + 1), 1)


def set_last_delay(path: Path, hundredths: int) -> None:
    """Let the last frame of a GIF stay for so long (1/100 s); FFmpeg would have to know it when it begins the file."""
    with path.open("r+b") as file:
        delays = []
        for kind, position in gif_blocks(file):
            if kind == b"!":
                after = file.tell()
                file.seek(position)
                if file.read(3) == b"!\xf9\x04":
                    delays.append(position + 4)
                file.seek(after)
        if delays:
            file.seek(delays[-1])
            file.write(min(hundredths, 2**16 - 1).to_bytes(2, "little"))
