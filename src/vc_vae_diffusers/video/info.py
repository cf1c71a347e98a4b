"""What reading can say: what a file holds, what is wrong with it, and how large it may be. Not in the paper."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, overload

PathLike = str | os.PathLike

# A frame whose timestamp is late by this part of a period is on time: containers round times, Matroska to milliseconds. The
# part is an odd one, so that no common pair of frame rates puts frames exactly on the border.
TIME_TOLERANCE = Fraction(2, 9)


class VideoReadError(ValueError):
    """A file that cannot be read as asked. The message names the file, what is wrong and what to do about it."""

    def __init__(self, path: PathLike, problem: str, remedy: str):
        super().__init__(f"{os.fspath(path)}: {problem}. {remedy}")


def check_machine(path: PathLike, error: Exception, *numbers: int) -> None:
    """Raises MemoryError for an error that says of the machine, and not of the file, that it has no thread or memory left.

    Args:
        path: of the file that was at work.
        error: of FFmpeg.
        numbers: that say so; EAGAIN always does: threads that could not be started.
    """
    if getattr(error, "errno", None) in (errno.EAGAIN, *numbers):
        raise MemoryError(f"out of memory, as it seems: no memory or thread is left for {os.fspath(path)}") from error


@contextmanager
def system_errors(path: PathLike) -> Iterator[None]:
    """What the system says of a file that went away or is closed to this user, as what reading says of all others."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise VideoReadError(path, problem, "Check the path and its permissions.") from error


@dataclass(frozen=True)
class VideoInfo:
    """What a header and the first frame say. `width` and `height` are pixels after the rotation has been applied."""

    path: str
    kind: Literal["video", "image", "sequence"]
    width: int
    height: int
    fps: Fraction
    num_frames: int | None  # None where the container does not say
    duration: Fraction | None  # seconds
    rotation: int  # degrees counter-clockwise that the reader applies: 0, 90, 180 or 270
    mirrored: bool  # the reader flips the frame left to right before rotating it
    has_audio: bool
    has_alpha: bool
    bit_depth: int
    codec: str
    pixel_format: str
    color_matrix: str
    color_range: str
    sample_aspect_ratio: Fraction  # width / height of one pixel, after the rotation


@dataclass(frozen=True)
class ReadLimits:
    """How large a file may be before reading it is refused: a few bytes can claim a picture of gigabytes or years of video.

    Args:
        pixels: of one picture; the default is 8192 x 8192.
        frames: of one file.
        seconds: of one file.
    """

    pixels: int = 2**26
    frames: int = 10_000_000
    seconds: int = 7 * 24 * 3600

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}: {getattr(self, field.name)} must be at least 1.")

    @classmethod
    def default(cls) -> ReadLimits:
        """The limits above, or what the variables `VCVAE_MAX_PIXELS`, `VCVAE_MAX_FRAMES`, `VCVAE_MAX_SECONDS` say.

        Raises:
            ValueError: if one of them is no positive integer.
        """
        names = {field.name: f"VCVAE_MAX_{field.name.upper()}" for field in fields(cls)}
        texts = {field: (name, os.environ[name]) for field, name in names.items() if name in os.environ}
        for name, text in texts.values():
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name}: {text!r} must be a positive integer.")
        return cls(**{field: int(text) for field, (_, text) in texts.items()})

    def check(self, path: PathLike, what: str, value: int | Fraction) -> None:
        """Raises VideoReadError if a file has more than this of `what` ("pixels", "frames" or "seconds")."""
        limit = getattr(self, what)
        if value > limit:
            problem = f"has {float(value):g} {what}, more than the limit of {limit}"
            raise VideoReadError(path, problem, f"Set VCVAE_MAX_{what.upper()} or pass limits= to allow it.")


@overload
def exact_fraction(value: Fraction | float) -> Fraction: ...
@overload
def exact_fraction(value: None) -> None: ...
def exact_fraction(value: Fraction | float | None) -> Fraction | None:
    """A float as the fraction meant: 29.97 as 2997/100, not as its binary expansion."""
    return Fraction(value).limit_denominator(100_000) if value is not None else None
