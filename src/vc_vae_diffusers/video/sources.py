"""What a path means, what is there, and its pictures one by one: a video, an image, a folder of images or a pattern.

Pictures come as `(3, H, W)`, uint8, or float32 in [0, 255] where 8 bits do not hold them. Not in the paper.
"""

from __future__ import annotations

import errno
import functools
import glob
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from .colour import HDR_TRANSFERS, bit_depth, color_matrix, composite, frame_to_rgb, full_range, has_alpha, orient
from .decoding import Decoding, frame_index, open_container, picture_streams
from .info import TIME_TOLERANCE, PathLike, ReadLimits, VideoInfo, VideoReadError, check_machine, system_errors
from .stills import read_image
from .suffixes import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

# What ISO files of one picture call themselves: AVIF and HEIC under another suffix.
_STILL_BRANDS = frozenset({b"avif", b"heic", b"heix", b"mif1"})


@dataclass
class Picture:
    """One source frame: when it appears, for how long (seconds), and how to get it as (3, H, W) in [0, 255]."""

    time: Fraction
    period: Fraction
    load: Callable[[], torch.Tensor]


class FileSource:
    """Frames of a video file from a frame number or a time on.

    Args:
        path: of the file, whose header and first frame are read at once.
        background: RGB (0-255) that frames with alpha are composited on.
        threads: of the decoder; 0 is one per core.
        limits: on the file's size.

    Raises:
        VideoReadError: for anything that is missing, empty, damaged, too large or has no pictures.
    """

    def __init__(self, path: Path, background: Sequence[int], threads: int, limits: ReadLimits):
        self.path, self.background, self.threads, self.limits = path, background, threads, limits
        with Decoding(path, threads=1, limits=limits) as decoding:
            frame = next(decoding.frames())
            self.info = _file_info(decoding, frame)
            self._seekable = decoding.seekable
            self.origin, self.time_base = frame.pts, decoding.stream.time_base
            end = decoding.stated_end
            self._end = None if end is None else end - self.origin * self.time_base

    def pictures(self, start: int, start_time: Fraction | None) -> Iterator[Picture]:
        """Pictures from frame `start`, or from the one on screen at `start_time` seconds, in order.

        How long the last one stays is known at the end at the latest: its period is set then.
        """
        scaler = VideoReformatter()
        picture, number = None, start
        for frame in self._from_number(start) if start_time is None else self._from_time(start_time):
            picture = Picture(self._seconds(frame), self._period(frame), functools.partial(self._load, frame, scaler))
            number += 1
            self.limits.check(self.path, "frames", number)
            self.limits.check(self.path, "seconds", picture.time + picture.period)
            yield picture
        if picture is not None:
            picture.period = self._last_period(picture.time, picture.period)

    def _seconds(self, frame: av.VideoFrame) -> Fraction:
        return (frame.pts - self.origin) * self.time_base

    def _period(self, frame: av.VideoFrame) -> Fraction:
        return frame.duration * self.time_base if frame.duration else 1 / self.info.fps

    def _last_period(self, time: Fraction, period: Fraction) -> Fraction:
        """Matroska, and mp4 with reordered frames, count the last frame's duration only in that of the stream."""
        return period if self._end is None or self._end <= time else self._end - time

    def _load(self, frame: av.VideoFrame, scaler: VideoReformatter) -> torch.Tensor:
        try:
            rgb = frame_to_rgb(frame, scaler, self.threads)
        except (av.FFmpegError, ValueError) as error:
            check_machine(self.path, error, errno.ENOMEM)
            problem = f"its pixel format {frame.format.name} cannot be converted to RGB ({error})"
            raise VideoReadError(self.path, problem, "Re-encode it, e.g. to H.264 yuv420p.") from error
        return orient(composite(rgb, self.background), self.info.rotation, self.info.mirrored)

    def _from_number(self, start: int) -> Iterator[av.VideoFrame]:
        stat = self.path.stat()
        index = frame_index(os.fspath(self.path), stat.st_size, stat.st_mtime_ns, self.limits) if start else None
        if index is not None:
            if start >= len(index):
                raise VideoReadError(self.path, f"has {len(index)} frames, none at {start}", "Ask for an earlier start.")
            frames = itertools.dropwhile(lambda frame: frame.pts < index[start], self._seek(index[start]))
            first = next(frames, None)
            if first is not None and first.pts == index[start]:
                yield first
                yield from frames
                return
            logger.warning("%s: the packet index does not match the frames; decoding from the start", self.path)
        number = -1
        with Decoding(self.path, self.threads, self.limits) as decoding:
            for number, frame in enumerate(decoding.frames()):
                if number >= start:
                    yield frame
        if number < start:
            raise VideoReadError(self.path, f"has {number + 1} frames, none at {start}", "Ask for an earlier start.")

    def _from_time(self, start_time: Fraction) -> Iterator[av.VideoFrame]:
        target = self.origin + start_time / self.time_base
        frames = self._seek(target)
        shown = next(frames)
        period = 1 / self.info.fps / self.time_base
        for frame in frames:
            if frame.pts > target + TIME_TOLERANCE * min(period, frame.pts - shown.pts):
                yield shown
                yield frame
                yield from frames
                return
            shown = frame
        time = self._seconds(shown)
        end = time + self._last_period(time, max(self._period(shown), 1 / self.info.fps))
        if start_time >= end:
            problem = f"ends at {float(end):.3f} s, before the start {float(start_time):.3f} s"
            raise VideoReadError(self.path, problem, "Ask for an earlier start.")
        yield shown

    def _seek(self, target: Fraction | int) -> Iterator[av.VideoFrame]:
        """Frames from some keyframe at or before `target`. Keyframes that turn out to lie later (reordering, open groups,
        gradual refresh) are answered by seeking further back, at last by decoding from the start."""
        for seconds_back in (0, 1, 4, 16, None) if self._seekable else (None,):
            goal = None if seconds_back is None else int(target - seconds_back / self.time_base)
            if goal is not None and goal <= self.origin:
                goal = None
            with Decoding(self.path, self.threads, self.limits) as decoding:
                frames = decoding.frames(goal)
                try:
                    first = next(frames, None)
                except VideoReadError:
                    if goal is None:
                        raise
                    continue
                if goal is not None and (first is None or not self.origin <= first.pts <= target):
                    continue
                yield first
                yield from frames
                return


