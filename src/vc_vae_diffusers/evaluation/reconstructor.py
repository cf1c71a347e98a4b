"""An autoencoder as the evaluation sees it, whatever is behind it.

A `Reconstructor` takes clips `(B, 3, T, H, W)` in [-1, 1] of any T and any size: it repeats the last frame up to a length
that the model accepts, replicates border pixels up to a size it accepts, and crops the result.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


@dataclass(frozen=True)
class FrameRule:
    """The clip lengths a model accepts: `least + step * k` frames, and one frame alone if `image`."""

    least: int
    step: int
    image: bool = False

    def padded(self, num_frames: int) -> int:
        """The shortest accepted length of at least `num_frames`."""
        if num_frames == 1 and self.image:
            return 1
        return self.least + self.step * max(0, -(-(num_frames - self.least) // self.step))

    def __str__(self) -> str:
        return f"{self.least} + {self.step}k" + (" or 1" if self.image and self.least > 1 else "")


@dataclass
class Seconds:
    """Wall time spent in the two halves of a model."""

    encode: float = 0.0
    decode: float = 0.0


class Reconstructor(ABC):
    """An autoencoder as the evaluation sees it.

    Attributes:
        module: the network, None for those that have none.
        frame_rule: clip lengths that `encode` accepts.
        separate_first: whether the first frame is coded on its own (1 + r_t k frames). Such models are given T + 1 frames
            and scored without the first.
        temporal_compression, spatial_compression, latent_channels: of the latents.
        spatial_multiple: height and width that `encode` accepts are multiples of it.
        streams: whether `reconstruct_stream` needs memory for a few frames only.
        needs_length: whether it must be told the number of frames.
        settings: what else was decided for this model, for the result file.
    """

    module: Any = None
    frame_rule = FrameRule(1, 1)
    separate_first = False
    temporal_compression = 1
    spatial_compression = 1
    spatial_multiple = 1
    latent_channels: int | None = None
    streams = False
    needs_length = False

    def __init__(self, *, posterior: str = "mode"):
        self.posterior = posterior
        self.settings: dict[str, Any] = {}
        self.seconds = Seconds()
        self.latent_shape: tuple[int, ...] | None = None

    @abstractmethod
    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents of a clip whose length and size the model accepts."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The clip, (B, 3, T, H, W), of latents as `encode` returns them; values may leave [-1, 1]."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.module is None else next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.module is None else next(self.module.parameters()).dtype

    @torch.inference_mode()
    def reconstruct(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode and decode a whole clip.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], any T and size.
            generator: for a sampled posterior.

        Returns:
            (B, 3, T, H, W) float32, clamped to [-1, 1], on the CPU. `seconds` grows by what it took.
        """
        num_frames, height, width = video.shape[2:]
        x = pad_size(video.to(self.device, self.dtype), self.spatial_multiple)
        missing = self.frame_rule.padded(num_frames) - num_frames
        if missing:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        started = self._now()
        latents = self.encode(x, generator)
        encoded = self._now()
        sample = self.decode(latents)
        decoded = self._now()
        self.seconds.encode += encoded - started
        self.seconds.decode += decoded - encoded
        self.latent_shape = tuple(latents.shape)
        if sample.shape[2] < num_frames or sample.shape[3] < height or sample.shape[4] < width:
            raise ValueError(
                f"{type(self).__name__} made {tuple(sample.shape)} of {tuple(x.shape)}, less than the "
                f"{num_frames} frames of {height}x{width} it was given"
            )
        return sample[:, :, :num_frames, :height, :width].float().clamp_(-1, 1).cpu()

    def reconstruct_stream(
        self, chunks: Iterable[torch.Tensor], generator: torch.Generator | None = None, num_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Reconstruct a clip that comes in chunks along time; models that cannot stream collect it first.

        Args:
            chunks: (B, 3, t, H, W) in [-1, 1], any lengths.
            generator: for a sampled posterior.
            num_frames: of the whole clip, where it is known.

        Yields:
            The reconstruction in chunks of any lengths, together as long as the clip or longer (surplus at the end).
        """
        yield self.reconstruct(torch.cat(list(chunks), dim=2), generator)

    def _latents(self, posterior: DiagonalGaussianDistribution, generator: torch.Generator | None) -> torch.Tensor:
        return posterior.mode() if self.posterior == "mode" else posterior.sample(generator=generator)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def pad_size(video: torch.Tensor, multiple: int) -> torch.Tensor:
    """Replicate the last row and column up to multiples."""
    height, width = video.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    if rows == columns == 0:
        return video
    return F.pad(video.flatten(1, 2), (0, columns, 0, rows), mode="replicate").unflatten(1, video.shape[1:3])


class Original(Reconstructor):
    """The source itself: the row that every other one is to be read against."""

    streams = True

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return video

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def reconstruct_stream(
        self, chunks: Iterable[torch.Tensor], generator: torch.Generator | None = None, num_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        for chunk in chunks:
            yield self.reconstruct(chunk)
