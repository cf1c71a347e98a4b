"""Decoding: what a path means, what a file holds, and its frames as RGB, lazily and frame-accurately (used by `video.py`).

Frames come as `(3, H, W)`, uint8, or float32 in [0, 255] where 8 bits do not hold them (deep colour, alpha, resizing comes
later). The choices that users should know are listed in `video.py`. Not in the paper.
"""

from __future__ import annotations

import functools
import glob
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
from av.stream import Disposition
from av.video.frame import supported_np_pix_fmts
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
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
# Pillow decodes these with libjpeg and libwebp, whose chroma upsampling is what image datasets are read with everywhere.
_PIL_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp"})

# Accurate rounding and full chroma interpolation: off, swscale is 1.2/255 away from the exact conversion on average.
SCALER_FLAGS = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_UNSPECIFIED_MATRIX = (2, 3)  # AVCOL_SPC_UNSPECIFIED, AVCOL_SPC_RESERVED
_BT709, _BT601 = 1, 6  # AVCOL_SPC_BT709, AVCOL_SPC_SMPTE170M
# (Kr, Kb) by AVColorSpace, ITU-T H.273 table 4.
_LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}

# Containers and codecs in which one packet is one presented frame, so that a scan of packet times numbers the frames.
_INDEXABLE_FORMATS = frozenset({"mov", "mp4", "matroska", "webm"})
_INDEXABLE_CODECS = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "prores", "ffv1", "png", "dnxhd"})


# A frame whose timestamp is late by this part of a period is on time: containers round times, Matroska to milliseconds. The
# part is an odd one, so that no common pair of frame rates puts frames exactly on the border.
TIME_TOLERANCE = Fraction(2, 9)


class VideoReadError(ValueError):
    """A file that cannot be read as asked. The message names the file, what is wrong and what to do about it."""

    def __init__(self, path: PathLike, problem: str, remedy: str):
        super().__init__(f"{os.fspath(path)}: {problem}. {remedy}")


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


def exact_fraction(value: Fraction | float | None) -> Fraction | None:
    """A float as the fraction meant: 29.97 as 2997/100, not as its binary expansion."""
    return Fraction(value).limit_denominator(100_000) if value is not None else None


# ---------------------------------------------------------------------------------------------------- one frame


def _color_matrix(frame: av.VideoFrame) -> int:
    """The frame's AVColorSpace; untagged frames by size, as players do."""
    if frame.colorspace not in _UNSPECIFIED_MATRIX:
        return frame.colorspace
    return _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601


def _full_range(frame: av.VideoFrame) -> bool:
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _bit_depth(frame: av.VideoFrame) -> int:
    return max(component.bits for component in frame.format.components)


