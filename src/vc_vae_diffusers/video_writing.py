"""Writing video with PyAV, images with Pillow: a whole file or none (used by `video.py`, where the choices are listed).

Not in the paper.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image

from .video_decoding import (
    IMAGE_SUFFIXES,
    SCALER_FLAGS,
    PathLike,
    VideoReadError,
    exact_fraction,
    first_frame_time,
    open_container,
)

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv"})
# Times this close to the constant rate are taken for it: Matroska rounds to milliseconds.
_TIME_ROUNDING = Fraction(1, 1000)
_TICKS_PER_SECOND = 10_000
_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class VideoWriteError(RuntimeError):
    """Writing failed; the partial file has been removed and whatever was at the destination before is still there."""


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] to uint8, any shape: rounded to nearest, values outside the range clamped.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    frames = frames.detach().to(torch.float32)
    if not torch.isfinite(frames).all():
        raise ValueError(
            "frames: holds NaN or infinite values, which have no uint8 value; the model overflowed: run it in float32 "
            "or bfloat16."
        )
    return frames.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _partial_path(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder of {path} does not exist; create it first (mkdir -p {path.parent}).")
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")


def write_image(path: PathLike, image: torch.Tensor, *, quality: int = 95) -> None:
    """Write (C, H, W) or (C, 1, H, W), float in [-1, 1] or uint8, by the file's suffix; JPEG and WebP with `quality`.

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
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    partial = _partial_path(path)
    try:
        Image.fromarray(image.movedim(0, -1).contiguous().cpu().numpy()).save(partial, quality=quality)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class VideoWriter:
    """Writes frames to a video file as they come; a context manager that leaves a whole file or none.

    The file grows under a temporary name in the same folder and takes its name when the block ends without an exception;
    otherwise it is removed and a file that was there before stays. (Only a process killed outright leaves a hidden
    `.name.xxxxxxxx.part.mp4` behind.) Memory is flat: frames go to the encoder at once.

    Args:
        path: `.mp4`, `.m4v`, `.mov` or `.mkv`.
        fps: frames per second; exact as a Fraction.
        codec: "h264" (8-bit 4:2:0, tagged BT.709 limited) or "lossless", which keeps every RGB value: FFV1 in .mkv, H.264
            RGB (qp 0) in the others.
        crf, preset: x264's quality (0-51, lower is better) and effort. `crf` applies to "h264" only.
        odd_size: what to do when 4:2:0 cannot hold an odd width or height: "yuv444p" keeps the size by writing full
            chroma (most players and all of FFmpeg read it, some hardware decoders do not), "pad" repeats the last row or
            column. Even sizes are never affected, nor is "lossless".
        audio_from: copy the audio of this file without re-encoding, from `audio_start` to `audio_stop` seconds of its video.
        sample_aspect_ratio: width / height of a pixel.
        threads: encoding threads; 0 lets the encoder choose.

    Raises:
        ValueError: for arguments that make no sense, an unknown suffix, a missing folder.
        VideoReadError: if `audio_from` cannot be read or has no audio.
        VideoWriteError: if the encoder or the disk fails, or no frame was written.
    """

    def __init__(
        self,
        path: PathLike,
        fps: Fraction | float,
        *,
        codec: Literal["h264", "lossless"] = "h264",
        crf: float = 16,
        preset: str = "medium",
        odd_size: Literal["yuv444p", "pad"] = "yuv444p",
        audio_from: PathLike | None = None,
        audio_start: Fraction | float = 0,
        audio_stop: Fraction | float | None = None,
        sample_aspect_ratio: Fraction | int = 1,
        threads: int = 0,
    ):
        self.path = Path(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise ValueError(f"path: {path} has no video suffix; use one of {', '.join(sorted(VIDEO_SUFFIXES))}.")
        if codec not in ("h264", "lossless"):
            raise ValueError(f"codec: {codec!r} is neither 'h264' nor 'lossless'.")
        if odd_size not in ("yuv444p", "pad"):
            raise ValueError(f"odd_size: {odd_size!r} is neither 'yuv444p' nor 'pad'.")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf: {crf} must lie in [0, 51]; 16 is visually lossless, 23 is x264's own default.")
        if fps <= 0:
            raise ValueError(f"fps: {fps} must be positive.")
        if preset not in _PRESETS:
            raise ValueError(f"preset: {preset!r} is none of x264's: {', '.join(_PRESETS)}.")
        self.fps = exact_fraction(fps)
        self.num_frames = 0
        self._codec, self._crf, self._preset, self._odd_size = codec, crf, preset, odd_size
        self._aspect, self._threads = Fraction(sample_aspect_ratio), threads
        self._partial = _partial_path(self.path)
        self._audio = None
        if audio_from is not None:
            self._audio = _AudioCopy(Path(audio_from), exact_fraction(audio_start), exact_fraction(audio_stop))
        self._scaler = VideoReformatter()
        self._container = None
        self._stream = None
        self._first_time: Fraction | None = None
        self._last_pts = -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: torch.Tensor, times: Sequence[Fraction] | None = None) -> None:
        """Append (C, T, H, W) or (1, C, T, H, W), float in [-1, 1] or uint8 in [0, 255].

        Args:
            frames: RGB; the first call fixes the size.
            times: seconds of every frame, increasing, relative to any origin: keeps a variable frame rate, and a constant
                one exactly. Given with the first call or never; without it frames are 1 / fps apart.
        """
        if frames.ndim == 5 and frames.shape[0] == 1:
            frames = frames[0]
        if frames.ndim != 4 or frames.shape[0] != 3:
            raise ValueError(f"frames: shape {tuple(frames.shape)} is neither (3, T, H, W) nor (1, 3, T, H, W).")
        if times is not None and len(times) != frames.shape[1]:
            raise ValueError(f"times: {len(times)} of them for {frames.shape[1]} frames.")
        try:
            for index, frame in enumerate(frames.unbind(1)):
                self._write_frame(frame if frame.dtype == torch.uint8 else to_uint8(frame), times and times[index])
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise VideoWriteError(f"{self.path}: writing failed at frame {self.num_frames} ({error}).") from error

    def _write_frame(self, rgb: torch.Tensor, time: Fraction | None) -> None:
        height, width = rgb.shape[1:]
        if self._container is None:
            self._open(height, width, variable=time is not None)
            self._first_time = time
        if (height, width) != self._size:
            raise ValueError(f"frames: {width}x{height} after frames of {self._size[1]}x{self._size[0]}; keep one size.")
        if (time is None) != (self._first_time is None):
            raise ValueError("times: must be given with every call or with none.")
        pts = self.num_frames if time is None else self._ticks(time - self._first_time)
        if pts <= self._last_pts:
            raise ValueError(f"times: {float(time):.6f} s of frame {self.num_frames} does not come after the one before.")
        if self._stream.height != height or self._stream.width != width:
            rgb = F.pad(rgb[None].float(), (0, width % 2, 0, height % 2), mode="replicate")[0].to(torch.uint8)
        frame = av.VideoFrame.from_ndarray(rgb.movedim(0, -1).contiguous().cpu().numpy(), format="rgb24")
        frame = self._converted(frame)
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        self._last_pts, self.num_frames = pts, self.num_frames + 1
        if self._audio is not None:
            self._audio.copy_until(pts * frame.time_base)
        self._container.mux(self._stream.encode(frame))

    def _ticks(self, time: Fraction) -> int:
        """A time in units of the variable-rate time base, of which 1 / fps is a whole number."""
        steps = round(time * self.fps)
        if abs(time - steps / self.fps) <= min(_TIME_ROUNDING, 1 / (4 * self.fps)):
            time = steps / self.fps
        return round(time / self._stream.codec_context.time_base)

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._codec == "lossless":
            return self._scaler.reformat(frame, format=self._stream.pix_fmt, threads=1)
        frame = self._scaler.reformat(
            frame,
            format=self._stream.pix_fmt,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER_FLAGS,
            threads=self._threads,
        )
        frame.color_primaries, frame.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        return frame

    def _open(self, height: int, width: int, variable: bool) -> None:
        self._size = (height, width)
        mp4 = self.path.suffix.lower() != ".mkv"
        self._container = av.open(os.fspath(self._partial), "w", options={"movflags": "+faststart"} if mp4 else {})
        if self._codec == "h264":
            name, options = "libx264", {"crf": f"{self._crf:g}", "preset": self._preset}
        elif mp4:
            name, options = "libx264rgb", {"qp": "0", "preset": self._preset}
        else:
            name, options = "ffv1", {"level": "3", "slicecrc": "1", "slices": "4"}
        stream = self._container.add_stream(name, rate=self.fps, options=options)
        odd = height % 2 or width % 2
        if self._codec == "lossless":
            stream.pix_fmt = "rgb24" if mp4 else "bgr0"
        else:
            stream.pix_fmt = "yuv444p" if odd and self._odd_size == "yuv444p" else "yuv420p"
            stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
            stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        padded = odd and stream.pix_fmt == "yuv420p"
        stream.height, stream.width = (height + height % 2, width + width % 2) if padded else (height, width)
        divisor = math.ceil(_TICKS_PER_SECOND / self.fps) if variable else 1
        stream.codec_context.time_base = 1 / (self.fps * divisor)
        stream.time_base = stream.codec_context.time_base
        stream.codec_context.sample_aspect_ratio = self._aspect
        stream.thread_count = self._threads
        self._stream = stream
        if self._audio is not None:
            self._audio.attach(self._container)

    def close(self) -> None:
        """Flush the encoder, finish the file and put it in place.

        Raises:
            VideoWriteError: if no frame was written, or the encoder or the disk fails.
        """
        if self._container is None:
            self.abort()
            raise VideoWriteError(f"{self.path}: no frame was written, so no file was made.")
        try:
            self._container.mux(self._stream.encode())
            if self._audio is not None:
                self._audio.copy_until(None)
            self._container.close()
            os.replace(self._partial, self.path)
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise VideoWriteError(f"{self.path}: the file could not be finished ({error}).") from error
        finally:
            self._release()

    def abort(self) -> None:
        """Give up: remove the partial file and leave the destination as it was."""
        try:
            if self._container is not None:
                self._container.close()
        except (av.FFmpegError, OSError):
            pass  # the trailer of a file that is thrown away
        finally:
            self._release()
            self._partial.unlink(missing_ok=True)

    def _release(self) -> None:
        self._container = self._stream = None
        if self._audio is not None:
            self._audio.close()


