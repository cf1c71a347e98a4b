"""Whether a file ends where its container says: FFmpeg takes the end of a truncated file for the end of the video.

Only the headers of the outermost pieces are looked at, a few reads a file. Not in the paper.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .gif import gif_blocks

logger = logging.getLogger(__name__)

# The length in bytes of the piece whose first bytes these are; None where nothing can be said about it or what follows.
_Piece = Callable[[bytes], int | None]


@functools.cache
def _warn_of_silence(what: str) -> None:
    """Say once per process that a container cannot tell a file that was cut off from a whole one."""
    logger.warning("%s does not say where it ends: one that was cut off at a frame's end reads as a shorter one", what)


def missing_end(path: Path, formats: set[str]) -> str | None:
    """What a truncated file lacks by its container's own account; None for a whole one, and where there is no account.

    Args:
        path: of a file.
        formats: FFmpeg's names of its container.
    """
    size = path.stat().st_size
    for name in formats & _SILENT.keys():
        _warn_of_silence(_SILENT[name])
    with path.open("rb") as file:
        for name in formats & _PIECES.keys():
            return _missing_piece(file, size, _PIECES[name])
        for name in formats & _ENDS.keys():
            return _ENDS[name](file, size)
    return None


def _missing_piece(file: BinaryIO, size: int, piece: _Piece) -> str | None:
    """Walk the pieces from the file's beginning; the last one must end within the file."""
    position = 0
    while position < size:
        file.seek(position)
        length = piece(file.read(40))
        if length is None:
            return None
        position += length
    return f"{position - size} bytes are missing at its end" if position > size else None


_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"styp", b"meta", b"uuid"})
_FILLERS = frozenset({b"free", b"skip", b"wide"})


def _mov_box(head: bytes) -> int | None:
    length, kind = int.from_bytes(head[:4], "big"), head[4:8]
    if length == 1:
        length = int.from_bytes(head[8:16], "big")
    return length if kind in _BOXES | _FILLERS and length >= 8 else None


def _riff_chunk(head: bytes) -> int | None:
    length = int.from_bytes(head[4:8], "little")
    return 8 + length + length % 2 if head[:4] == b"RIFF" and length else None


def _asf_object(head: bytes) -> int | None:
    length = int.from_bytes(head[16:24], "little")
    known = head[:4] in (b"\x30\x26\xb2\x75", b"\x36\x26\xb2\x75", b"\x90\x08\x00\x33")  # header, data, index
    return length if known and length > 50 else None


def _mxf_packet(head: bytes) -> int | None:
    if head[:4] != b"\x06\x0e\x2b\x34" or len(head) < 26:
        return None
    width = head[16] & 127 if head[16] > 127 else 0
    return 17 + width + (int.from_bytes(head[17 : 17 + width], "big") if width else head[16])


_SEGMENT = b"\x18\x53\x80\x67"
# EBML, SeekHead, Info, Tracks, Cluster, Cues, Attachments, Chapters, Tags.
_LONG_NAMES = {b"\x1a\x45\xdf\xa3", b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", _SEGMENT} | {
    *(b"\x1f\x43\xb6\x75", b"\x1c\x53\xbb\x6b", b"\x19\x41\xa4\x69", b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67")
}
# Void, CRC-32; in a cluster: Timestamp, Position, PrevSize, SimpleBlock, BlockGroup.
_SHORT_NAMES = {b"\xec", b"\xbf", b"\xe7", b"\xa7", b"\xab", b"\xa3", b"\xa0"}


def _matroska_end(file: BinaryIO, size: int) -> str | None:
    """Walks the parts of the segment, so that a hole is noticed as well, and of what live recordings leave open."""
    position, end = 0, size
    while position < end:
        file.seek(position)
        head = file.read(12)
        name = head[:1] if head[:1] in _SHORT_NAMES else head[:4]
        width = 9 - head[len(name)].bit_length() if len(head) > len(name) else 9
        if name not in _LONG_NAMES | _SHORT_NAMES or width > 8:
            return f"its part at byte {position} is damaged"
        length = int.from_bytes(head[len(name) : len(name) + width], "big") - (1 << 7 * width)
        position += len(name) + width
        if length == (1 << 7 * width) - 1:
            _warn_of_silence("A live recording in Matroska")
        elif name == _SEGMENT:
            end = position + length
        else:
            position += length
        if max(position, end) > size:
            return f"{max(position, end) - size} bytes are missing at its end"
    return None


def _gif_end(file: BinaryIO, size: int) -> str | None:
    for kind, position in gif_blocks(file):
        if kind == b";":
            return None
        if kind not in b",!":
            return f"its block at byte {position} is damaged"
    return "its last block is missing"


def _ogg_end(file: BinaryIO, size: int) -> str | None:
    file.seek(max(0, size - 2**17))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    whole = len(page) > 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return None if whole and page[5] & 4 else "its last page is missing"


def _y4m_end(file: BinaryIO, size: int) -> str | None:
    """All frames are of one length."""
    file.seek(0)
    frames = len(file.readline())
    first = len(file.readline())
    length = 0
    while piece := file.read(2**20):
        found = piece.find(b"FRAME")
        length += found if found >= 0 else len(piece)
        if found >= 0:
            break
    return None if (size - frames) % (first + length) == 0 else "its last frame is incomplete"


def _flv_end(file: BinaryIO, size: int) -> str | None:
    """The last four bytes count the bytes of the tag before them, which says its own length."""
    file.seek(max(0, size - 4))
    tag = int.from_bytes(file.read(4), "big")
    if 11 <= tag <= size - 13:
        file.seek(size - 4 - tag)
        if int.from_bytes(file.read(4)[1:], "big") == tag - 11:
            return None
    return "its last tag is incomplete"


def _transport_end(file: BinaryIO, size: int) -> str | None:
    """Whole packets are all that is asked for; where the stream ends, nothing says."""
    length = next((n for n in (188, 192, 204) if _synchronous(file, n)), None)
    return f"its last packet of {length} bytes is incomplete" if length and size % length else None


def _synchronous(file: BinaryIO, length: int) -> bool:
    file.seek(0)
    head = file.read(4 * length + 5)
    return any(all(head[i : i + 1] == b"G" for i in range(offset, len(head), length)) for offset in (0, 4))


_PIECES: dict[str, _Piece] = {"mov": _mov_box, "avi": _riff_chunk, "asf": _asf_object, "mxf": _mxf_packet}
_ENDS: dict[str, Callable[[BinaryIO, int], str | None]] = {
    "matroska": _matroska_end,
    "gif": _gif_end,
    "ogg": _ogg_end,
    "flv": _flv_end,
    "yuv4mpegpipe": _y4m_end,
    "mpegts": _transport_end,
}
# What never says how much is to come.
_SILENT = {
    "mpegts": "An MPEG transport stream",
    "mpeg": "An MPEG program stream",
    **dict.fromkeys(("h264", "hevc", "vvc", "m4v", "mpegvideo", "obu", "mjpeg"), "A raw stream without a container"),
}
