"""Small collections of clips on the device they are trained on, for networks that reading would slow down."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .clip_plan import Bucket


def shrink(clip: torch.Tensor, side: int) -> torch.Tensor:
    """Bring the short side of a clip of bytes `(T, H, W, 3)` to `side`, antialiased."""
    height, width = clip.shape[1:3]
    scale = side / min(height, width)
    shape = (max(side, round(height * scale)), max(side, round(width * scale)))
    parts = [
        F.interpolate(part.movedim(-1, 1).float(), shape, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        for part in clip.split(32)
    ]
    return torch.cat(parts).movedim(1, -1).contiguous()


class ClipStore:
    """Clips on a device as bytes, at several sizes, from which whole batches of random crops are gathered.

    Args:
        clips: `(T, H, W, 3)` uint8 each; pictures are clips of one frame.
        sides: short sides of the copies that are kept; larger than a clip's own are left out.
        device: where they lie.
    """

    def __init__(self, clips: Sequence[torch.Tensor], sides: Sequence[int], device: torch.device):
        kept, rows, offset = [], [], 0
        for clip in clips:
            clip = clip.to(device)
            short = min(clip.shape[1:3])
            copies = [clip] + [shrink(clip, side) for side in sides if side < 0.95 * short]
            for copy in copies:
                frames, height, width = copy.shape[:3]
                # A clip weighs as the root of its length, whatever the number of its copies.
                rows.append([offset, frames, height, width, math.sqrt(len(clip)) / len(copies)])
                offset += frames * height * width
                kept.append(copy.reshape(-1, 3))
        self.pixels = torch.cat(kept)
        self.table = torch.tensor(rows, dtype=torch.float64, device=device)
        self.device = device
        self._suitable: dict[Bucket, tuple[torch.Tensor, torch.Tensor]] = {}

    def suitable(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """Offset, frames, height and width of the copies that are large and long enough, and their weights.

        Raises:
            ValueError: if there is none.
        """
        if bucket not in self._suitable:
            _, frames, height, width, _ = self.table.unbind(1)
            fits = (height >= bucket.height) & (width >= bucket.width) & ((frames >= bucket.num_frames) | (frames == 1))
            if not fits.any():
                raise ValueError(f"bucket {bucket}: no clip is as large and long; choose a smaller size= or frames=")
            self._suitable[bucket] = self.table[fits, :4].long(), self.table[fits, 4].float()
        return self._suitable[bucket]

    def batch(self, bucket: Bucket, static: float = 0.0, jitter: float = 0.0) -> torch.Tensor:
        """Crops at random places, with every frame or every second one, mirrored half of the time, backwards at times.

        Args:
            bucket: the shape; the rates of clips stay what they are.
            static: part of the clips that stand still, as pictures do.
            jitter: part of the clips whose colours are changed.

        Returns:
            `(B, 3, T, H, W)` in [-1, 1], `channels_last_3d`.
        """
        geometry, weights = self.suitable(bucket)
        offset, length, height, width = geometry[torch.multinomial(weights, bucket.batch_size, replacement=True)].unbind(1)
        u = torch.rand(8, bucket.batch_size, device=self.device)
        steps = bucket.num_frames - 1
        pace = 1 + (u[0] < 0.35).long()
        pace = torch.where(length - 1 >= pace * steps, pace, (length > 1).long())
        pace = torch.where(u[1] < static, 0, pace)
        start = (u[2] * (length - pace * steps)).long()
        backwards = u[3] < 0.25
        start, pace = torch.where(backwards, start + pace * steps, start), torch.where(backwards, -pace, pace)
        top, left = (u[4] * (height - bucket.height + 1)).long(), (u[5] * (width - bucket.width + 1)).long()

        frame = start[:, None] + pace[:, None] * torch.arange(bucket.num_frames, device=self.device)
        row = top[:, None] + torch.arange(bucket.height, device=self.device)
        along = torch.arange(bucket.width, device=self.device)
        column = left[:, None] + torch.where((u[6] < 0.5)[:, None], along, along.flip(0))
        line = (frame[:, :, None] * height[:, None, None] + row[:, None]) * width[:, None, None] + offset[:, None, None]
        video = self.pixels[line[..., None] + column[:, None, None]].float() / 127.5 - 1  # (B, T, H, W, 3)
        changed = (u[7] < jitter).view(-1, 1, 1, 1, 1)
        return torch.where(changed, recoloured(video), video).movedim(-1, 1)


def recoloured(video: torch.Tensor) -> torch.Tensor:
    """Change saturation, contrast, brightness and the channels' balance of every clip `(B, T, H, W, 3)` at random."""
    u = torch.rand(len(video), 6, device=video.device).sub_(0.5).view(-1, 1, 1, 1, 6)
    grey = video.mean(-1, keepdim=True)
    video = grey + (video - grey) * (1 + u[..., 0:1])
    gain = (0.6 * u[..., 1:2]).exp() * (0.3 * u[..., 2:5]).exp()
    return (video * gain + 0.4 * u[..., 5:6]).clamp(-1, 1)