def _planes(frame: av.VideoFrame) -> torch.Tensor:
    """The planes of a 4:4:4 frame of 9 to 16 bits as float32 (planes, H, W)."""
    rows = [np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _deep_rgb(frame: av.VideoFrame, scaler: VideoReformatter, threads: int) -> torch.Tensor | None:
    """A frame of 9 to 16 bits as float32 (3 or 4, H, W) in [0, 1]; None for layouts that only swscale knows.

    swscale's way to 16-bit RGB is off by up to 1/255 (it scales by 256 where 257 is due), so it only brings the chroma
    to full size here, at unchanged depth, and the matrix is applied below (ITU-T H.273 section 8.3).
    """
    name, bits = frame.format.name, _bit_depth(frame)
    if frame.format.is_rgb:
        known = name.startswith(("gbrp", "gbrap", "rgb48", "rgba64")) and name in supported_np_pix_fmts
        if not known:
            return None
        return torch.from_numpy(frame.to_ndarray().astype(np.float32)).movedim(-1, 0) / (2**bits - 1)
    unit = 2.0 ** (bits - 8)
    full = _full_range(frame)
    black, luma_span, chroma_span = (0.0, 2.0**bits - 1, 2.0**bits - 1) if full else (16 * unit, 219 * unit, 224 * unit)
    if len(frame.format.components) == 1 and name in supported_np_pix_fmts:
        luma = torch.from_numpy(frame.to_ndarray().astype(np.float32))
        return ((luma - black) / luma_span).clamp_(0, 1).expand(3, -1, -1)
    if len(frame.format.components) < 3 or bits not in (9, 10, 12, 16) or _color_matrix(frame) not in _LUMA_WEIGHTS:
        return None
    alpha = _has_alpha(frame)
    frame.color_range = ColorRange.MPEG  # both sides alike, or swscale stretches full range between equal depths
    planes = _planes(
        scaler.reformat(
            frame,
            format=f"yuv{'a' if alpha else ''}444p{bits}le",
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER_FLAGS,
            threads=threads,
        )
    )
    kr, kb = _LUMA_WEIGHTS[_color_matrix(frame)]
    y = (planes[0] - black) / luma_span
    cb, cr = ((planes[1:3] - 128 * unit) / chroma_span).unbind()
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    channels = [red, green, blue] + ([planes[3] / (2**bits - 1)] if alpha else [])
    return torch.stack(channels).clamp_(0, 1)


def frame_to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, threads: int = 1) -> torch.Tensor:
    """One decoded frame as (3, H, W), or (4, H, W) with straight alpha: uint8, or float32 in [0, 255] for deep colour."""
    deep = _deep_rgb(frame, scaler, threads) if 8 < _bit_depth(frame) <= 16 else None
    if deep is not None:
        return deep * 255
    if not frame.format.is_rgb and not frame.format.has_palette:
        full = _full_range(frame)
        frame.colorspace = _color_matrix(frame)
        frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    layout = "rgba" if _has_alpha(frame) else "rgb24"
    frame = scaler.reformat(frame, format=layout, interpolation=SCALER_FLAGS, threads=threads)
    return torch.from_numpy(frame.to_ndarray()).movedim(-1, 0)


def _composite(rgb: torch.Tensor, background: Sequence[int]) -> torch.Tensor:
    """Straight alpha (4, H, W) in [0, 255] over a background colour; (3, H, W) passes untouched."""
    if rgb.shape[0] == 3:
        return rgb
    rgb = rgb.to(torch.float32)
    alpha = rgb[3:] / 255
    return rgb[:3] * alpha + torch.tensor(background, dtype=torch.float32).view(3, 1, 1) * (1 - alpha)


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


