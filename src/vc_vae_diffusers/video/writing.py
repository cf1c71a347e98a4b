"""Writing video with PyAV: a whole file or none. Not in the paper."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from ..files import whole_file
from .audio import AudioCopy
from .colour import EncoderColours
from .decoding import file_url
from .gif import GifPalette, set_last_delay
from .info import PathLike, check_machine, exact_fraction
from .pixels import to_uint8
from .stills import check_folder
from .suffixes import WRITABLE_VIDEO_SUFFIXES

# Times this close to the constant rate are taken for it: Matroska rounds to milliseconds.
_TIME_ROUNDING = Fraction(1, 1000)
# What a variable rate is written in. A pause must fit into 31 bits of ticks in mp4: it may last for hours.
_LARGEST = 2**31 - 1  # FFmpeg's fractions are of 32-bit integers
_LEAST_TICKS, _MOST_TICKS, _COMMON_TICKS = 10_000, 240_000, 90_000
_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
_GIF_RATE = 50
# With AVX-512, x264 writes other bytes at every run on some processors (its macroblock tree, a Xeon of 2023); not with AVX2.
_X264 = {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else {}
_MOV = (".mp4", ".m4v", ".mov")


class VideoWriteError(RuntimeError):
    """Writing failed; the partial file has been removed and whatever was at the destination before is still there."""


class VideoWriter:
    """Writes frames to a video file as they come; a context manager that leaves a whole file or none.

    The file grows under a temporary name in the same folder and takes its name when the block ends without an exception;
    otherwise it is removed and a file that was there before stays. (Only a process killed outright leaves a hidden
    `.name.xxxxxxxx.part.mp4` behind.) Memory is flat: frames go to the encoder at once.

    Args:
        path: `.mp4`, `.m4v`, `.mov`, `.mkv`, `.webm` (VP9 in place of H.264) or `.gif` (256 colours a frame, dithered; at
            most 50 frames/s).
        fps: frames per second; exact as a Fraction.
        codec: "h264" (8-bit 4:2:0, tagged BT.709 limited) or "lossless", which keeps every RGB value: FFV1 in .mkv, VP9 in
            .webm, H.264 RGB (qp 0) in the others.
        crf, preset: quality (0-51, lower is better) and x264's effort. `crf` does not apply to "lossless" and .gif.
        odd_size: what to do when 4:2:0 cannot hold an odd width or height: "yuv444p" keeps the size by writing full
            chroma (most players and all of FFmpeg read it, some hardware decoders do not), "pad" repeats the last row or
            column. Even sizes are never affected, nor are "lossless" and .gif.
        end_time: when the last frame leaves the screen, on the clock of `times`, or what is asked for it when the file is
            finished, such as `lambda: reader.end_time`. None: after 1 / fps.
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
        end_time: Fraction | Callable[[], Fraction | None] | None = None,
        audio_from: PathLike | None = None,
        audio_start: Fraction | float = 0,
        audio_stop: Fraction | float | None = None,
        sample_aspect_ratio: Fraction | int = 1,
        threads: int = 0,
    ):
        self.path = Path(path)
        self._kind = self.path.suffix.lower()
        if self._kind not in WRITABLE_VIDEO_SUFFIXES:
            kinds = ", ".join(sorted(WRITABLE_VIDEO_SUFFIXES))
            raise ValueError(f"path: {path} has no suffix that video is written to; use one of {kinds}.")
        if codec not in ("h264", "lossless"):
            raise ValueError(f"codec: {codec!r} is neither 'h264' nor 'lossless'.")
        if odd_size not in ("yuv444p", "pad"):
            raise ValueError(f"odd_size: {odd_size!r} is neither 'yuv444p' nor 'pad'.")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf: {crf} must lie in [0, 51]; 16 is visually lossless, 23 is x264's own default.")
        if fps <= 0:
            raise ValueError(f"fps: {fps} must be positive.")
        for name, value in (("fps", exact_fraction(fps)), ("sample_aspect_ratio", Fraction(sample_aspect_ratio))):
            if value <= 0 or max(value.numerator, value.denominator) > _LARGEST:
                raise ValueError(f"{name}: {value} must be above 1/100000, and a fraction of integers below 2^31.")
        if preset not in _PRESETS:
            raise ValueError(f"preset: {preset!r} is none of x264's: {', '.join(_PRESETS)}.")
        if self._kind == ".gif" and (codec == "lossless" or fps > _GIF_RATE or audio_from is not None):
            raise ValueError(
                f"path: {path} is a GIF, which holds 256 colours, at most {_GIF_RATE} frames/s (not {float(fps):g}) and no "
                "audio; write another kind, or resample with fps=."
            )
        check_folder(self.path)
        self.fps = exact_fraction(fps)
        self.num_frames = 0
        self._codec, self._crf, self._preset, self._odd_size = codec, crf, preset, odd_size
        self._aspect, self._threads, self._end_time = Fraction(sample_aspect_ratio), threads, end_time
        self._audio = None
        if audio_from is not None:
            self._audio = AudioCopy(Path(audio_from), exact_fraction(audio_start), exact_fraction(audio_stop))
        self._container: Any = None
        self._stream: Any = None
        self._converted: Callable[[av.VideoFrame], av.VideoFrame]  # from RGB to what the encoder takes
        self._first_time: Fraction | None = None
        self._last_time: Fraction | None = None
        self._last_pts = -1
        self._durations: dict[int, int] = {}  # of frames whose packets are still to be written
        self._held: list[av.Packet] = []
        self._delay: int | None = None  # ticks from a packet's decoding to its showing
        self._file = ExitStack()
        self._partial = self._file.enter_context(whole_file(self.path))

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
                rgb = frame if frame.dtype == torch.uint8 else to_uint8(frame)
                self._write_frame(rgb, None if times is None else times[index])
        except (av.FFmpegError, OSError) as error:
            self.abort()
            check_machine(self.path, error, errno.ENOMEM)
            raise VideoWriteError(
                f"{self.path}: writing failed at frame {self.num_frames} ({error.strerror or error})."
            ) from error

    def _write_frame(self, rgb: torch.Tensor, time: Fraction | None) -> None:
        height, width = rgb.shape[1:]
        if self._container is None:
            self._open(height, width, variable=time is not None)
            self._first_time = time
        if (height, width) != self._size:
            raise ValueError(f"frames: {width}x{height} after frames of {self._size[1]}x{self._size[0]}; keep one size.")
        if (time is None) != (self._first_time is None):
            raise ValueError("times: must be given with every call or with none.")
        if time is not None and self._last_time is not None and time <= self._last_time:
            raise ValueError(f"times: {float(time):.6f} s of frame {self.num_frames} does not come after the one before.")
        shown = self.num_frames / self.fps if time is None or self._first_time is None else time - self._first_time
        pts, self._last_time = max(self._ticks(shown), self._last_pts + 1), time
        self._durations[self._last_pts] = pts - self._last_pts
        if self._stream.height != height or self._stream.width != width:
            rgb = F.pad(rgb[None].float(), (0, width % 2, 0, height % 2), mode="replicate")[0].to(torch.uint8)
        frame = av.VideoFrame.from_ndarray(rgb.movedim(0, -1).contiguous().cpu().numpy(), format="rgb24")
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        frame = self._converted(frame)
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        self._last_pts, self.num_frames = pts, self.num_frames + 1
        if self._audio is not None:
            self._audio.copy_until(pts * frame.time_base)
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[av.Packet]) -> None:
        """Write packets, but keep the one of the latest time and what is decoded after it: the last ones know the end."""
        for packet in packets:
            if self._delay is None:
                self._delay = packet.pts - packet.dts
            if self._held and packet.pts > self._held[0].pts:
                self._mux_held()
            self._held.append(packet)

    def _mux_held(self) -> None:
        for packet in self._held:
            packet.duration = self._durations.pop(packet.pts, packet.duration)
        self._container.mux(self._held)
        self._held.clear()

    def _mux_last(self) -> int | None:
        """Write the last packets so that the file ends at `end_time`; the last frame's duration in ticks, if that is set."""
        end = self._end_time() if callable(self._end_time) else self._end_time
        if end is not None:
            ticks = max(self._ticks(end - (self._first_time or 0)), self._last_pts + 1)
            self._durations[self._last_pts] = ticks - self._last_pts
            if self._kind in _MOV:  # which adds up durations in the order of decoding
                last = self._held[-1]
                self._durations[last.pts] = max(1, ticks - (self._delay or 0) - last.dts)
        duration = self._durations.get(self._last_pts)
        self._mux_held()
        return duration

    def _ticks(self, time: Fraction) -> int:
        """A time in units of the time base, of which 1 / fps is a whole number."""
        steps = round(time * self.fps)
        if abs(time - steps / self.fps) <= min(_TIME_ROUNDING, 1 / (4 * self.fps)):
            time = steps / self.fps
        return round(time / self._stream.codec_context.time_base)

    def _conversion(self, encoder: str) -> Callable[[av.VideoFrame], av.VideoFrame]:
        height, width = self._stream.height, self._stream.width
        if encoder == "gif":
            return GifPalette(height, width)
        if self._codec == "lossless":
            return partial(VideoReformatter().reformat, format=self._stream.pix_fmt, threads=1)
        time_base = self._stream.codec_context.time_base
        return EncoderColours(
            height, width, self._stream.pix_fmt, time_base, left=encoder == "libx264", threads=self._threads
        )

    def _encoder(self, odd: bool) -> tuple[str, str, dict[str, str]]:
        """FFmpeg's name of the encoder, the pixel format, the options."""
        if self._kind == ".gif":
            return "gif", "pal8", {}
        full_chroma = "yuv444p" if odd and self._odd_size == "yuv444p" else "yuv420p"
        if self._kind == ".webm":
            effort = {"row-mt": "1", "cpu-used": str(max(0, 5 - _PRESETS.index(self._preset) // 2))}
            if self._codec == "lossless":
                return "libvpx-vp9", "gbrp", {"lossless": "1", **effort}
            return "libvpx-vp9", full_chroma, {"crf": f"{round(self._crf)}", "b": "0", **effort}
        if self._codec == "h264":
            return "libx264", full_chroma, _X264 | {"crf": f"{self._crf:g}", "preset": self._preset}
        if self._kind == ".mkv":
            return "ffv1", "bgr0", {"level": "3", "slicecrc": "1", "slices": "4"}
        return "libx264rgb", "rgb24", _X264 | {"qp": "0", "preset": self._preset}

    def _time_base(self, variable: bool) -> Fraction:
        if self._kind == ".gif":
            return Fraction(1, 100)
        if not variable:
            return 1 / self.fps
        ticks = self.fps.numerator * math.ceil(_LEAST_TICKS / self.fps.numerator)
        return Fraction(1, ticks if ticks <= _MOST_TICKS else _COMMON_TICKS)

    def _open(self, height: int, width: int, variable: bool) -> None:
        self._size = (height, width)
        options = {"movflags": "+faststart"} if self._kind in _MOV else {}
        self._container = av.open(file_url(self._partial), "w", options=options)
        name, pix_fmt, options = self._encoder(bool(height % 2 or width % 2))
        stream = self._container.add_stream(name, rate=self.fps, options=options)
        stream.pix_fmt = pix_fmt
        if pix_fmt.startswith("yuv"):
            stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
            stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        padded = pix_fmt == "yuv420p"
        stream.height, stream.width = (height + height % 2, width + width % 2) if padded else (height, width)
        stream.codec_context.time_base = stream.time_base = self._time_base(variable)
        stream.codec_context.sample_aspect_ratio = self._aspect
        stream.thread_count = self._threads
        self._stream = stream
        self._converted = self._conversion(name)
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
            self._mux(self._stream.encode())
            last_duration = self._mux_last()
            if self._audio is not None:
                self._audio.copy_until(None)
            self._container.close()
            if self._kind == ".gif" and last_duration is not None:
                set_last_delay(self._partial, last_duration)
            self._file.close()
        except (av.FFmpegError, OSError) as error:
            self.abort()
            check_machine(self.path, error, errno.ENOMEM)
            raise VideoWriteError(f"{self.path}: the file could not be finished ({error.strerror or error}).") from error
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
            self._file.__exit__(VideoWriteError, VideoWriteError("given up"), None)  # removes the partial file

    def _release(self) -> None:
        self._container = self._stream = None
        if self._audio is not None:
            self._audio.close()
