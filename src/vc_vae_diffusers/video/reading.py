"""Reading: videos and images as chunks of frames in [-1, 1], with their times.

Not in the paper, which says nothing about file handling; short side by antialiased bilinear resizing, centre crop and
rounding are this project's evaluation protocol. Chunks are RGB `(C, T, H, W)`, or `(1, C, T, H, W)` with `batch_dim=True`.
Nothing here holds more than one chunk and the frames that a codec needs, so memory is flat in T.

Choices worth knowing:

- **Frame numbers** count frames in presentation order. **Times** are exact fractions of a second from the first frame.
- **Colour** follows the stream's matrix and range tags. An untagged matrix is BT.709 for width >= 1280 or height > 576 and
  BT.601 below, as players assume; an untagged range is limited (full for `yuvj*` and grey). Written H.264 is tagged
  BT.709, limited. PQ and HLG transfer curves are read without tone mapping, with a warning.
- **Resizing** is `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` on float32 RGB: the kernel of the
  evaluation protocol. FFmpeg's scaler works on chroma-subsampled planes, and its result depends on flags and version.
- **10-bit and deeper** frames keep their precision in float32 chunks and are rounded in uint8 ones.
- **Damage is an error**, never a shorter or concealed clip: reading raises `VideoReadError` at the frame concerned, and at
  the end of a file that its container says is longer. What neither notices is not noticed: H.264 has no checksum, and an
  MPEG stream does not say where it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from .info import TIME_TOLERANCE, PathLike, ReadLimits, VideoInfo, VideoReadError, exact_fraction, system_errors
from .pixels import Size, check_size, cropped, resize_and_crop, resized
from .sources import Picture, open_source


def probe(path: PathLike, *, sequence_fps: Fraction | float = 24, limits: ReadLimits | None = None) -> VideoInfo:
    """What a video, image, folder of images or image pattern holds, from its header and first frame.

    Raises:
        VideoReadError: for anything that is missing, empty, damaged, too large or has no pictures.
    """
    return open_source(Path(path), (0, 0, 0), Fraction(sequence_fps), 1, limits or ReadLimits.default()).info


class VideoReader:
    """Iterates the frames of a video, an image, a folder of images or an image pattern lazily, in chunks.

    ```python
    with VideoReader("in.mp4", fps=24, resize=256, crop=256) as reader:
        for chunk in reader:  # (3, <=16, 256, 256) float32 in [-1, 1]
            ...
    ```

    Every iteration is a pass of its own from the beginning; passes are closed with the reader.

    Args:
        path: a file, a folder of images (natural order), a printf pattern (`f_%05d.png`) or a glob (`f/*.png`).
        start, stop: source frames [start, stop). A start beyond 0 scans the packets once to number the frames.
        start_time, stop_time: the same in seconds, from the frame on screen at `start_time`; needs no scan.
        fps: resample to this rate by timestamps: output k shows the frame on screen k / fps after the start. Frames up
            to 2/9 of a period late count as on time, for rounded timestamps. None keeps every frame as it comes.
        num_frames: stop after this many output frames.
        resize: short side in pixels, or exact (height, width). Applied after the rotation metadata.
        crop: centre crop, the side of a square or (height, width).
        chunk_frames: frames per chunk; the last one may be shorter.
        dtype: torch.float32 for [-1, 1], torch.uint8 for [0, 255].
        batch_dim: chunks are (1, C, T, H, W).
        background: RGB (0-255) that frames with alpha are composited on.
        sequence_fps: the rate of images, which have none.
        threads: decoding threads; 0 is one per core, right for one reader. Data loader workers want 1.
        limits: how large the file may be; None takes those of `ReadLimits.default`.

    Attributes:
        info: what the file holds.
        fps, height, width: of what is read.
        end_time: seconds from the file's first frame at which the last frame that was read leaves the screen, as
            `VideoWriter` takes it; None before a pass has come to its end.

    Raises:
        VideoReadError: for anything that is missing, empty, damaged, too large or has no pictures, at once or at the frame
            concerned.
        ValueError: for arguments that make no sense.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        start: int = 0,
        stop: int | None = None,
        start_time: Fraction | float | None = None,
        stop_time: Fraction | float | None = None,
        fps: Fraction | float | None = None,
        num_frames: int | None = None,
        resize: Size | None = None,
        crop: Size | None = None,
        chunk_frames: int = 16,
        dtype: torch.dtype = torch.float32,
        batch_dim: bool = False,
        background: Sequence[int] = (0, 0, 0),
        sequence_fps: Fraction | float = 24,
        threads: int = 0,
        limits: ReadLimits | None = None,
    ):
        if dtype not in (torch.float32, torch.uint8):
            raise ValueError(f"dtype: {dtype} is neither torch.float32 (in [-1, 1]) nor torch.uint8.")
        for name, value, least in (("start", start, 0), ("num_frames", num_frames, 1), ("chunk_frames", chunk_frames, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}: {value} must be at least {least}.")
        for name, rate in (("fps", fps), ("sequence_fps", sequence_fps)):
            if rate is not None and not 1e-5 <= rate < 2**31:
                raise ValueError(f"{name}: {rate} must lie between 0.00001 and 2^31 frames a second.")
        if start and start_time is not None:
            raise ValueError(f"start: {start} and start_time={start_time} exclude each other; pass one of them.")
        if (stop is not None and stop <= start) or (stop is not None and start_time is not None):
            raise ValueError(f"stop: {stop} must be a frame number above start={start}; with start_time pass stop_time.")
        for name, seconds in (("start_time", start_time), ("stop_time", stop_time)):
            if seconds is not None and not 0 <= seconds < 2**31:
                raise ValueError(f"{name}: {seconds} must be at least 0 and below 2^31 seconds.")
        if stop_time is not None and stop_time <= (start_time or 0):
            raise ValueError(f"stop_time: {stop_time} must be above start_time={start_time or 0} seconds.")
        check_size("resize", resize)
        check_size("crop", crop)
        self._range = (start, stop, exact_fraction(start_time), exact_fraction(stop_time))
        self._rate = exact_fraction(fps)
        self._num_frames, self._resize, self._crop = num_frames, resize, crop
        self._chunk_frames, self._dtype, self._batch_dim = chunk_frames, dtype, batch_dim
        limits = limits or ReadLimits.default()
        self._source = open_source(Path(path), background, exact_fraction(sequence_fps), threads, limits)
        self.info: VideoInfo = self._source.info
        self.fps: Fraction = self._rate or self.info.fps
        height, width = resized(self.info.height, self.info.width, resize)
        if resize is not None and height * width > limits.pixels:
            raise ValueError(
                f"resize: {resize} makes frames of {width}x{height}, above {limits.pixels} pixels; pass a smaller one."
            )
        self.height, self.width = cropped(height, width, crop)
        self.end_time: Fraction | None = None
        self._passes: list[Generator] = []

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every pass that has not come to its end."""
        for running in self._passes:
            running.close()
        self._passes.clear()

    @property
    def expected_frames(self) -> int | None:
        """How many frames a pass will probably yield (for progress bars); None where the file does not say."""
        start, stop, start_time, stop_time = self._range
        total = self.info.num_frames
        if total is None and self.info.duration is not None:
            total = round(self.info.duration * self.info.fps)
        first = start if start_time is None else int(start_time * self.info.fps)
        ends = [total, stop, None if stop_time is None else -int(-stop_time * self.info.fps // 1)]
        known = [end for end in ends if end is not None]
        count = max(0, min(known) - first) if known else None
        if count is not None and self._rate is not None:
            count = max(1, round(count / self.info.fps * self._rate))
        limits = [n for n in (count, self._num_frames) if n is not None]
        return min(limits) if limits else None

    def count_frames(self) -> int:
        """How many frames a pass yields, exactly, by decoding once without converting them."""
        return sum(1 for _ in self._pictures())

    def __iter__(self) -> Iterator[torch.Tensor]:
        for chunk, _ in self.timed_chunks():
            yield chunk

    def timed_chunks(self) -> Iterator[tuple[torch.Tensor, list[Fraction]]]:
        """Chunks with the time of every frame in seconds from the file's first frame, as `VideoWriter.write` takes them."""
        running = self._timed_chunks()
        self._passes.append(running)
        return running

    def _timed_chunks(self) -> Generator[tuple[torch.Tensor, list[Fraction]], None, None]:
        pictures = self._pictures()
        try:
            while batch := self._batch(pictures):
                chunk = torch.stack([frame for frame, _ in batch], dim=1)
                yield (chunk[None] if self._batch_dim else chunk), [time for _, time in batch]
        finally:
            pictures.close()

    def _batch(self, pictures: Iterator[tuple[Picture, Fraction]]) -> list[tuple[torch.Tensor, Fraction]]:
        with system_errors(self.info.path):
            return [(self._finish(picture), time) for picture, time in itertools.islice(pictures, self._chunk_frames)]

    def _pictures(self) -> Generator[tuple[Picture, Fraction], None, None]:
        """The pictures of the range, at the rate asked for, each with its output time."""
        start, stop, start_time, stop_time = self._range
        pictures: Iterator[Picture] = self._source.pictures(start, start_time)
        if stop is not None:
            pictures = itertools.islice(pictures, stop - start)
        timed: Iterator[tuple[Picture, Fraction]]
        if self._rate is None:
            # The frame on screen at the start appears there, however long it has been shown by then.
            timed = ((picture, max(picture.time, start_time or Fraction(0))) for picture in pictures)
        else:
            timed = _at_rate(pictures, self._rate, self.info.fps, start_time)
        if stop_time is not None:
            timed = itertools.takewhile(lambda pair: pair[1] < stop_time, timed)
        picture = None
        for picture, time in itertools.islice(timed, self._num_frames):
            yield picture, time
        if picture is not None:
            end = picture.time + picture.period if self._rate is None else time + 1 / self._rate
            self.end_time = end if stop_time is None else min(end, max(stop_time, time))

    def _finish(self, picture: Picture) -> torch.Tensor:
        """(3, H, W) of the output's size, type and range."""
        rgb = picture.load()
        if self._dtype == torch.float32 or self._resize is not None:
            rgb = rgb.to(torch.float32)
        rgb = resize_and_crop(rgb, self._resize, self._crop)
        if tuple(rgb.shape[1:]) != (self.height, self.width):
            problem = f"changes size at {float(picture.time):.3f} s to {rgb.shape[2]}x{rgb.shape[1]}"
            raise VideoReadError(self.info.path, problem, f"Pass resize=({self.height}, {self.width}) to scale all alike.")
        if self._dtype == torch.uint8:
            return rgb if rgb.dtype == torch.uint8 else rgb.round().clamp_(0, 255).to(torch.uint8)
        return rgb.div(127.5).sub_(1.0)


def _at_rate(
    pictures: Iterator[Picture], rate: Fraction, source_rate: Fraction, first: Fraction | None
) -> Iterator[tuple[Picture, Fraction]]:
    """Output k is the picture on screen k / rate after `first` (seconds; None: when the first picture appears): held where
    the source pauses, dropped where it rushes."""
    period = min(1 / rate, 1 / source_rate)
    current: Picture | None = None
    start = due = first or Fraction(0)
    number = 0
    for picture in pictures:
        if current is None:
            start = due = picture.time if first is None else first
        else:
            tolerance = TIME_TOLERANCE * min(period, picture.time - current.time)
            while due + tolerance < picture.time:
                yield current, due
                number += 1
                due = start + number / rate
        current = picture
    while current is not None and due + TIME_TOLERANCE * min(period, current.period) < current.time + current.period:
        yield current, due
        number += 1
        due = start + number / rate


def read_clip(
    path: PathLike,
    *,
    num_frames: int,
    start_frame: int | None = None,
    start_time: Fraction | float | None = None,
    fps: Fraction | float | None = None,
    resize: Size | None = None,
    crop: Size | None = None,
    dtype: torch.dtype = torch.float32,
    background: Sequence[int] = (0, 0, 0),
    threads: int = 1,
    limits: ReadLimits | None = None,
) -> torch.Tensor:
    """A clip of exactly `num_frames` frames, (C, T, H, W), decoded from the keyframe before its start.

    `start_frame` counts source frames (the packets are scanned once per file to number them); `start_time` in seconds
    needs no scan and suits long files. The other arguments are those of `VideoReader`.

    Raises:
        VideoReadError: if the file cannot be read, or ends before the clip does.
    """
    reader = VideoReader(
        path,
        start=start_frame or 0,
        start_time=start_time,
        fps=fps,
        num_frames=num_frames,
        resize=resize,
        crop=crop,
        chunk_frames=num_frames,
        dtype=dtype,
        background=background,
        threads=threads,
        limits=limits,
    )
    with reader:
        clip = next(iter(reader))
    if clip.shape[1] < num_frames:
        where = f"frame {start_frame or 0}" if start_time is None else f"{float(start_time):.3f} s"
        problem = f"has only {clip.shape[1]} of {num_frames} frames from {where} on" + (f" at {fps} fps" if fps else "")
        raise VideoReadError(path, problem, "Start earlier or ask for fewer frames.")
    return clip
