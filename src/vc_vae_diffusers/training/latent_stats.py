"""Mean and standard deviation of a VAE's latents on a collection of videos, as diffusion models need them.

Streaming (nothing but running moments is kept), distributed (each process takes its share of the files), in float64.
Not in the paper, which says nothing about scaling VC-VAE's latents; Flux's constants belong to images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin

from ..files import write_whole
from ..processes import processes
from ..video import VideoReadError, probe, read_clip
from .any_vae import pad_frames, returned_length
from .data import ReadHealth, Skip, UnsuitableError
from .latent_cache import merge_moments, moments_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentStatistics:
    """By channel: ``(z - latents_mean) / latents_std`` is normalised. As one pair: ``(z - shift_factor) * scaling_factor``.

    ``elements`` counts latent positions (batch, frame, row, column), ``clips`` what they came from.
    """

    latents_mean: list[float]
    latents_std: list[float]
    scaling_factor: float
    shift_factor: float
    elements: int
    clips: int
    unreadable: int

    @classmethod
    def of(cls, moments: torch.Tensor, clips: int, unreadable: int) -> LatentStatistics:
        """From moments (3, C) as :func:`moments_of` gives them; the one pair is that of all channels pooled.

        Raises:
            ValueError: if a channel does not vary.
        """
        count, mean, deviation = moments
        variance = deviation / count
        flat = (variance == 0).nonzero().flatten().tolist()
        if flat:
            raise ValueError(f"latent channels {flat} are constant, their std is 0; the model is untrained or broken")
        shift = mean.mean()
        pooled = (variance + (mean - shift).square()).mean()
        return cls(
            mean.tolist(),
            variance.sqrt().tolist(),
            (1 / pooled.sqrt()).item(),
            shift.item(),
            int(count[0]),
            clips,
            unreadable,
        )


def measure_latents(
    vae: ModelMixin,
    files: Sequence[str],
    *,
    num_frames: int = 16,
    size: int = 256,
    clips_per_video: int = 1,
    posterior: Literal["mode", "sample"] = "mode",
    max_unreadable: float = 0.5,
) -> LatentStatistics:
    """Encode clips of every file and return the statistics of their latents. To be called by every process.

    A clip is ``num_frames`` consecutive frames, or one image, short side to ``size``, centre crop; a video's clips start
    at equal distances. Files are shared out by process; the result is the same on all of them.

    Args:
        vae: any diffusers video VAE, on its device and in its dtype.
        files: paths; unreadable or too short ones are logged, counted and skipped.
        num_frames: length of a clip; repeated last frames fill it up where the VAE's scheme asks for it.
        size: side in pixels.
        clips_per_video: how many.
        posterior: ``mode`` measures the means that pipelines encode to; ``sample`` adds the posterior's variance, in
            closed form, for models trained on samples.
        max_unreadable: as in training.

    Raises:
        DataError: if most files cannot be read.
        ValueError: if nothing could be read.
    """
    state = processes(next(vae.parameters()).device)
    lengths = {frames: returned_length(vae, frames) for frames in {1, num_frames}}
    parameter = next(vae.parameters())
    parts: list[torch.Tensor] = []
    health = ReadHealth(max_unreadable)
    for batch in _clips(files[state.process_index :: state.num_processes], num_frames, size, clips_per_video):
        health.add(batch)
        if not batch["clips"]:
            continue
        video = batch["video"]
        clip = pad_frames(video, lengths[video.shape[2]]).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            distribution = vae.encode(clip).latent_dist
        latest = moments_of(distribution.mean, distribution.var if posterior == "sample" else None)
        parts = [merge_moments([*parts, latest])]
    return _over_processes(parts, health)


def _clips(files: Sequence[str], num_frames: int, size: int, clips_per_video: int) -> Iterator[dict]:
    """One clip at a time, as batches of `ReadHealth`; a file that does not serve is a batch without clips."""
    for path in files:
        try:
            info = probe(path)
            if info.kind == "image":
                clip = read_clip(path, num_frames=1, resize=size, crop=size)
                yield {"video": clip[None], "clips": [path], "skipped": []}
                continue
            room = (info.duration or Fraction(0)) - num_frames / info.fps
            if room < 0:
                raise UnsuitableError(f"has fewer than {num_frames} frames")
            for index in range(clips_per_video):
                start = int(room * info.fps * Fraction(index, max(clips_per_video - 1, 1))) / info.fps
                clip = read_clip(path, num_frames=num_frames, start_time=start, resize=size, crop=size)
                yield {"video": clip[None], "clips": [path], "skipped": []}
        except (VideoReadError, UnsuitableError) as error:
            yield {"video": None, "clips": [], "skipped": [Skip.of(path, error)]}


def _over_processes(parts: list[torch.Tensor], health: ReadHealth) -> LatentStatistics:
    """Join what the processes measured; a process without a clip has no moments.

    Raises:
        ValueError: if no process has any.
    """
    gathered = gather_object([(parts, health.read, health.unreadable)])
    measured = [part for own, _, _ in gathered for part in own]
    if not measured:
        raise ValueError("no latents were measured: no clip could be read")
    return LatentStatistics.of(merge_moments(measured), sum(row[1] for row in gathered), sum(row[2] for row in gathered))


def write_statistics(folder: str | Path, statistics: LatentStatistics) -> list[str]:
    """Put the statistics into ``folder/config.json`` and return the names of the entries that were set.

    Only entries that the model's configuration has are set: Wan knows a mean and a std by channel, HunyuanVideo one
    scaling factor, VC-VAE all four.

    Raises:
        ValueError: if the configuration has none of them.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    values = {name: getattr(statistics, name) for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")}
    known = {name: value for name, value in values.items() if name in config}
    if not known:
        raise ValueError(f"{path} has none of {sorted(values)}; this model has no latent statistics to set")
    write_whole(path, json.dumps({**config, **known}, indent=2, sort_keys=True) + "\n")
    return sorted(known)