class _AudioCopy:
    """The audio packets of a source, re-timed to the written video and handed over in step with it.

    Packets are kept or dropped whole, so a cut is accurate to one of them (about 20 ms).
    """

    def __init__(self, path: Path, start: Fraction, stop: Fraction | None):
        self.path, self._start, self._stop = path, start, stop
        origin = first_frame_time(path)
        self._source = open_container(path)
        if not self._source.streams.audio:
            self._source.close()
            raise VideoReadError(path, "has no audio to copy", "Pass another audio_from or none.")
        self._shift = origin + start
        if start > 0:
            self._source.seek(int(self._shift * av.time_base))
        self._streams: dict[int, av.AudioStream] = {}
        self._packets = self._kept()
        self._pending = next(self._packets, None)

    def _kept(self) -> Iterator[av.Packet]:
        for packet in self._source.demux(self._source.streams.audio):
            if packet.pts is None or packet.dts is None:
                continue  # the demuxer's end marker
            begin = packet.pts * packet.time_base - self._shift
            if self._start > 0 and begin + (packet.duration or 0) * packet.time_base <= 0:
                continue
            if self._stop is not None and begin >= self._stop - self._start:
                continue
            offset = round(self._shift / packet.time_base)
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            yield packet

    def attach(self, container: av.container.OutputContainer) -> None:
        """Add the source's audio streams to the output."""
        self._container = container
        for stream in self._source.streams.audio:
            codec = stream.codec.canonical_name
            if codec not in container.supported_codecs:
                raise ValueError(
                    f"audio_from: {container.format.name} cannot hold the {codec} audio of {self.path} without re-encoding "
                    "it; write .mkv, or no audio."
                )
            self._streams[stream.index] = container.add_stream_from_template(stream)

    def copy_until(self, time: Fraction | None) -> None:
        """Hand over packets that begin up to `time` seconds of the written video; all with None."""
        while self._pending is not None:
            packet = self._pending
            if time is not None and packet.pts * packet.time_base > time:
                return
            packet.stream = self._streams[packet.stream_index]
            self._container.mux(packet)
            self._pending = next(self._packets, None)

    def close(self) -> None:
        self._source.close()
