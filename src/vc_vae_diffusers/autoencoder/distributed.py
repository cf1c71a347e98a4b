"""One long video on several processes: its tiles or its segments are shared among them. Not in the paper.

Processes are those that `accelerate launch` or torchrun starts, on CPUs too; alone, everything here works and
gives the same result. All processes call with the same arguments, and all get the whole result.

**Tiles** (`distribute_tiles`): each process takes every n-th tile of a frame. Whole clips, chunks and streams come out
bit by bit as in one process with the same tiling.

**Segments**: the video is cut into segments of `gop_size` groups, and the model starts anew in each, as a codec does in a
closed group of pictures. Segments then depend on nothing before them: they can be shared among processes, and decoding can
start at any of them (`decode_range`). Results depend on `gop_size` and not on the number of processes. Against a clip
without restarts the first frames of a segment see no past, as the first frames of any clip. `gop_size` latent frames are

- with `first_frame="in_sequence"`: `r_t * gop_size` frames. What is missing for whole groups is repeated once for the clip
  and not in every segment, at its end for `frame_convention="4k"` and at its start for `"4k+1"`, so that a clip has as many
  latent frames as without restarts;
- with `first_frame="separate"`: `1 + r_t * (gop_size - 1)` frames. Every segment has a separate first frame, as every closed
  group of pictures has an intra frame, and a clip has more latent frames than without restarts.

Latents of segments must be decoded with the `gop_size` that they were encoded with, which nothing in them tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .autoencoder_kl_vcvae import AutoencoderKLVCVAE
from .blocks import Cache
from .tiling import BlendedFrameBuffer, FrameBuffer, scaled

Result = TypeVar("Result")


class RemoteError(RuntimeError):
    """Another process failed in its share of the work."""


def _together(work: Callable[[], Result], key: object) -> Result:
    """Do this process's share; fail on all processes if it fails on one, instead of waiting for it for ever.

    Args:
        key: what all processes must agree on, as a plain object: without it they would exchange garbage or hang.
    """
    error = None
    try:
        result = work()
    except Exception as caught:  # reported to the others first, raised again below
        error = caught
    reports = gather_object([(None if error is None else f"{type(error).__name__}: {error}", key)])
    if error is not None:
        raise error
    for process, (failure, other) in enumerate(reports):
        if failure is not None:
            raise RemoteError(f"process {process} failed, its work is missing: {failure}")
        if other != key:
            raise ValueError(f"process {process} was called with {other}, this one with {key}: pass the same on all")
    return result


def _broadcast(tensor: torch.Tensor, owner: int) -> None:
    """Fill a contiguous tensor with that of its owner. Bytes travel, for not every backend knows every dtype."""
    broadcast(tensor.view(torch.uint8), from_process=owner)


# ------------------------------------------------------------------------------------------------------------- tiles


@contextmanager
def distribute_tiles(vae: AutoencoderKLVCVAE) -> Iterator[None]:
    """While it lasts, a model with tiling enabled shares its tiles among all processes.

    `encode`, `decode`, `encode_chunk`, `decode_chunk` and both streams work as before, pipelines around the model too;
    caches hold the tiles of their own process alone.

        vae.enable_tiling(512, 512)
        with distribute_tiles(vae), torch.no_grad():
            frames = vae.decode(latents).sample

    Raises:
        ValueError: if tiling is not enabled.
    """
    if not vae.use_tiling:
        raise ValueError("vae has no tiling enabled, there is nothing to share: call vae.enable_tiling(...) before")
    vae.__dict__["_tiled"] = functools.partial(_tiles_shared, vae, PartialState())
    try:
        yield
    finally:
        del vae.__dict__["_tiled"]


def _tiles_shared(
    vae: AutoencoderKLVCVAE,
    processes: PartialState,
    run: Callable,
    x: torch.Tensor,
    caches: list[Cache],
    parts: BlendedFrameBuffer,
    cell_in: int,
    keep_cache: bool,
) -> None:
    """Takes the place of `AutoencoderKLVCVAE._tiled`, with its arguments."""
    if torch.is_grad_enabled():
        raise ValueError("gradients do not travel between processes: call it under torch.no_grad()")
    tiles = list(vae.tile_grid.tiles(x.shape[3] // cell_in, x.shape[4] // cell_in, parts.scale))

    def own_tiles() -> dict[int, torch.Tensor]:
        outputs = {}
        for i in range(processes.process_index, len(tiles), processes.num_processes):
            frames = FrameBuffer(parts.total)
            region = x[..., scaled(tiles[i].rows, cell_in), scaled(tiles[i].columns, cell_in)]
            state = run(region, caches[i], frames)
            caches[i] = state if keep_cache else None
            outputs[i] = frames.joined().contiguous()
        return outputs

    outputs = _together(own_tiles, (tuple(x.shape), str(x.dtype), parts.total, len(tiles)))
    # A process without a tile learns here what tiles look like; the first process always has one.
    like = gather_object([(outputs[0].shape[1], outputs[0].dtype) if 0 in outputs else None])[0]
    for i, tile in enumerate(tiles):  # in the order of one process, so that sums round alike
        size = (tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)
        shape = (x.shape[0], like[0], parts.total, *(cells * parts.scale for cells in size))
        output = outputs.pop(i) if i in outputs else x.new_empty(shape, dtype=like[1])
        _broadcast(output, i % processes.num_processes)
        parts.start(tile)
        parts.append(output)


# ---------------------------------------------------------------------------------------------------------- segments


@dataclass(frozen=True)
class Segment:
    """A part of a clip that is encoded and decoded on its own: its frames, and its latent frames."""

    frames: slice
    latents: slice


def split_segments(vae: AutoencoderKLVCVAE, num_frames: int, gop_size: int) -> list[Segment]:
    """Cut a clip into segments of `gop_size` latent frames, the last one shorter; see the table of this module.

    Raises:
        ValueError: for a number below 1.
    """
    for name, value in (("num_frames", num_frames), ("gop_size", gop_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: pass at least 1")
    groups = vae.groups
    length = groups.total(gop_size)
    start = -groups.missing(num_frames) if groups.front_padded else 0
    segments: list[Segment] = []
    for first in range(start, num_frames, length):
        frames = slice(max(first, 0), min(first + length, num_frames))
        latents = segments[-1].latents.stop if segments else 0
        segments.append(Segment(frames, slice(latents, latents + groups.latent_frames(frames.stop - frames.start))))
    return segments


def frames_of_segments(vae: AutoencoderKLVCVAE, latent_frames: int, gop_size: int) -> int:
    """The frames that segments of so many latent frames in all decode to when `num_frames` is not given."""
    if not vae.groups.alone:
        return vae.groups.frames(latent_frames)
    whole, rest = divmod(latent_frames, gop_size)
    return whole * vae.groups.frames(gop_size) + (vae.groups.frames(rest) if rest else 0)


def _segments_of_latents(
    vae: AutoencoderKLVCVAE, latents: torch.Tensor, num_frames: int | None, gop_size: int
) -> list[Segment]:
    if num_frames is None:
        num_frames = frames_of_segments(vae, latents.shape[2], gop_size)
    segments = split_segments(vae, num_frames, gop_size)
    if segments[-1].latents.stop != latents.shape[2]:
        raise ValueError(
            f"latents has {latents.shape[2]} frames, segments of gop_size {gop_size} of a clip of {num_frames} frames have "
            f"{segments[-1].latents.stop}: pass the gop_size and the num_frames that they were encoded with"
        )
    return segments


@torch.no_grad()
def encode_segments(vae: AutoencoderKLVCVAE, video: torch.Tensor, gop_size: int) -> DiagonalGaussianDistribution:
    """Encode a clip in segments, shared among all processes.

    Args:
        video: `(B, C, T, H, W)` in [-1, 1], the same on all processes; it may lie on another device than the model.
        gop_size: latent frames of a segment.

    Returns:
        The posterior of all latent frames, on the video's device.

    Raises:
        ValueError: for a wrong shape or `gop_size`, or arguments that differ between processes.
        RemoteError: when another process failed.
    """
    segments = split_segments(vae, video.shape[2], gop_size)
    ratio = vae.spatial_compression_ratio
    shape = (
        video.shape[0],
        2 * vae.config.latent_channels,
        segments[-1].latents.stop,
        *(s // ratio for s in video.shape[3:]),
    )

    def encode(segment: Segment) -> torch.Tensor:
        return vae.encode(video[:, :, segment.frames].to(vae.device, vae.dtype)).latent_dist.parameters

    moments = _shared(vae, segments, encode, shape, lambda segment: segment.latents, video.device)
    return DiagonalGaussianDistribution(moments)


@torch.no_grad()
def decode_segments(
    vae: AutoencoderKLVCVAE, latents: torch.Tensor, gop_size: int, num_frames: int | None = None
) -> torch.Tensor:
    """Decode the latents of `encode_segments`, shared among all processes.

    Args:
        latents: `(B, latent_channels, n, h, w)`, unscaled, the same on all processes.
        gop_size: latent frames of a segment, as they were encoded.
        num_frames: T of the clip that was encoded; None gives all that the latents hold.

    Returns:
        The frames `(B, C, T, H, W)`, on the latents' device.

    Raises:
        ValueError: for a wrong shape, or `gop_size` and `num_frames` that the latents cannot come from.
        RemoteError: when another process failed.
    """
    segments = _segments_of_latents(vae, latents, num_frames, gop_size)
    size = (side * vae.spatial_compression_ratio for side in latents.shape[3:])
    shape = (latents.shape[0], vae.config.out_channels, segments[-1].frames.stop, *size)

    def decode(segment: Segment) -> torch.Tensor:
        return _decode_segment(vae, latents, segment)

    return _shared(vae, segments, decode, shape, lambda segment: segment.frames, latents.device)


@torch.no_grad()
def decode_own_segments(
    vae: AutoencoderKLVCVAE, latents: torch.Tensor, gop_size: int, num_frames: int | None = None
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Decode this process's share alone, segment by segment, for a video too long to be held whole.

    Nothing is exchanged: processes go at their own speed, and each writes its own frames.

    Args:
        latents, gop_size, num_frames: as in `decode_segments`.

    Yields:
        A segment, and its frames on the model's device.
    """
    processes = PartialState()
    segments = _segments_of_latents(vae, latents, num_frames, gop_size)
    for segment in segments[processes.process_index :: processes.num_processes]:
        yield segment, _decode_segment(vae, latents, segment)


