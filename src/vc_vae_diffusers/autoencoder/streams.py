"""Videos of any length, in chunks and in streams, with memory that does not depend on their length (Sec. 3.1).

State is explicit: a cache goes in and the next one comes out.
"""

from collections.abc import Iterable, Iterator

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook

from .blocks import Cache, kept
from .frame_groups import repeat_frames
from .passes import PassesMixin


class StreamsMixin(PassesMixin):
    """Chunks and streams of a model that is none the wiser for them."""

    @apply_forward_hook
    def encode_chunk(self, frames: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        """Encode the next whole groups of a stream. Chunks one after the other give what `encode` gives for the clip.

        Args:
            frames: `(B, C, r_t * n, H, W)`. The first chunk of a stream is of any length with `frame_convention="4k+1"`,
                and `1 + r_t * n` frames with `first_frame="separate"`.
            cache: what the call before returned; None starts a stream. It is not changed.

        Returns:
            Moments `(B, 2 * latent_channels, n, H / r_s, W / r_s)` and the next cache.

        Raises:
            ValueError: for a wrong shape, or frames that do not make whole groups.
        """
        self._check(frames, "frames", encodes=True)
        missing = self.groups.missing(frames.shape[2]) if cache is None and self.groups.front_padded else 0
        self.groups.check_chunk(frames.shape[2] + missing, start=cache is None)
        moments, next_cache = self._encode_frames(frames, kept(cache), missing)
        return moments, kept(next_cache)

    @apply_forward_hook
    def decode_chunk(self, latents: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        """Decode the next latent frames of a stream. Chunks one after the other give what `decode` gives for all of them.

        Args:
            latents: `(B, latent_channels, n, h, w)`, unscaled, n >= 1.
            cache: what the call before returned; None starts a stream. It is not changed.

        Returns:
            Frames `(B, C, r_t * n, H, W)`, fewer at the start of a stream for `"4k+1"` and `"separate"`; the next cache.

        Raises:
            ValueError: for a wrong shape.
        """
        self._check(latents, "latents", encodes=False)
        frames, next_cache = self._decode_frames(latents, kept(cache))
        if cache is None:
            frames = frames[:, :, self.groups.kept(frames.shape[2], None)[0] :]
        return frames, kept(next_cache)

    def encode_stream(
        self, frames: Iterable[torch.Tensor], num_frames: int | None = None
    ) -> Iterator[DiagonalGaussianDistribution]:
        """Encode a stream with memory that does not depend on its length.

        Args:
            frames: chunks `(B, C, t, H, W)` of any lengths.
            num_frames: of the whole stream. Needed only with `frame_convention="4k+1"`, where the frames missing from the
                last group are repeated at the start, unless it is 1 + r_t * k.

        Yields:
            The posterior of every group, as soon as its last frame is there (of several groups, when a chunk completes
            several and `groups_per_chunk` is more than 1).

        Raises:
            ValueError: for an empty stream, a wrong shape, or a stream that is not of `num_frames` frames.
        """
        seen, cache = 0, None
        pending: torch.Tensor | None = None
        for chunk in frames:
            if isinstance(chunk, torch.Tensor) and chunk.ndim == 5 and chunk.shape[2] == 0:
                continue
            self._check(chunk, "frames", encodes=True)
            seen += chunk.shape[2]
            if pending is None and self.groups.front_padded:
                chunk = repeat_frames(chunk, self.groups.missing(1 if num_frames is None else num_frames), front=True)
            pending = chunk if pending is None else torch.cat([pending, chunk], dim=2)
            done = 0
            while (ready := self.groups.ready(pending.shape[2] - done, cache is None, self.groups_per_chunk)) > 0:
                moments, cache = self._next_groups(pending[:, :, done : done + ready], cache)
                done += ready
                yield DiagonalGaussianDistribution(moments)
            pending = pending[:, :, done:].clone()
        if pending is None:
            raise ValueError("frames is an empty stream: pass at least one frame")
        if num_frames is not None and seen != num_frames:
            raise ValueError(f"num_frames is {num_frames}, the stream had {seen} frames: pass the true number")
        if pending.shape[2] > 0:
            if self.groups.front_padded:
                raise ValueError(
                    f"the stream had {seen} frames, not 1 + {self.groups.size}*k as frame_convention '4k+1' takes a stream "
                    "of unknown length to have: pass num_frames"
                )
            pending = repeat_frames(pending, -pending.shape[2] % self.groups.size, front=False)
            yield DiagonalGaussianDistribution(self._next_groups(pending, cache)[0])

    @apply_forward_hook
    def _next_groups(self, frames: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        return self._encode_frames(frames, cache)

    def decode_stream(self, latents: Iterable[torch.Tensor], num_frames: int | None = None) -> Iterator[torch.Tensor]:
        """Decode a stream with memory that does not depend on its length.

        Args:
            latents: chunks `(B, latent_channels, n, h, w)` of any lengths, unscaled.
            num_frames: of the clip that was encoded; None gives all frames, as in `decode`.

        Yields:
            Frames `(B, C, t, H, W)`, `groups_per_chunk` groups at a time, t of them fewer at the ends.

        Raises:
            ValueError: for an empty stream, a wrong shape, or fewer frames than `num_frames`.
        """
        if num_frames is not None and num_frames < 1:
            raise ValueError(
                f"num_frames is {num_frames}, it must be at least 1: pass the length of the clip, or None for all"
            )
        cache, given = None, 0
        for chunk in latents:
            if isinstance(chunk, torch.Tensor) and chunk.ndim == 5 and chunk.shape[2] == 0:
                continue
            self._check(chunk, "latents", encodes=False)
            for part in chunk.split(self.groups_per_chunk, dim=2):
                if given == num_frames:
                    self._check_nothing_follows(num_frames)
                    return
                start = cache is None
                frames, cache = self._next_frames(part, cache)
                if start and self.groups.front_padded:
                    missing = self.groups.missing(1 if num_frames is None else num_frames)
                    frames = frames[:, :, missing:]
                if num_frames is not None:
                    frames = frames[:, :, : num_frames - given]
                given += frames.shape[2]
                if frames.shape[2] > 0:
                    yield frames
        if cache is None:
            raise ValueError("latents is an empty stream: pass at least one latent frame")
        if num_frames is not None and given < num_frames:
            raise ValueError(f"num_frames is {num_frames}, the stream of latents held {given} frames: pass at most that")

    def _check_nothing_follows(self, num_frames: int) -> None:
        if self.groups.front_padded:
            raise ValueError(
                f"num_frames is {num_frames}, the stream holds latents of a longer clip, whose first frame frame_convention "
                "'4k+1' repeated another number of times: pass its own length, or None for all"
            )

    @apply_forward_hook
    def _next_frames(self, latents: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        return self._decode_frames(latents, cache)
