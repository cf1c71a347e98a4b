"""Latents of training clips, encoded once and kept in safetensors shards with their statistics.

Which clips: the first N that :class:`~vc_vae_diffusers.training.data.ClipDataset` would serve a training run of one bucket,
random starts, crops and flips included. What is kept is the posterior, so that training samples it anew at every step, as
Latte does. A shard is written as a whole or not at all, and only missing ones are encoded: a killed run goes on where it
stopped.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..files import whole_file, write_json
from ..metrics.weights import tensor_digest
from .clip_plan import STREAM_CACHE, ClipRequest, counter_rng, noise_seed
from .data import ClipDataset, ReadHealth, collate, quiet_worker

logger = logging.getLogger(__name__)

SETTINGS_NAME, INDEX_NAME = "settings.json", "index.json"


def moments_of(mean: torch.Tensor, variance: torch.Tensor | None = None) -> torch.Tensor:
    """Count, mean and summed squared deviation of each channel of latents (N, C, t, h, w): (3, C) float64.

    Args:
        mean: of the posteriors.
        variance: of the posteriors, for the moments of latents that are sampled from them, in closed form.
    """
    values = mean.double().transpose(0, 1).flatten(1)
    count = torch.full_like(values[:, 0], values.shape[1])
    center = values.mean(dim=1)
    deviation = (values - center[:, None]).square().sum(dim=1)
    if variance is not None:
        deviation = deviation + variance.double().sum(dim=(0, 2, 3, 4))
    return torch.stack([count, center, deviation]).cpu()


def merge_moments(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Moments of the union of disjoint sets of latents, by the parallel update of Chan et al."""
    total = parts[0]
    for part in parts[1:]:
        count = total[0] + part[0]
        shift = part[1] - total[1]
        mean = total[1] + shift * part[0] / count
        deviation = total[2] + part[2] + shift.square() * total[0] * part[0] / count
        total = torch.stack([count, mean, deviation])
    return total


# What a configuration says about latents that are made already: it changes none of them.
_STATISTICS = {"latents_mean", "latents_std", "scaling_factor", "shift_factor"}

# Files of which the beginning is read, and how much of it, to tell collections apart that agree in names and sizes.
_SAMPLED_FILES, _SAMPLED_BYTES = 64, 65_536


def vae_fingerprint(vae: ModelMixin) -> str:
    """Digest of a VAE's weights and configuration: latents of one are nothing to another.

    Neither where it was loaded from nor its latent statistics count.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_") and name not in _STATISTICS}
    text = json.dumps([type(vae).__name__, config, tensor_digest(vae.state_dict())], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_fingerprint(files: Sequence[str], root: str | Path) -> str:
    """Digest of a collection: names below ``root`` and sizes of all files, and the beginnings of some.

    The same files in another place have the same digest.
    """
    digest = hashlib.sha256()
    for file in files:
        parts = sorted(Path(file).rglob("*")) if Path(file).is_dir() else [Path(file)]  # a folder of frames is a clip
        for part in parts:
            digest.update(f"{os.path.relpath(part, root)} {part.stat().st_size}\n".encode())
    for file in files[:: max(1, len(files) // _SAMPLED_FILES)]:
        if Path(file).is_file():
            with open(file, "rb") as opened:
                digest.update(opened.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create a cache folder for these settings, or check that the one there was made with the same.

    Raises:
        ValueError: naming the settings that differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    if not path.exists():
        write_json(path, settings, indent=1)
        return
    there = json.loads(path.read_text())
    settings = json.loads(json.dumps(settings))
    differing = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
    if differing:
        changes = ", ".join(f"{name} was {there.get(name)!r}, is {settings.get(name)!r}" for name in differing)
        raise ValueError(f"latent_cache {folder} holds latents made with other settings: {changes}. Name another folder.")


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def missing_shards(folder: Path, num_clips: int, shard_clips: int) -> list[int]:
    """Numbers of the shards that are still to be written."""
    return [shard for shard in range(-(-num_clips // shard_clips)) if not shard_path(folder, shard).exists()]


def shard_batches(shard: int, num_clips: int, shard_clips: int, batch_size: int) -> Iterator[list[ClipRequest]]:
    """Requests for the clips of a shard."""
    stop = min((shard + 1) * shard_clips, num_clips)
    for first in range(shard * shard_clips, stop, batch_size):
        yield [ClipRequest(0, 0, ordinal) for ordinal in range(first, min(first + batch_size, stop))]


@torch.no_grad()
def write_shard(
    vae: ModelMixin,
    dataset: ClipDataset,
    batches: Sequence[list[ClipRequest]],
    path: Path,
    dtype: torch.dtype,
    health: ReadHealth,
    num_workers: int = 0,
) -> None:
    """Encode the clips of one shard and write it: `posteriors` (N, 2C, t, h, w), `moments` (3, C), the clips' names."""
    device = next(vae.parameters()).device
    posteriors, moments, clips = [], [], []
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=quiet_worker
    )
    for batch in loader:
        health.add(batch)
        posterior = vae.encode(batch["video"].to(device, vae.dtype)).latent_dist
        parameters = torch.cat([posterior.mean, posterior.logvar], dim=1).float()
        moments.append(moments_of(posterior.mean, posterior.logvar.double().exp()))
        posteriors.append(parameters.to("cpu", dtype))
        clips += batch["clips"]
    tensors = {"posteriors": torch.cat(posteriors), "moments": merge_moments(moments)}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"clips": json.dumps(clips)})


