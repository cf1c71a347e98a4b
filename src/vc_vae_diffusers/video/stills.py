"""Images: Pillow decides what they hold, and writes them. Not in the paper.

Only more than 8 bits a channel, which Pillow keeps for grey alone, are decoded by FFmpeg.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from ..extras import install_hint
from ..files import whole_file
from .colour import frame_to_rgb, orient
from .info import PathLike, ReadLimits, VideoReadError
from .pixels import to_uint8
from .suffixes import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION_TAG = 0x0112
# As (degrees counter-clockwise, mirrored first).
_EXIF_ORIENTATIONS = {
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (90, True),
    6: (270, False),
    7: (270, True),
    8: (90, False),
}
# TIFF's tags, and what Pillow reads wrongly above 8 bits: grey where 0 is white, and channels one after the other.
_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284
_ZERO_IS_WHITE, _SEPARATE = 0, 2
_HEIF_SUFFIXES = frozenset({".heic", ".heif"})


def check_file(path: Path) -> None:
    """Raises VideoReadError for what is missing, empty or no regular file."""
    if not path.exists():
        raise VideoReadError(path, "does not exist", "Check the path; only local files are read.")
    if not path.is_file():
        raise VideoReadError(path, "is not a regular file", "Pass a video, an image, a folder of images or a pattern.")
    if path.stat().st_size == 0:
        raise VideoReadError(path, "is empty (0 bytes)", "Download or record it again.")


def read_image(path: Path, limits: ReadLimits) -> torch.Tensor:
    """One image file, upright, as (3 or 4, H, W), uint8 or float32 in [0, 255].

    Raises:
        VideoReadError: for anything that is no single picture whose values mean a colour.
    """
    check_file(path)
    _register_heif(path)
    with _pillow_errors(path), Image.open(path) as image:
        limits.check(path, "pixels", image.width * image.height)
        deep_colour = _is_deep_colour(image)  # asked first: reading PNG's EXIF decodes it
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise VideoReadError(path, f"is an animation of {frames} frames", "Convert it to a video.")
        orientation = _EXIF_ORIENTATIONS.get(image.getexif().get(_EXIF_ORIENTATION_TAG, 1), (0, False))
        tags = getattr(image, "tag_v2", {})
        if max(tags.get(_BITS, (8,))) > 8 and tags.get(_PLANES) == _SEPARATE:
            raise VideoReadError(
                path, "holds deep channels one after the other", "Convert it to interleaved ones or 8 bits."
            )
        deep = _decoded_by_ffmpeg(path) if deep_colour else None
        if deep is not None:
            return orient(deep, *orientation)
        return _pillow_rgb(path, ImageOps.exif_transpose(image), image.format, tags)


@contextmanager
def _pillow_errors(path: Path) -> Iterator[None]:
    """Pillow's plugins raise whatever parsing a damaged file comes to: SyntaxError, struct.error, IndexError and more."""
    try:
        yield
    except VideoReadError:
        raise
    except MemoryError as error:  # a damaged PNG may claim gigabytes for a picture of a few pixels
        raise VideoReadError(path, "asks for more memory than there is", "Replace the file, or make it smaller.") from error
    except Image.DecompressionBombError as error:
        raise VideoReadError(path, f"is too large for Pillow ({error})", "Raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:
        raise VideoReadError(path, f"cannot be decoded as an image ({error})", "Replace the file.") from error


def _register_heif(path: Path) -> None:
    if path.suffix.lower() not in _HEIF_SUFFIXES:
        return
    try:
        import pillow_heif
    except ImportError as error:
        problem = "is HEIC, which needs the package pillow-heif"
        raise VideoReadError(
            path, problem, f"Install the extra, {install_hint('heic')}; or convert it to PNG or AVIF."
        ) from error
    pillow_heif.register_heif_opener()


def _pillow_rgb(path: Path, image: Image.Image, file_format: str | None, tags: Mapping[int, Any]) -> torch.Tensor:
    deep_grey = image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not deep_grey:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise VideoReadError(path, f"holds {kind}, of which none is named as white", "Convert it to 8 or 16 bits.")
    if deep_grey:
        grey = torch.from_numpy(np.array(image).astype(np.float32) / 257).expand(3, -1, -1)
        return 255 - grey if tags.get(_PHOTOMETRIC) == _ZERO_IS_WHITE else grey
    array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return torch.from_numpy(array).movedim(-1, 0)


def _is_deep_colour(image: Any) -> bool:
    """Whether it is colour, or grey with alpha, of more than 8 bits, which Pillow would round."""
    tiles: list[Any] = image.tile or [("", None, 0, ())]
    codec, _, _, args = tiles[0]
    args = [args] if isinstance(args, str) else args
    deep = ";16" in str(args[:1]) or (codec == "ppm" and args[1] > 255)
    return deep and not image.mode.startswith("I")


def _decoded_by_ffmpeg(path: Path) -> torch.Tensor | None:
    try:
        with path.open("rb") as file, av.open(file) as container:
            return frame_to_rgb(next(container.decode(video=0)), VideoReformatter())
    except (av.FFmpegError, StopIteration) as error:
        logger.warning("%s: read at 8 of its 16 bits, as FFmpeg cannot decode it (%s)", path, error)
        return None


def write_image(path: PathLike, image: torch.Tensor, *, quality: int = 95) -> None:
    """Write (C, H, W) or (C, 1, H, W), float in [-1, 1] or uint8, by the file's suffix; JPEG, WebP, AVIF with `quality`.

    Raises:
        ValueError: for an unknown suffix, a missing folder or a shape that is no single RGB image.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"path: {path} has no image suffix; use one of {', '.join(sorted(IMAGE_SUFFIXES))}.")
    if image.ndim == 4 and image.shape[1] == 1:
        image = image[:, 0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: shape {tuple(image.shape)} is neither (3, H, W) nor (3, 1, H, W).")
    check_folder(path)
    _register_heif(path)
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    with whole_file(path) as partial:
        Image.fromarray(image.movedim(0, -1).contiguous().cpu().numpy()).save(partial, quality=quality)


def check_folder(path: Path) -> None:
    """Raises ValueError if the folder that a file is to lie in does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder of {path} does not exist; create it first (mkdir -p {path.parent}).")
