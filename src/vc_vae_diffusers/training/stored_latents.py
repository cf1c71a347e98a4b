"""Training on shards of latents that `vcvae encode --shards` wrote: windows of them, in an order that follows from the seed.

A latent frame stands for a group of frames and knows the group before it, so a window may begin at any of them. What was
stored is the posterior's mode (or a sample), so there is no noise to draw: the log-variance that is handed on says none.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load
from torch.utils.data import Dataset

from .clip_plan import STREAM_CACHE, STREAM_CLIP, ClipRequest, counter_rng, noise_seed
from .data import DataError
from .latent_cache import merge_moments, moments_of

_NO_NOISE = -30.0  # log-variance


@dataclass(frozen=True)
class Stored:
    """One sample: where its bytes lie in its shard, and its shape (C, T', h, w)."""

    shard: str
    key: str
    offset: int
    size: int
    shape: tuple[int, ...]


class StoredLatents(Dataset[dict]):
    """Windows of stored latents by :class:`ClipRequest`; every epoch takes one of each sample, in an order of its own.

    Items are those of :class:`~vc_vae_diffusers.training.latent_cache.LatentCache`.

    Args:
        shards: tar files.
        window: (t, h, w) latent cells; samples that are smaller are left out.
        made_by: what the headers must say of the model, by name.
        seed: of order and windows.

    Raises:
        DataError: if no sample is large enough, or one was made by another kind of model.
    """

    def __init__(self, shards: Sequence[str], window: tuple[int, int, int], made_by: Mapping[str, str], seed: int):
        self.window, self.seed = window, seed
        found = [sample for shard in shards for sample in _samples(shard, made_by)]
        self.samples = [s for s in found if all(side >= least for side, least in zip(s.shape[1:], window, strict=True))]
        if not self.samples:
            largest = max((sample.shape[1:] for sample in found), default=None)
            raise DataError(
                f"no latents of at least {window} cells in {len(shards)} shards (largest: {largest}): encode larger"
            )
        self.left_out = len(found) - len(self.samples)
        self._order: tuple[int, list[int]] | None = None

    @property
    def num_clips(self) -> int:
        return len(self.samples)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, t, h, w) of a window."""
        return (self.samples[0].shape[0], *self.window)

    def clips(self) -> list[str]:
        """Names of all samples, as a clip's name is written."""
        return [f"{sample.key} from 0" for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: ClipRequest) -> dict:
        epoch, place = divmod(request.ordinal, len(self.samples))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, counter_rng(self.seed, STREAM_CACHE, epoch).permutation(len(self.samples)).tolist())
        sample = self.samples[self._order[1][place]]
        random = counter_rng(self.seed, STREAM_CLIP, request.bucket_index, request.ordinal)
        t, y, x = (int(random.integers(side - size + 1)) for side, size in zip(sample.shape[1:], self.window, strict=True))
        mean = read(sample)[:, t : t + self.window[0], y : y + self.window[1], x : x + self.window[2]]
        return {
            "posterior": torch.cat([mean, torch.full_like(mean, _NO_NOISE)]),
            "clip": f"{sample.key} from {t}",
            "noise_seed": noise_seed(self.seed, request.bucket_index, request.ordinal),
        }

    @cached_property
    def _moments(self) -> torch.Tensor:
        return merge_moments([moments_of(read(sample)[None]) for sample in self.samples])

    @property
    def latents_mean(self) -> list[float]:
        """Of each channel over all samples."""
        return self._moments[1].tolist()

    @property
    def latents_std(self) -> list[float]:
        """Of each channel over all samples."""
        return (self._moments[2] / self._moments[0]).sqrt().tolist()


def read(sample: Stored) -> torch.Tensor:
    """The latents of a sample, (C, T', h, w) float32."""
    with open(sample.shard, "rb") as file:
        file.seek(sample.offset)
        tensors = load(file.read(sample.size))
    latents = tensors["latents"][0].float()
    if "scale" in tensors:
        latents = latents * tensors["scale"][:, None, None, None] + tensors["shift"][:, None, None, None]
    return latents


def _samples(shard: str, made_by: Mapping[str, str]) -> list[Stored]:
    """What a shard holds, from its headers alone."""
    samples = []
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
            for member in archive:
                if not member.name.endswith(".safetensors"):
                    continue
                if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
                    raise EOFError(f"{member.name} ends behind the file")
                file.seek(member.offset_data)
                (length,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(min(length, 1 << 20)))
                shape = tuple(header["latents"]["shape"][1:])
                _check(
                    f"{shard}/{member.name}", header.get("__metadata__", {}) | {"latent_channels": str(shape[0])}, made_by
                )
                key = member.name.removesuffix(".safetensors")
                samples.append(Stored(shard, key, member.offset_data, member.size, shape))
    except (tarfile.TarError, OSError, EOFError, struct.error, LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{shard} is no readable shard of latents ({error!r}): encode it again") from error
    return samples


def _check(name: str, says: Mapping[str, str], made_by: Mapping[str, str]) -> None:
    for what, expected in made_by.items():
        if says.get(what) != expected:
            raise DataError(
                f"{name} was made with {what} {says.get(what)}, the model has {expected}: name the one that made it"
            )