def _orient(rgb: torch.Tensor, rotation: int, mirrored: bool) -> torch.Tensor:
    if mirrored:
        rgb = rgb.flip(-1)
    return torch.rot90(rgb, rotation // 90, dims=(-2, -1)) if rotation else rgb


def _read_image(path: Path) -> torch.Tensor:
    """One image file, upright, as (3 or 4, H, W), uint8 or float32 in [0, 255]."""
    _check_file(path)
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            orientation = _EXIF_ORIENTATIONS.get(image.getexif().get(_EXIF_ORIENTATION_TAG, 1), (0, False))
            if path.suffix.lower() in _PIL_SUFFIXES:
                array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
                rgb = torch.from_numpy(array).movedim(-1, 0)
    except OSError as error:
        raise VideoReadError(path, f"cannot be decoded ({error})", "Replace the file.") from error
    if frames > 1:
        raise VideoReadError(path, f"is an animation of {frames} frames", "Convert it to a video.")
    if path.suffix.lower() not in _PIL_SUFFIXES:
        with Decoding(path, threads=1) as decoding:
            rgb = frame_to_rgb(next(decoding.frames()), VideoReformatter())
    return _orient(rgb, *orientation)


# ---------------------------------------------------------------------------------------------------- one file


def _check_file(path: Path) -> None:
    if not path.exists():
        raise VideoReadError(path, "does not exist", "Check the path; only local files are read.")
    if not path.is_file():
        raise VideoReadError(path, "is not a regular file", "Pass a video, an image, a folder of images or a pattern.")
    if path.stat().st_size == 0:
        raise VideoReadError(path, "is empty (0 bytes)", "Download or record it again.")


def open_container(path: Path) -> av.container.InputContainer:
    """Raises VideoReadError for anything that FFmpeg does not know as a media file."""
    _check_file(path)
    try:
        return av.open(os.fspath(path), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        problem = f"cannot be opened as a video ({error.strerror or error})"
        remedy = "The file is damaged, incomplete or of another kind; re-encode or download it again."
        raise VideoReadError(path, problem, remedy) from error


def _tagged_duration(stream: av.VideoStream) -> Fraction | None:
    """Seconds of a Matroska stream's DURATION tag, which counts this stream alone."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)\s*", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)


class Decoding:
    """One pass over the video stream of one file: opens it, seeks when asked, yields frames, notices damage."""

    def __init__(self, path: Path, threads: int):
        self.path = path
        self.container = open_container(path)
        streams = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = sorted({stream.type for stream in self.container.streams}) or ["no"]
            self.container.close()
            raise VideoReadError(path, f"has no video stream ({', '.join(kinds)} only)", "Pass a file with pictures.")
        best = self.container.streams.best("video")
        self.stream = best if best in streams else streams[0]
        self.decoder = self.stream.codec_context
        if self.decoder is None:
            self.container.close()
            raise VideoReadError(path, "uses a codec that this FFmpeg cannot decode", "Re-encode it, e.g. to H.264.")
        if self.stream.metadata.get("alpha_mode") == "1" and self.decoder.name in ("vp8", "vp9"):
            # FFmpeg's own decoders drop the alpha plane, libvpx's keep it.
            self.decoder = av.CodecContext.create(f"libvpx{'-vp9' if self.decoder.name == 'vp9' else ''}", "r")
        self.decoder.thread_type = "AUTO"
        self.decoder.thread_count = threads

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.container.close()

    @property
    def indexable(self) -> bool:
        """Whether every packet of this container and codec is exactly one presented frame."""
        formats = set(self.container.format.name.split(","))
        return bool(formats & _INDEXABLE_FORMATS) and self.stream.codec.canonical_name in _INDEXABLE_CODECS

    def frames(self, seek: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames in presentation order, from the start or from a keyframe that the demuxer finds for the time `seek`
        (units of the stream's time base).

        Raises:
            VideoReadError: at the first damaged frame, and at the end of a truncated file.
        """
        count, packets, shown, last = 0, 0, 0, None
        try:
            if seek is not None:
                self.container.seek(seek, stream=self.stream)
                self.decoder.flush_buffers()
            for packet in self.container.demux(self.stream):
                packets += packet.size > 0
                shown += packet.size > 0 and not packet.is_discard
                # Before a packet that was cut off: what reordering and threads keep inside the decoder is still good.
                for frame in self.decoder.decode(None if packet.is_corrupt else packet):
                    if frame.is_corrupt:
                        raise self._damaged(count, "the decoder had to conceal errors")
                    count, last = count + 1, frame
                    yield frame
                if packet.is_corrupt:
                    raise self._damaged(count, "a packet is incomplete")
        except av.FFmpegError as error:
            raise self._damaged(count, error.strerror or str(error)) from error
        if seek is None:
            self._check_complete(packets, shown, count, last)

    def _damaged(self, count: int, reason: str) -> VideoReadError:
        return VideoReadError(
            self.path,
            f"is truncated or damaged after {count} readable frames of this pass ({reason})",
            "Download or re-encode it, or read only the good part with a frame range.",
        )

    def _check_complete(self, packets: int, shown: int, count: int, last: av.VideoFrame | None) -> None:
        if last is None:
            raise VideoReadError(self.path, "holds no decodable frame", "Re-encode or replace the file.")
        if self.indexable and count < shown:
            # PyAV drops an error that comes behind a good frame of the same packet.
            raise self._damaged(count, f"{shown - count} frames of {shown} could not be decoded")
        formats = set(self.container.format.name.split(","))
        if formats & {"mov", "mp4"} and packets < len(self.stream.index_entries):
            raise self._damaged(count, f"{packets} of {len(self.stream.index_entries)} packets are there")
        if "avi" in formats and packets + max(2, self.stream.frames // 50) < self.stream.frames:
            # Some writers of AVI count a frame or two that they dropped.
            raise self._damaged(count, f"{packets} of {self.stream.frames} packets are there")
        promised = _tagged_duration(self.stream) if formats & {"matroska", "webm"} else None
        if promised is not None and last.pts is not None:
            end = (last.pts + (last.duration or 0)) * self.stream.time_base
            if promised - end > max(Fraction(1, 4), 3 / (self.stream.average_rate or Fraction(24))):
                raise self._damaged(count, f"it ends at {float(end):.2f} s of {float(promised):.2f} s")


@functools.lru_cache(maxsize=256)
def _frame_index(path: str, size: int, modified: int) -> list[int] | None:
    """Presentation times of all frames, sorted, from a scan of the packets without decoding; None where that says nothing.

    `size` and `modified` (ns) are there to key the cache: a file that changes is scanned again.
    """
    with Decoding(Path(path), threads=1) as decoding:
        if not decoding.indexable:
            return None
        try:
            packets = decoding.container.demux(decoding.stream)
            times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        except av.FFmpegError:
            return None  # decoding from the start finds the damage and says where it is
    if any(time is None for time in times) or len(set(times)) < len(times):
        return None
    return sorted(times)


@dataclass
class Picture:
    """One source frame: when it appears, for how long (seconds), and how to get it as (3, H, W) in [0, 255]."""

    time: Fraction
    period: Fraction
    load: Callable[[], torch.Tensor]


class FileSource:
    """Frames of a video file from a frame number or a time on. `origin` is the timestamp of its first frame."""

    def __init__(self, info: VideoInfo, origin: int, time_base: Fraction, background: Sequence[int], threads: int):
        self.path, self.info, self.origin, self.time_base = Path(info.path), info, origin, time_base
        self.background, self.threads = background, threads

    def pictures(self, start: int, start_time: Fraction | None) -> Iterator[Picture]:
        """Pictures from frame `start`, or from the one on screen at `start_time` seconds, in order."""
        scaler = VideoReformatter()
        nominal, previous = 1 / self.info.fps, None
        for frame in self._from_number(start) if start_time is None else self._from_time(start_time):
            time = None if frame.pts is None else (frame.pts - self.origin) * self.time_base
            if previous is not None and (time is None or time <= previous):
                # Raw streams have no timestamps, broken ones repeat them: go on at the nominal rate from the last good one.
                time = previous + nominal
            previous = start * nominal if time is None else time
            period = frame.duration * self.time_base if frame.duration else nominal
            yield Picture(previous, period, functools.partial(self._load, frame, scaler))

    def _load(self, frame: av.VideoFrame, scaler: VideoReformatter) -> torch.Tensor:
        try:
            rgb = frame_to_rgb(frame, scaler, self.threads)
        except (av.FFmpegError, ValueError) as error:
            problem = f"its pixel format {frame.format.name} cannot be converted to RGB ({error})"
            raise VideoReadError(self.path, problem, "Re-encode it, e.g. to H.264 yuv420p.") from error
        return _orient(_composite(rgb, self.background), self.info.rotation, self.info.mirrored)

    def _from_number(self, start: int) -> Iterator[av.VideoFrame]:
        stat = self.path.stat()
        index = _frame_index(os.fspath(self.path), stat.st_size, stat.st_mtime_ns) if start else None
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
        with Decoding(self.path, self.threads) as decoding:
            for number, frame in enumerate(decoding.frames()):
                if number >= start:
                    yield frame
        if number < start:
            raise VideoReadError(self.path, f"has {number + 1} frames, none at {start}", "Ask for an earlier start.")

    def _from_time(self, start_time: Fraction) -> Iterator[av.VideoFrame]:
        target = self.origin + int(start_time / self.time_base)
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
        end = (shown.pts - self.origin) * self.time_base + max(shown.duration * self.time_base, 1 / self.info.fps)
        if start_time >= end:
            problem = f"ends at {float(end):.3f} s, before the start {float(start_time):.3f} s"
            raise VideoReadError(self.path, problem, "Ask for an earlier start.")
        yield shown

    def _seek(self, target: int) -> Iterator[av.VideoFrame]:
        """Frames from some keyframe at or before `target`. Keyframes that turn out to lie later (reordering, open groups,
        gradual refresh) are answered by seeking further back, at last by decoding from the start."""
        for seconds_back in (0, 1, 4, 16, None):
            goal = None if seconds_back is None else target - int(seconds_back / self.time_base)
            if goal is not None and goal <= self.origin:
                goal = None
            with Decoding(self.path, self.threads) as decoding:
                frames = decoding.frames(goal)
                try:
                    first = next(frames, None)
                except VideoReadError:
                    if goal is None:
                        raise
                    continue
                if goal is not None and (first is None or first.pts is None or first.pts > target):
                    continue
                if first.pts is None:
                    raise VideoReadError(self.path, "has no timestamps to seek by", "Remux it to mp4 or mkv.")
                yield first
                yield from frames
                return


class ImageSource:
    """The images of a folder or pattern at a constant rate; a single image is a sequence of one."""

    def __init__(self, paths: list[Path], info: VideoInfo, background: Sequence[int]):
        self.paths, self.info, self.background = paths, info, background

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
        return _composite(_read_image(path), self.background)


# ---------------------------------------------------------------------------------------------------- what a path means


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
    before, width, after = re.fullmatch(r"(.*)%(0?\d*)d(.*)", path.name).groups()
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


def _probe_images(paths: list[Path], name: str, kind: Literal["image", "sequence"], fps: Fraction) -> VideoInfo:
    first = _read_image(paths[0])
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


def _probe_file(path: Path) -> tuple[VideoInfo, int, Fraction]:
    """The file's info, the timestamp of its first frame and the time base of its timestamps."""
    with Decoding(path, threads=1) as decoding:
        frame = next(decoding.frames())
        stream, container = decoding.stream, decoding.container
        rotation, mirrored = _orientation(frame, path)
        fps = stream.average_rate or stream.guessed_rate or stream.base_rate
        if not fps:
            raise VideoReadError(path, "states no frame rate", "Re-encode it, e.g. to H.264 in mp4.")
        count = stream.frames or None
        if count and set(container.format.name.split(",")) & {"mov", "mp4"}:
            # Samples that an edit list hides are counted by the header and never presented.
            count = sum(not entry.is_discard for entry in stream.index_entries)
        duration = count / fps if count else _tagged_duration(stream)
        if duration is None and stream.duration:
            duration = stream.duration * stream.time_base
        elif duration is None and container.duration:
            duration = Fraction(container.duration, av.time_base)
        if frame.color_trc in _HDR_TRANSFERS:
            logger.warning("%s: %s transfer is read without tone mapping", path, _HDR_TRANSFERS[frame.color_trc])
        turned = rotation in (90, 270)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        matrix = "rgb" if frame.format.is_rgb or frame.format.has_palette else str(_color_matrix(frame))
        info = VideoInfo(
            path=os.fspath(path),
            kind="video",
            width=frame.height if turned else frame.width,
            height=frame.width if turned else frame.height,
            fps=Fraction(fps),
            num_frames=count,
            duration=duration,
            rotation=rotation,
            mirrored=mirrored,
            has_audio=bool(container.streams.audio),
            has_alpha=_has_alpha(frame),
            bit_depth=_bit_depth(frame),
            codec=stream.codec.canonical_name,
            pixel_format=frame.format.name,
            color_matrix={"1": "bt709", "5": "bt601", "6": "bt601", "9": "bt2020"}.get(matrix, matrix),
            color_range="full" if matrix == "rgb" or _full_range(frame) else "limited",
            sample_aspect_ratio=1 / aspect if turned else aspect,
        )
        return info, frame.pts or 0, stream.time_base


def first_frame_time(path: Path) -> Fraction:
    """Seconds at which a file's video begins on the file's own clock, to which its audio refers; 0 without video."""
    with open_container(path) as container:
        if not [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]:
            return Fraction(0)
    _, origin, time_base = _probe_file(path)
    return origin * time_base


def open_source(
    path: Path, background: Sequence[int], sequence_fps: Fraction, threads: int
) -> tuple[VideoInfo, FileSource | ImageSource]:
    """What `path` holds and where its pictures come from: a video, an image, a folder of images or a pattern.

    Raises:
        VideoReadError: for anything that is missing, empty, damaged or has no pictures.
    """
    paths = _sequence_paths(path)
    if paths is None and path.suffix.lower() in IMAGE_SUFFIXES:
        info = _probe_images([path], os.fspath(path), "image", sequence_fps)
        return info, ImageSource([path], info, background)
    if paths is not None:
        info = _probe_images(paths, os.fspath(path), "sequence", sequence_fps)
        return info, ImageSource(paths, info, background)
    info, origin, time_base = _probe_file(path)
    return info, FileSource(info, origin, time_base, background, threads)
