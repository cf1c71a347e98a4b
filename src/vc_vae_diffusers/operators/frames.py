"""Moving frames about: `(B, C, T, H, W)`, of which `channels_last_3d` is the fast layout."""

from collections.abc import Callable, Sequence

import torch


def shifted(past: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The frames before those of x: `past`, then all of x but its last frame."""
    return past if x.shape[2] == 1 else torch.cat([past, x[:, :, :-1]], dim=2)


def interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join n clips `(B, C, T, H, W)` by turns to `(B, C, n * T, H, W)`, in `channels_last_3d`."""
    return torch.stack([part.movedim(1, -1) for part in parts], dim=2).flatten(1, 2).movedim(-1, 1)


def per_frame(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a 2-D function to every frame of `(B, C, T, H, W)`: time folds into the batch (free in `channels_last_3d`)."""
    # Folded with the channels last, an only frame keeps the strides by which PyTorch knows `channels_last`.
    y = function(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1))
    return y.movedim(1, -1).unflatten(0, (x.shape[0], x.shape[2])).movedim(-1, 1)
