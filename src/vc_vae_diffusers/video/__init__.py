"""Files to tensors in [-1, 1] and back: the one place that knows containers, codecs and colours.

Names are imported at first use: what needs no more than the table of suffixes does without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .suffixes import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    WRITABLE_VIDEO_SUFFIXES,
    find_media,
    is_media_name,
    list_lines,
)

if TYPE_CHECKING:
    from .info import TIME_TOLERANCE, ReadLimits, VideoInfo, VideoReadError
    from .pixels import from_uint8, resize_and_crop, to_uint8
    from .reading import VideoReader, probe, read_clip
    from .stills import write_image
    from .writing import VideoWriteError, VideoWriter

_WHERE = {
    **dict.fromkeys(("TIME_TOLERANCE", "ReadLimits", "VideoInfo", "VideoReadError"), ".info"),
    **dict.fromkeys(("from_uint8", "resize_and_crop", "to_uint8"), ".pixels"),
    **dict.fromkeys(("VideoReader", "probe", "read_clip"), ".reading"),
    "write_image": ".stills",
    **dict.fromkeys(("VideoWriteError", "VideoWriter"), ".writing"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "IMAGE_SUFFIXES",
    "TIME_TOLERANCE",
    "VIDEO_SUFFIXES",
    "WRITABLE_VIDEO_SUFFIXES",
    "ReadLimits",
    "VideoInfo",
    "VideoReadError",
    "VideoReader",
    "VideoWriteError",
    "VideoWriter",
    "find_media",
    "from_uint8",
    "is_media_name",
    "list_lines",
    "probe",
    "read_clip",
    "resize_and_crop",
    "to_uint8",
    "write_image",
]