class ImageSource:
    """The images of a folder or pattern at a constant rate; a single image is a sequence of one."""

    def __init__(self, paths: list[Path], info: VideoInfo, background: Sequence[int], limits: ReadLimits):
        self.paths, self.info, self.background, self.limits = paths, info, background, limits

    def pictures(self, start: int, start_time: Fraction | None) -> Iterator[Picture]:
        """Pictures from frame `start`, or from the one on screen at `start_time` seconds, in order."""
        period = 1 / self.info.fps
        if start_time is not None:
            start = int(start_time / period + TIME_TOLERANCE)
        if start >= len(self.paths):
            raise VideoReadError(self.info.path, f"has {len(self.paths)} frames, none at {start}", "Start earlier.")
        for number in range(start, len(self.paths)):
            yield Picture(number * period, period, functools.partial(self._load, self.paths[number]))

    def _load(self, path: Path) -> torch.Tensor:
        return composite(read_image(path, self.limits), self.background)


def open_source(
    path: Path, background: Sequence[int], sequence_fps: Fraction, threads: int, limits: ReadLimits
) -> FileSource | ImageSource:
    """What `path` holds: a video, an image, a folder of images or a pattern; its `info` says what was found.

    Raises:
        VideoReadError: for anything that is missing, empty, damaged, too large or has no pictures.
    """
    with system_errors(path):
        return _open_source(path, background, sequence_fps, threads, limits)


def _open_source(
    path: Path, background: Sequence[int], sequence_fps: Fraction, threads: int, limits: ReadLimits
) -> FileSource | ImageSource:
    paths = _sequence_paths(path)
    if paths is not None or path.suffix.lower() in IMAGE_SUFFIXES or _is_iso_still(path):
        info = _image_info(paths or [path], os.fspath(path), "image" if paths is None else "sequence", sequence_fps, limits)
        return ImageSource(paths or [path], info, background, limits)
    return FileSource(path, background, threads, limits)


def first_frame_time(path: Path) -> Fraction:
    """Seconds at which a file's video begins on the file's own clock, to which its audio refers; 0 without video."""
    with open_container(path) as container:
        if not picture_streams(container):
            return Fraction(0)
    source = FileSource(path, (0, 0, 0), 1, ReadLimits.default())
    return source.origin * source.time_base


# ---------------------------------------------------------------------------------------------------- what is there


def _file_info(decoding: Decoding, frame: av.VideoFrame) -> VideoInfo:
    stream, container, fps = decoding.stream, decoding.container, decoding.rate
    rotation, mirrored = _orientation(frame, decoding.path)
    count = stream.frames or None
    if count and "mov" in decoding.formats:
        # Samples that an edit list hides are counted by the header and never presented.
        count = sum(not entry.is_discard for entry in stream.index_entries)
    duration = count / fps if count and "mov" in decoding.formats else decoding.stated_end
    if duration is None and (stream.duration or 0) > 0:  # a cut Ogg file says that it ends before the first second
        duration = stream.duration * stream.time_base
    elif duration is None and (container.duration or 0) > 0:
        duration = Fraction(container.duration, av.time_base)
    if frame.color_trc in HDR_TRANSFERS:
        logger.warning("%s: %s transfer is read without tone mapping", decoding.path, HDR_TRANSFERS[frame.color_trc])
    turned = rotation in (90, 270)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    matrix = "rgb" if frame.format.is_rgb or frame.format.has_palette else str(color_matrix(frame))
    return VideoInfo(
        path=os.fspath(decoding.path),
        kind="video",
        width=frame.height if turned else frame.width,
        height=frame.width if turned else frame.height,
        fps=fps,
        num_frames=count,
        duration=duration,
        rotation=rotation,
        mirrored=mirrored,
        has_audio=bool(container.streams.audio),
        has_alpha=has_alpha(frame),
        bit_depth=bit_depth(frame),
        codec=stream.codec.canonical_name,
        pixel_format=frame.format.name,
        color_matrix={"1": "bt709", "5": "bt601", "6": "bt601", "9": "bt2020"}.get(matrix, matrix),
        color_range="full" if matrix == "rgb" or full_range(frame) else "limited",
        sample_aspect_ratio=1 / aspect if turned else aspect,
    )