def fill_cache(
    vae: ModelMixin,
    dataset: ClipDataset,
    folder: Path,
    settings: dict[str, Any],
    *,
    batch_size: int,
    health: ReadHealth,
    num_workers: int,
    processes: Accelerator,
) -> None:
    """Encode the shards that a cache lacks, each process its share, and index it. To be called by every process.

    Args:
        vae: on its device.
        dataset: of the clips.
        folder: the cache.
        settings: what it is made with; ``cache_clips``, ``cache_shard_clips`` and ``cache_dtype`` say how much and how.
        batch_size: clips encoded at once.
        health, num_workers: as in training.
        processes: of the run.

    Raises:
        ValueError: if the folder holds latents made with other settings.
    """
    num_clips, shard_clips = settings["cache_clips"], settings["cache_shard_clips"]
    dtype = getattr(torch, settings["cache_dtype"])
    if processes.is_main_process:
        claim_folder(folder, settings)
    processes.wait_for_everyone()
    missing = missing_shards(folder, num_clips, shard_clips)
    processes.wait_for_everyone()
    for done, shard in enumerate(missing[processes.process_index :: processes.num_processes]):
        batches = shard_batches(shard, num_clips, shard_clips, batch_size)
        write_shard(vae, dataset, list(batches), shard_path(folder, shard), dtype, health, num_workers)
        logger.info("encoded shard %d, %d of %d missing ones here", shard, done + 1, len(missing))
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_index(folder)
    processes.wait_for_everyone()


def write_index(folder: Path) -> None:
    """Collect the shards of a complete cache: number of clips, their shape, mean and std of each latent channel."""
    moments, counts, shape = [], [], list[int]()
    for path in sorted(folder.glob("latents-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            moments.append(file.get_tensor("moments"))
            count, *shape = file.get_slice("posteriors").get_shape()
            counts.append(count)
    total = merge_moments(moments)
    write_json(
        folder / INDEX_NAME,
        {
            "num_clips": sum(counts),
            "shard_clips": max(counts),
            "latent_shape": [shape[0] // 2, *shape[1:]],
            "latents_mean": total[1].tolist(),
            "latents_std": (total[2] / total[0]).sqrt().tolist(),
        },
        indent=1,
    )


class LatentCache(Dataset[dict]):
    """Posteriors of a complete cache, by :class:`ClipRequest`; every epoch goes through all clips in an order of its own.

    Items hold `posterior` (2C, t, h, w) float32, `clip`, and `noise_seed`, which differs each time a clip is used.

    Args:
        folder: with an index.
        seed: of the order and the noise.

    Raises:
        ValueError: when the cache is not complete.
    """

    def __init__(self, folder: str | Path, seed: int):
        self.folder, self.seed = Path(folder), seed
        path = self.folder / INDEX_NAME
        if not path.exists():
            raise ValueError(f"latent_cache {folder} has no {INDEX_NAME}: its encoding did not finish; run it again.")
        index = json.loads(path.read_text())
        self.num_clips, self.shard_clips = index["num_clips"], index["shard_clips"]
        self.latent_shape = tuple(index["latent_shape"])
        self.latents_mean, self.latents_std = index["latents_mean"], index["latents_std"]
        self._files: dict[int, tuple[Any, list[str]]] = {}
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, request: ClipRequest) -> dict:
        epoch, place = divmod(request.ordinal, self.num_clips)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, counter_rng(self.seed, STREAM_CACHE, epoch).permutation(self.num_clips).tolist())
        shard, row = divmod(self._order[1][place], self.shard_clips)
        file, clips = self._open(shard)
        return {
            "posterior": file.get_slice("posteriors")[row].float(),
            "clip": clips[row],
            "noise_seed": noise_seed(self.seed, request.bucket_index, request.ordinal),
        }

    def _open(self, shard: int) -> tuple[Any, list[str]]:
        """A shard's open file, and the names of its clips as `ClipDataset` calls them."""
        if shard not in self._files:
            file = safe_open(shard_path(self.folder, shard), framework="pt")
            self._files[shard] = (file, json.loads(file.metadata()["clips"]))
        return self._files[shard]

    def clips(self) -> list[str]:
        """Names of all clips."""
        return [clip for shard in range(-(-self.num_clips // self.shard_clips)) for clip in self._open(shard)[1]]

    def __getstate__(self) -> dict:
        # Open files do not travel to loader workers.
        return {**self.__dict__, "_files": {}}


def collate_latents(items: Sequence[dict]) -> dict:
    """Stack cached posteriors, (B, 2C, t, h, w), beside lists `clips` and `noise_seeds`."""
    return {
        "posterior": torch.stack([item["posterior"] for item in items]),
        "clips": [item["clip"] for item in items],
        "noise_seeds": [item["noise_seed"] for item in items],
    }


def class_of(clip: str) -> str:
    """Class of a clip where folders are classes (UCF-101): the name of its file's folder."""
    return Path(clip.rpartition(" from ")[0]).parent.name
