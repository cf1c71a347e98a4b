"""How the frames of a clip or a stream make whole groups, and which of the decoded ones belong to it (Sec. 3.4, Table 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrameGroups:
    """The arithmetic of frame counts.

    Args:
        size: frames that become one latent frame, the temporal compression.
        first_frame, frame_convention: see `AutoencoderKLVCVAE`.
    """

    size: int
    first_frame: str
    frame_convention: str

    @property
    def alone(self) -> int:
        """How many frames at the start are no part of a group."""
        return 1 if self.first_frame == "separate" else 0

    @property
    def front_padded(self) -> bool:
        """Whether missing frames are repeated at the start, not at the end; a stream must then know its length."""
        return self.first_frame == "in_sequence" and self.frame_convention == "4k+1"

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames a clip of `num_frames` becomes."""
        return self.alone + -(-(num_frames - self.alone) // self.size)

    def total(self, latent_frames: int) -> int:
        """How many frames, repeated ones among them, are in so many latent frames from the start of a clip."""
        return self.alone + self.size * (latent_frames - self.alone)

    def frames(self, latent_frames: int) -> int:
        """How many frames `decode` makes of latent frames without `num_frames`: a length of clips that repeats no frame."""
        return self.kept(self.total(latent_frames), None)[1]

    def missing(self, num_frames: int) -> int:
        """How many frames are repeated to make whole groups of `num_frames`."""
        return self.total(self.latent_frames(num_frames)) - num_frames

    def kept(self, total: int, num_frames: int | None) -> tuple[int, int]:
        """How many of `total` decoded frames are dropped at the start, and how many are kept then.

        Raises:
            ValueError: if `num_frames` is not the length of a clip that becomes `total` frames.
        """
        # How often "4k+1" repeated the first frame follows from the clip's own length: another one would cut real frames.
        fewest = total - self.size + 1 if self.front_padded else 1
        if num_frames is not None and not fewest <= num_frames <= total:
            raise ValueError(
                f"num_frames is {num_frames}, the latents are of a clip of {fewest} to {total} frames: pass its own length, "
                "or None for all"
            )
        if not self.front_padded:
            return 0, total if num_frames is None else num_frames
        skip = self.size - 1 if num_frames is None else total - num_frames
        return skip, total - skip

    def check_chunk(self, num_frames: int, start: bool) -> None:
        """Refuse a chunk of a stream that is not whole groups.

        Raises:
            ValueError: if it is not, with what it must be.
        """
        alone = self.alone if start else 0
        if num_frames < alone or (num_frames - alone) % self.size != 0:
            rule = f"{alone} + {self.size}*n" if alone else f"a multiple of {self.size}"
            raise ValueError(
                f"frames has {num_frames} frames, a chunk must have {rule}: use encode_stream, which takes any lengths, or "
                "encode, which pads the clip"
            )

    def ready(self, pending: int, start: bool, most: int) -> int:
        """How many pending frames of a stream make the next chunk of `most` groups, 0 if no group is complete."""
        if start and self.alone:
            return min(pending, self.alone)
        return min(pending // self.size, most) * self.size

    def chunks(self, count: int, start: bool, most: int | None, latent: bool = False) -> list[int]:
        """Cut frames that make whole groups, or latent frames, into chunks of `most` groups (None: one chunk) each.

        At the start of a clip, a frame that is no part of a group is a chunk by itself.
        """
        alone = self.alone if start else 0
        count -= alone
        size = max(count, 1) if most is None else most * (1 if latent else self.size)
        return [1] * alone + [min(size, count - done) for done in range(0, count, size)]


def repeat_frames(x: torch.Tensor, missing: int, front: bool) -> torch.Tensor:
    """Repeat the first or the last frame of `(B, C, T, H, W)`, as often as frames are missing."""
    if missing == 0:
        return x
    repeated = (x[:, :, :1] if front else x[:, :, -1:]).expand(-1, -1, missing, -1, -1)
    return torch.cat([repeated, x] if front else [x, repeated], dim=2)


def cut(x: torch.Tensor, sizes: Sequence[int], front: bool) -> Iterator[torch.Tensor]:
    """Cut `(B, C, T, H, W)` into chunks of `sizes` frames; those missing are repeated at one end, in its chunk alone."""
    at = x.shape[2] - sum(sizes) if front else 0
    for size in sizes:
        chunk = x[:, :, max(at, 0) : at + size]
        yield repeat_frames(chunk, size - chunk.shape[2], front)
        at += size
