"""Frames of any size for a model that takes multiples of its spatial compression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FrameSize:
    """A frame's size and the multiple of the model's ratio that it is padded to by repeating the last row and column."""

    height: int
    width: int
    padded_height: int
    padded_width: int

    @classmethod
    def of(cls, height: int, width: int, ratio: int) -> FrameSize:
        return cls(height, width, -(-height // ratio) * ratio, -(-width // ratio) * ratio)

    def pad(self, frames: torch.Tensor) -> torch.Tensor:
        """`(B, C, T, H, W)` to the padded size."""
        right, bottom = self.padded_width - self.width, self.padded_height - self.height
        return F.pad(frames, (0, right, 0, bottom, 0, 0), mode="replicate") if right or bottom else frames

    def crop(self, frames: torch.Tensor) -> torch.Tensor:
        """Back to the original size."""
        return frames[..., : self.height, : self.width]
