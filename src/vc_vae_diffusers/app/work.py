"""One request: a file in, latents, reconstruction, errors and pictures out, into a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from vc_vae_diffusers import AutoencoderKLVCVAE

from ..coding.latent_file import LatentFile
from ..coding.latents import check_fit, decode_file, decoded, encode_file
from ..coding.overlap import ahead
from ..coding.reconstruction import FrameScores
from ..report.visualize import draw_components, draw_latents, heat, tdc_components, tdc_layers
from ..video import VideoReader, VideoWriter, probe, write_image
from .limits import Limits
from .models import BUNDLED, Models

LATENTS = ".safetensors"
# An error of an eighth of the whole range is the brightest.
ERROR_GAIN = 8.0
_MOTION_FRAMES, _MOTION_SIDE = 16, 192


class Cancelled(Exception):
    """The visitor does not want it any more."""


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for.

    Args:
        source: video, image or file of latents.
        model: "bundled", a folder or a hub id.
        dtype: of the model.
        num_frames: at most so many.
        short_side: in pixels; None keeps the size.
        tile: side of tiles in pixels; None works on whole frames.
        start: second of the source to begin at.
    """

    source: Path
    model: str = BUNDLED
    dtype: torch.dtype = torch.float32
    num_frames: int = 64
    short_side: int | None = None
    tile: int | None = None
    start: float = 0.0


@dataclass
class Outcome:
    """What came out. Panels of `comparison` are source, reconstruction and error, beside or above each other."""

    reconstruction: Path
    latents: Path
    panels: list[str]
    comparison: Path
    width: int
    height: int
    fps: float
    times: list[float]  # seconds of every frame, from 0
    scores: FrameScores = field(default_factory=FrameScores)
    facts: dict[str, Any] = field(default_factory=dict)
    in_source: int | None = None  # frames of the whole source, where its container says
    latents_picture: Path | None = None
    motion_picture: Path | None = None

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)


@dataclass
class Clock:
    """Tells a visitor how far the work is, and ends it where it was cancelled or will take too long.

    Args:
        tell: called with a line for people.
        cancelled: asked at every step.
        limits: of time.
        stages: each of them goes over all frames once.
    """

    tell: Callable[[str], None]
    cancelled: Callable[[], bool]
    limits: Limits
    stages: int
    began: float = field(default_factory=lambda: time.monotonic())
    peak: int = 0
    device: torch.device | None = None

    def start(self, device: torch.device) -> None:
        """The model is there: time and memory are counted from here. Raises Cancelled if nobody waits for it any more."""
        self.began, self.device = time.monotonic(), device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.check()

    def memory(self) -> str:
        """The most that was taken, in words."""
        if self.device is not None and self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated(self.device) / 2**20:,.0f} MiB of the GPU at most"
        return f"{self.peak / 2**20:,.0f} MiB of this process at most"

    def check(self) -> None:
        """Raises Cancelled if the visitor does not want it any more, ValueError if it has taken too long."""
        if self.cancelled():
            raise Cancelled
        self.limits.check_time(time.monotonic() - self.began)

    def stage(self, what: str, number: int) -> Callable[[int, int | None], None]:
        """A `Progress` for one of the stages, counted from 0."""
        entered = time.monotonic()

        def progress(done: int, total: int | None) -> None:
            self.check()
            self.peak = max(self.peak, psutil.Process().memory_info().rss)
            if not total:
                self.tell(f"{what} …")
                return
            spent = time.monotonic() - entered
            left = spent / done * (total - done) + spent / done * total * (self.stages - 1 - number) if done else None
            if left is not None:
                self.limits.check_time(time.monotonic() - self.began + left)
            ends = "" if left is None else f", {done / max(spent, 1e-6):.1f} frames/s, about {left:.0f} s left"
            self.tell(f"{what}: {done} of {total} frames{ends}")

        return progress


