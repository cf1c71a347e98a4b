"""A video or image through the model and back, streamed from file to file, with its quality by frame range."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vc_vae_diffusers import AutoencoderKLVCVAE

from ..frame_size import FrameSize
from ..metrics.frame import SSIM_WINDOW, mean_over_frames, psnr, ssim
from ..video import VideoReader, VideoWriter, write_image
from .overlap import ahead
from .progress import Progress, silent

_MAX_RANGES = 8
_VALUES = (-1.0, 1.0)


def reconstruct_file(
    vae: AutoencoderKLVCVAE,
    reader: VideoReader,
    out: Path,
    compare: Path | None = None,
    *,
    audio_range: tuple[float, float | None] | None = None,
    crf: float = 16,
    lossless: bool = False,
    with_metrics: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stream a reader through the model into `out`, and side by side into `compare`.

    While one group is measured and written, the model has the next one.

    Args:
        audio_range: copy the reader's audio between these seconds.
        progress: told how many frames are done.

    Returns:
        What was done and how good it is, ready for JSON.

    Raises:
        VideoReadError, VideoWriteError, ValueError: nothing is left at `out` and `compare` then but what was there before.
    """
    scores = FrameScores()
    began, frames = time.perf_counter(), 0
    settings = {"crf": crf, "codec": "lossless" if lossless else "h264"}
    sound = {}
    if audio_range is not None:
        sound = {"audio_from": reader.info.path, "audio_start": audio_range[0], "audio_stop": audio_range[1]}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        write = _opened(stack, reader, out, settings | sound)
        write_pair = _opened(stack, reader, compare, settings) if compare else None
        progress(0, reader.expected_frames)
        for original, decoded, times in stack.enter_context(closing(ahead(reconstructed(vae, reader)))):
            if with_metrics:
                scores.add(decoded, original)
            write(decoded, times)
            if write_pair is not None:
                write_pair(torch.cat([original, decoded], dim=-1), times)
            frames += original.shape[2]
            progress(frames, reader.expected_frames)
    seconds = time.perf_counter() - began
    return {
        "input": reader.info.path,
        "output": str(out),
        "compare": str(compare) if compare else None,
        "frames": frames,
        "width": reader.width,
        "height": reader.height,
        "fps": str(reader.fps),
        "device": str(vae.device),
        "dtype": str(vae.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 3),
        **(scores.summary() if with_metrics else {}),
    }


def _opened(
    stack: ExitStack, reader: VideoReader, path: Path, settings: dict[str, Any]
) -> Callable[[torch.Tensor, list[Fraction]], None]:
    """What writes (1, 3, t, H, W) frames with their times to `path`, as the input's kind asks for."""
    if reader.info.kind == "image":
        return lambda frames, times: write_image(path, frames[0])
    settings = settings | {"sample_aspect_ratio": reader.info.sample_aspect_ratio, "end_time": lambda: reader.end_time}
    return stack.enter_context(VideoWriter(path, reader.fps, **settings)).write


def reconstructed(
    vae: AutoencoderKLVCVAE, reader: VideoReader
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[Fraction]]]:
    """Source and reconstruction, both (1, 3, t, H, W) float32 in [-1, 1] on the CPU, with the frames' times, in step.

    Lazy: the reader is asked for the frames of the next groups only when the ones before have been handed out. To be
    consumed under `torch.no_grad()`.
    """
    size = FrameSize.of(reader.height, reader.width, vae.spatial_compression_ratio)
    waiting = _Waiting()

    def padded() -> Iterator[torch.Tensor]:
        for chunk, times in reader.timed_chunks():
            step = vae.temporal_compression_ratio * vae.groups_per_chunk
            for i in range(0, len(times), step):
                frames = chunk[:, :, i : i + step]
                waiting.put(frames, times[i : i + step])
                yield size.pad(frames).to(vae.device, vae.dtype)

    # "4k+1" puts the frames it repeats at the start: it must know the length beforehand.
    count = reader.count_frames() if vae.groups.front_padded else None
    latents = (posterior.mode() for posterior in vae.encode_stream(padded(), num_frames=count))
    for decoded in vae.decode_stream(latents, num_frames=count):
        original, times = waiting.take(decoded.shape[2])
        # The last group may hold more frames than the source had.
        yield original, size.crop(decoded[:, :, : original.shape[2]]).float().clamp(-1, 1).cpu(), times


@dataclass
class _Waiting:
    """Source frames that wait for their reconstruction: a group or two, by construction of the streams."""

    frames: deque[torch.Tensor] = field(default_factory=deque)
    times: deque[Fraction] = field(default_factory=deque)

    def put(self, frames: torch.Tensor, times: list[Fraction]) -> None:
        self.frames.extend(frames.unbind(2))
        self.times.extend(times)

    def take(self, count: int) -> tuple[torch.Tensor, list[Fraction]]:
        """Up to `count` frames, fewer at the end, and their times."""
        count = min(count, len(self.frames))
        frames = torch.stack([self.frames.popleft() for _ in range(count)], dim=2)
        return frames, [self.times.popleft() for _ in range(count)]


@dataclass
class FrameScores:
    """PSNR and SSIM of every frame, eight bytes each, and their means over ranges of frames."""

    psnr: array = field(default_factory=lambda: array("f"))
    ssim: array = field(default_factory=lambda: array("f"))

    def add(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Measure frames, (1, 3, t, H, W) in [-1, 1]; SSIM only where its window fits."""
        self.psnr.extend(psnr(decoded, original, data_range=_VALUES)[0].tolist())
        if min(original.shape[-2:]) >= SSIM_WINDOW:
            self.ssim.extend(ssim(decoded, original, data_range=_VALUES)[0].tolist())

    def _mean(self, start: int, stop: int) -> dict[str, Any]:
        decibels = mean_over_frames(self.psnr[start:stop])
        similar = mean_over_frames(self.ssim[start:stop]).mean if self.ssim else None
        return {
            "psnr": json_number(decibels.mean),
            "ssim": json_number(similar),
            "identical_frames": decibels.num_infinite,  # their PSNR is infinite and not part of the mean
        }

    def summary(self) -> dict[str, Any]:
        """Means over all frames and over at most eight ranges, ready for JSON; infinite and missing values are null."""
        count = len(self.psnr)
        step = -(-count // _MAX_RANGES)
        ranges = [(begin, min(begin + step, count)) for begin in range(0, count, step)]
        return {
            **self._mean(0, count),
            "ranges": [{"start": begin, "stop": end, **self._mean(begin, end)} for begin, end in ranges],
        }


def json_number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: null."""
    return value if value is not None and math.isfinite(value) else None