@torch.no_grad()
def decode_range(
    vae: AutoencoderKLVCVAE,
    latents: torch.Tensor,
    start: int,
    stop: int,
    gop_size: int,
    num_frames: int | None = None,
) -> torch.Tensor:
    """Decode frames `start` to `stop` (left out) of a clip and no segment that has none of them: random access.

    The frames are those of `decode_segments`. Nothing is exchanged between processes.

    Args:
        latents, gop_size, num_frames: as in `decode_segments`, of the whole clip.

    Returns:
        The frames `(B, C, stop - start, H, W)`, on the model's device.

    Raises:
        ValueError: for a range that is empty or not in the clip.
    """
    segments = _segments_of_latents(vae, latents, num_frames, gop_size)
    total = segments[-1].frames.stop
    if not 0 <= start < stop <= total:
        raise ValueError(f"start is {start} and stop {stop}, the clip has {total} frames: pass 0 <= start < stop <= {total}")
    wanted = [segment for segment in segments if segment.frames.start < stop and start < segment.frames.stop]
    first = wanted[0].frames.start
    parts = FrameBuffer(wanted[-1].frames.stop - first)
    for segment in wanted:
        parts.append(_decode_segment(vae, latents, segment))
    return parts.joined()[:, :, start - first : stop - first]


