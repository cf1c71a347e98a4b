"""Which frames an operator sees, and what stands in for those that do not exist.

The equations are convolutions of a frame's neighbourhood. `clips` lays the neighbourhoods of a chunk out, so that one
convolution without temporal padding answers all of them: any layer with the contract of `nn.Conv3d` can be put in an
operator's place. State is explicit: `past` holds the frames of the chunk before that the next one needs, None at the start.

Tensors are `(B, C, T, H, W)`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Neighbours:
    """What the kinds of neighbourhoods share.

    Args:
        padding: `"replicate"` puts the nearest existing frame in the place of a missing one, so that a difference that
            cannot be formed is zero (Sec. 3.3; the choice is not in the paper). `"zeros"` is what IV-VAE does.

    Raises:
        ValueError: for an unknown padding.
    """

    padding: str = "replicate"
    size = 1  # frames a group

    def __post_init__(self) -> None:
        if self.padding not in ("replicate", "zeros"):
            raise ValueError(f"temporal_padding is {self.padding!r}: pass 'replicate' or 'zeros'")

    def missing(self, nearest: torch.Tensor) -> torch.Tensor:
        """What stands in for a frame that does not exist, given the nearest one that does."""
        return nearest if self.padding == "replicate" else torch.zeros_like(nearest)

    def group(self, x: torch.Tensor) -> int:
        """How many frames of a chunk see each other.

        Raises:
            ValueError: if the chunk does not hold whole groups.
        """
        raise NotImplementedError

    def before(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        """The frames before the chunk that it needs: `past`, or what stands in for it at the start; here none."""
        return x[:, :, :0]

    def clips(self, x: torch.Tensor, past: torch.Tensor | None, group: int) -> torch.Tensor:
        """Lay out the neighbourhoods: clips whose convolution without temporal padding is the operator's result."""
        raise NotImplementedError

    def frames(self, y: torch.Tensor, batch: int) -> torch.Tensor:
        """Join what the convolution made of `clips` to the chunk's result, of `batch` clips again."""
        return y

    def state(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor | None:
        """The `past` of the next chunk: a copy, so that it keeps no chunk alive."""
        return None


@dataclass(frozen=True)
class Causal(Neighbours):
    """A frame sees itself and the two before it (Eq. 1, 7): it is a group of its own."""

    def group(self, x: torch.Tensor) -> int:
        return 1

    def before(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([self.missing(x[:, :, :1])] * 2, dim=2) if past is None else past

    def clips(self, x: torch.Tensor, past: torch.Tensor | None, group: int) -> torch.Tensor:
        return torch.cat([self.before(x, past), x], dim=2)

    def state(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        last = x[:, :, -2:] if x.shape[2] > 1 else torch.cat([self.before(x, past)[:, :, 1:], x], dim=2)
        return last.clone(memory_format=torch.channels_last_3d)


@dataclass(frozen=True)
class Group(Neighbours):
    """A frame sees its neighbours in its group and the last frame of the group before (Eq. 2, 5).

    Args:
        size: frames a group; a chunk of fewer frames than one group is one short group.
    """

    size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"group_size is {self.size}, it must be at least 1: pass the frames of one group")

    def group(self, x: torch.Tensor) -> int:
        frames = x.shape[2]
        group = min(self.size, frames)
        if frames % group != 0:
            raise ValueError(
                f"x has {frames} frames, not a multiple of group_size {group}: pass whole groups (repeat the last frame)"
            )
        return group

    def before(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        return self.missing(x[:, :, :1]) if past is None else past

    def clips(self, x: torch.Tensor, past: torch.Tensor | None, group: int) -> torch.Tensor:
        """Windows of the frame before a group, its frames, and what stands in for the one after its last."""
        windows = self.windows(x, past, group)
        return torch.cat([windows, self.missing(windows[:, :, -1:])], dim=2)

    def windows(self, x: torch.Tensor, past: torch.Tensor | None, group: int) -> torch.Tensor:
        """The frame before each group and its frames, `(B * n, C, group + 1, H, W)`, channels last."""
        _, channels, _, height, width = x.shape
        windows = torch.cat([self.before(x, past), x], dim=2).unfold(2, group + 1, group)  # (B, C, n, H, W, group + 1)
        return windows.permute(0, 2, 5, 3, 4, 1).reshape(-1, group + 1, height, width, channels).movedim(-1, 1)

    def frames(self, y: torch.Tensor, batch: int) -> torch.Tensor:
        _, channels, _, height, width = y.shape
        y = y.movedim(1, -1).reshape(batch, -1, height, width, channels)
        return y.movedim(-1, 1)

    def state(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        return x[:, :, -1:].clone(memory_format=torch.channels_last_3d)


@dataclass(frozen=True)
class Pairs(Neighbours):
    """The later frame of a pair sees the earlier one (Eq. 6); a single frame is its own past. Pairs never cross a chunk."""

    size = 2

    def group(self, x: torch.Tensor) -> int:
        if x.shape[2] != 1 and x.shape[2] % 2 != 0:
            raise ValueError(f"x has {x.shape[2]} frames, it must be an even number (or 1): repeat the last frame")
        return min(x.shape[2], 2)

    def clips(self, x: torch.Tensor, past: torch.Tensor | None, group: int) -> torch.Tensor:
        return torch.cat([self.missing(x), x], dim=2) if group == 1 else x