def carry_out(
    wish: Wish, models: Models, limits: Limits, folder: Path, tell: Callable[[str], None], cancelled: Callable[[], bool]
) -> Outcome:
    """Do what is wished, into an empty folder.

    Raises:
        Cancelled: if `cancelled()` became true; the folder holds no whole result then.
        ValueError, OSError: for what the visitor can put right, in words.
    """
    clock = Clock(tell, cancelled, limits, stages=2)
    clock.check()  # it may have waited in line
    limits.check_upload(wish.source.stat().st_size)
    tell("waiting for the model …")
    if wish.source.suffix.lower() == LATENTS:
        return _decode_only(wish, models, folder, clock)
    with _reader(wish, limits) as reader:
        in_source = reader.info.num_frames
        frames = min(reader.expected_frames or wish.num_frames, wish.num_frames)
        limits.check_size(frames, reader.width, reader.height)
    with models.use(wish.model, wish.dtype, wish.tile) as vae:
        clock.start(vae.device)
        latents = folder / f"{wish.source.stem}{LATENTS}"
        with _reader(wish, limits) as reader:
            origin = {"model": wish.model, "subfolder": ""}
            encode_file(vae, reader, latents, origin, progress=clock.stage("encoding", 0))
        outcome = _compare(
            vae, wish, _reader(wish, limits), LatentFile(latents), folder, clock.stage("decoding and measuring", 1)
        )
        seconds = time.monotonic() - clock.began
        tell("drawing …")
        clock.check()
        outcome.latents_picture = _save(draw_latents(_first_latents(LatentFile(latents))), folder / "latents.png")
        clock.check()
        outcome.motion_picture = _draw_motion(vae, wish, folder / "motion.png")
    outcome.in_source = in_source
    outcome.facts = _facts(vae, outcome, seconds, clock)
    return outcome


def _reader(wish: Wish, limits: Limits) -> VideoReader:
    info = probe(wish.source, limits=limits.reading())
    shorter = min(info.width, info.height)
    smaller = wish.short_side if wish.short_side is not None and wish.short_side < shorter else None
    return VideoReader(
        wish.source,
        start_time=wish.start or None,
        num_frames=wish.num_frames,
        resize=smaller,
        batch_dim=True,
        limits=limits.reading(),
    )


def _decode_only(wish: Wish, models: Models, folder: Path, clock: Clock) -> Outcome:
    """Latents that were dropped in, as a video."""
    latents = LatentFile(wish.source)
    clock.limits.check_size(latents.num_frames, latents.width, latents.height)
    clock.stages = 1
    image = latents.num_frames == 1
    out = folder / f"{wish.source.stem}_reconstruction{'.png' if image else '.mp4'}"
    with models.use(wish.model, wish.dtype, wish.tile) as vae:
        clock.start(vae.device)
        check_fit(vae, latents)
        decode_file(vae, latents, out, image, progress=clock.stage("decoding", 0))
        seconds = time.monotonic() - clock.began
    outcome = Outcome(
        *(out, wish.source, ["reconstruction"], out, latents.width, latents.height),
        fps=float(latents.fps),
        times=_times(latents),
    )
    outcome.latents_picture = _save(draw_latents(_first_latents(latents)), folder / "latents.png")
    outcome.facts = _facts(vae, outcome, seconds, clock)
    return outcome


def _compare(
    vae: AutoencoderKLVCVAE,
    wish: Wish,
    reader: VideoReader,
    latents: LatentFile,
    folder: Path,
    progress: Callable[[int, int | None], None],
) -> Outcome:
    """Decode, measure every frame, and write the reconstruction and the picture of panels."""
    image = latents.num_frames == 1
    suffix = ".png" if image else ".mp4"
    outcome = Outcome(
        reconstruction=folder / f"{wish.source.stem}_reconstruction{suffix}",
        latents=latents.path,
        panels=["source", "reconstruction", "error"],
        comparison=folder / f"comparison{suffix}",
        width=latents.width,
        height=latents.height,
        fps=float(latents.fps),
        times=_times(latents),
    )
    across = stacked_across(latents.width, latents.height)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(reader)
        writers = [] if image else [VideoWriter(path, latents.fps) for path in (outcome.reconstruction, outcome.comparison)]
        for writer in writers:
            stack.enter_context(writer)
        take = in_step(reader)
        done = 0
        for frames in stack.enter_context(closing(ahead(decoded(vae, latents)))):
            frames = frames.clamp(-1, 1)
            source = take(frames.shape[2])
            outcome.scores.add(frames, source)
            error = heat(ERROR_GAIN * (frames - source).abs().mean(1) / 2).movedim(-1, 1) * 2 - 1
            pair = frames, torch.cat([source, frames, error], dim=-1 if across else -2)
            for number, pictures in enumerate(pair):
                if image:
                    write_image((outcome.reconstruction, outcome.comparison)[number], pictures[0])
                else:
                    writers[number].write(pictures, latents.frame_times(done, frames.shape[2]))
            done += frames.shape[2]
            progress(done, latents.num_frames)
    return outcome