def _decode_segment(vae: AutoencoderKLVCVAE, latents: torch.Tensor, segment: Segment) -> torch.Tensor:
    part = latents[:, :, segment.latents].to(vae.device, vae.dtype)
    return vae.decode(part, num_frames=segment.frames.stop - segment.frames.start).sample


def _shared(
    vae: AutoencoderKLVCVAE,
    segments: list[Segment],
    work: Callable[[Segment], torch.Tensor],
    shape: tuple[int, ...],
    place: Callable[[Segment], slice],
    device: torch.device,
) -> torch.Tensor:
    """Have each process work on every n-th segment and put the results together on all of them, along dimension 2."""
    processes = PartialState()
    count = processes.num_processes
    result = torch.empty(shape, dtype=vae.dtype, device=device)
    for first in range(0, len(segments), count):  # a segment a process at a time, so that no more of them wait
        batch = segments[first : first + count]
        mine = batch[processes.process_index] if processes.process_index < len(batch) else None
        share = functools.partial(_dense, work, mine)
        done = _together(share, (shape, first, len(segments)))
        for owner, segment in enumerate(batch):
            where = place(segment)
            part = done if segment is mine else None
            if part is None:
                extent = (*shape[:2], where.stop - where.start, *shape[3:])
                part = torch.empty(extent, dtype=vae.dtype, device=vae.device)
            _broadcast(part, owner)
            result[:, :, where] = part.to(device)
    return result


def _dense(work: Callable[[Segment], torch.Tensor], segment: Segment | None) -> torch.Tensor | None:
    """The result of work on a process's segment, if it has one, in one piece of memory."""
    return None if segment is None else work(segment).contiguous()