def _orientation(frame: av.VideoFrame, path: PathLike) -> tuple[int, bool]:
    """(degrees counter-clockwise, mirrored first) of the frame's display matrix.

    Raises:
        VideoReadError: for angles that are no multiple of 90 degrees.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV 18 cannot list side data that holds a kind it does not know, such as EXIF; the angle is still to be had.
        return frame.rotation // 90 * 90 % 360, False
    if data is None:
        return 0, False
    a, b, _, c, d = (int(value) / 65536 for value in np.frombuffer(bytes(data), np.int32)[:5])
    axes = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]  # 0, 90, 180, 270
    for quarter, (ea, eb, ec, ed) in enumerate(axes):
        for mirrored, sign in ((False, 1), (True, -1)):  # mirroring first negates what x contributes
            if max(abs(a - sign * ea), abs(b - sign * eb), abs(c - ec), abs(d - ed)) < 0.02:
                return 90 * quarter, mirrored
    raise VideoReadError(
        path,
        f"its display matrix ({a:.3f}, {b:.3f}; {c:.3f}, {d:.3f}) is no rotation by a multiple of 90 degrees",
        "Re-encode it with the rotation applied (ffmpeg does so by default)",
    )


def _image_info(
    paths: list[Path], name: str, kind: Literal["image", "sequence"], fps: Fraction, limits: ReadLimits
) -> VideoInfo:
    first = read_image(paths[0], limits)
    alpha, deep = first.shape[0] == 4, first.dtype != torch.uint8
    return VideoInfo(
        path=name,
        kind=kind,
        width=first.shape[2],
        height=first.shape[1],
        fps=fps,
        num_frames=len(paths),
        duration=len(paths) / fps,
        rotation=0,
        mirrored=False,
        has_audio=False,
        has_alpha=alpha,
        bit_depth=16 if deep else 8,
        codec=paths[0].suffix.lower().lstrip("."),
        pixel_format=("rgba" if alpha else "rgb") + ("16" if deep else "8"),
        color_matrix="rgb",
        color_range="full",
        sample_aspect_ratio=Fraction(1),
    )


def _is_iso_still(path: Path) -> bool:
    """FFmpeg decodes one tile of a picture that AVIF and HEIC hold in several."""
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _STILL_BRANDS


def _sequence_paths(path: Path) -> list[Path] | None:
    """The files of a folder, a printf pattern (`frame_%05d.png`) or a glob (`frames/*.png`) in order; None for one file."""
    text = os.fspath(path)
    if path.is_file():
        return None
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        if not found:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise VideoReadError(path, f"is a folder without images ({kinds})", "Pass a video or a folder of images.")
    elif re.search(r"%0?\d*d", path.name):
        return _numbered_paths(path)
    elif glob.has_magic(text):
        found = [Path(name) for name in glob.glob(text)]
        if not found:
            raise VideoReadError(path, "matches no file", "Check the pattern.")
    else:
        return None
    return sorted(found, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])


def _numbered_paths(path: Path) -> list[Path]:
    match = re.fullmatch(r"(.*)%(0?\d*)d(.*)", path.name)
    assert match is not None  # what `_sequence_paths` has asked
    before, width, after = match.groups()
    numbers = {}
    for candidate in path.parent.iterdir() if path.parent.is_dir() else []:
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), candidate.name)
        if match and candidate.name == f"{before}{int(match[1]):{width}d}{after}":
            numbers[int(match[1])] = candidate
    if not numbers:
        raise VideoReadError(path, "matches no file", "Check the pattern; numbers are taken from the lowest one found.")
    missing = set(range(min(numbers), max(numbers))) - set(numbers)
    if missing:
        problem = f"frame number {min(missing)} is missing between {min(numbers)} and {max(numbers)}"
        raise VideoReadError(path, problem, "Add it, or use a glob pattern, which ignores the numbers.")
    return [numbers[number] for number in sorted(numbers)]
