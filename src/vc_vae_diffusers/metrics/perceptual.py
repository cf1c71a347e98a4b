"""LPIPS as a metric: version 0.1 at the frames' own size, one value per frame."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import nn

from .frame import checked_pair
from .weights import load_lpips

# Below these sizes nothing is left after the trunk's strides.
_MIN_SIZE = {"alex": 31, "vgg": 16}


class LPIPSMetric(nn.Module):
    """Learned perceptual distance (Zhang et al., 2018) of every frame; report ``lpips_alex`` and ``lpips_vgg`` both.

    Not in the paper: which trunk; its figures are probably VGG's. Always float32, inside an autocast region too.

    Args:
        net: the trunk.
        weights: weight file or folder, see :func:`vc_vae_diffusers.metrics.weights.find_weights`.
        frames_per_batch: how many frames pass the network at a time; bounds the memory, changes nothing else.

    Raises:
        ImportError: if the ``lpips`` package is missing.
        MissingWeightsError: if the trunk's weights are missing.
        ValueError: for an unknown net or a batch below one frame.
    """

    def __init__(
        self, net: Literal["alex", "vgg"] = "vgg", weights: str | os.PathLike | None = None, frames_per_batch: int = 8
    ):
        super().__init__()
        if frames_per_batch < 1:
            raise ValueError(f"frames_per_batch is {frames_per_batch}, but a batch has at least one frame; use e.g. 8")
        self.network = load_lpips(net, weights)
        self.min_size = _MIN_SIZE[net]
        self.frames_per_batch = frames_per_batch

    @torch.no_grad()
    def forward(
        self, reconstruction: torch.Tensor, source: torch.Tensor, *, data_range: tuple[float, float]
    ) -> torch.Tensor:
        """Distance of every frame; the metric of a video is the mean over its frames.

        Args:
            reconstruction: (B, 3, T, H, W), values in ``data_range``, on this module's device.
            source: (B, 3, T, H, W), values in ``data_range``.
            data_range: lowest and highest possible value; it is mapped to [-1, 1].

        Returns:
            (B, T) float32; 0 for identical frames.

        Raises:
            ValueError: for other shapes, a wrong range, values outside it, frames too small for the trunk.
        """
        x, y, low, high = checked_pair(reconstruction, source, data_range)
        batch, channels, num_frames, height, width = x.shape
        if channels != 3:
            raise ValueError(f"reconstruction has {channels} channels, but LPIPS reads RGB; pass three channels")
        if min(height, width) < self.min_size:
            raise ValueError(
                f"reconstruction has frames of {height}x{width} pixels, but this LPIPS needs at least "
                f"{self.min_size}x{self.min_size}; measure larger frames"
            )
        frames = [(2 * (v - low) / (high - low) - 1).transpose(1, 2).flatten(0, 1) for v in (x, y)]
        pairs = zip(*(v.split(self.frames_per_batch) for v in frames), strict=True)
        with torch.autocast(x.device.type, enabled=False):
            distances = [self.network(*pair).flatten() for pair in pairs]
        return torch.cat(distances).view(batch, num_frames)