def _times(latents: LatentFile) -> list[float]:
    """Of every frame, as a player counts: from 0. Frames need not be equally far apart."""
    times = latents.frame_times(0, latents.num_frames)
    return [float(time - times[0]) for time in times]


def stacked_across(width: int, height: int) -> bool:
    """Whether panels of this size lie beside each other, so that their picture is no long strip."""
    return height > width


def in_step(reader: VideoReader) -> Callable[[int], torch.Tensor]:
    """A function that gives the reader's next frames, as many as it is asked for: `(1, 3, n, H, W)`."""
    chunks, held = iter(reader), list[torch.Tensor]()

    def take(count: int) -> torch.Tensor:
        while sum(part.shape[2] for part in held) < count:
            held.append(next(chunks))
        together = torch.cat(held, dim=2)
        held[:] = [together[:, :, count:]]
        return together[:, :, :count]

    return take


def _first_latents(latents: LatentFile) -> torch.Tensor:
    """Up to eight latent frames, `(C, t, h, w)`, at equal distances."""
    count = latents.shape[2]
    chosen = sorted({round(k * (count - 1) / 7) for k in range(8)})
    return torch.cat([latents.read(t, t + 1)[0].float() for t in chosen], dim=1)


def _draw_motion(vae: AutoencoderKLVCVAE, wish: Wish, path: Path) -> Path | None:
    """Fig. 5 of the first frames, small; None for images and for models without a group causal TDC."""
    layers = [layer for layer in tdc_layers(vae) if layer.startswith("encoder")]
    info = probe(wish.source)
    if info.kind == "image" or not layers:
        return None
    ratio, group = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    scale = min(1.0, _MOTION_SIDE / min(info.width, info.height))
    crop = tuple(max(ratio, int(side * scale) // ratio * ratio) for side in (info.height, info.width))
    count = min(wish.num_frames, _MOTION_FRAMES)
    with VideoReader(
        wish.source, start_time=wish.start or None, num_frames=count, resize=min(crop), batch_dim=True
    ) as reader:
        clip = torch.cat(list(reader), dim=2)[..., : crop[0], : crop[1]]
    frames = clip.shape[2] // group * group
    height, width = (side // ratio * ratio for side in clip.shape[-2:])
    if frames < 2 * group:
        return None
    clip = clip[:, :, :frames, :height, :width].to(vae.device, vae.dtype)
    components = tdc_components(vae, clip, layers[0])
    return _save(draw_components(components, [group + k for k in range(min(3, frames - group))]), path)


def _save(picture: Any, path: Path) -> Path:
    picture.save(path)
    return path


def _facts(vae: AutoencoderKLVCVAE, outcome: Outcome, seconds: float, clock: Clock) -> dict[str, Any]:
    pixels = 3 * outcome.frames * outcome.width * outcome.height
    shape = LatentFile(outcome.latents).shape[1:]
    numbers = torch.Size(shape).numel()
    of_more = f" of the file's {outcome.in_source}" if outcome.frames < (outcome.in_source or 0) else ""
    facts = {
        "frames": f"{outcome.frames}{of_more}, {outcome.width}x{outcome.height}",
        "latents": f"{'x'.join(map(str, shape))}, {pixels / numbers:.0f} times fewer numbers",
        "time": f"{seconds:.1f} s, {outcome.frames / seconds:.1f} frames/s on {vae.device.type} in "
        f"{str(vae.dtype).removeprefix('torch.')}",
        "memory": clock.memory(),
    }
    if outcome.scores.psnr:
        means = outcome.scores.summary()
        decibels = "identical" if means["psnr"] is None else f"{means['psnr']:.2f} dB"
        facts = {"PSNR": decibels, "SSIM": "-" if means["ssim"] is None else f"{means['ssim']:.4f}", **facts}
    return facts
