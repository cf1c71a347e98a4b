"""Tiles of consecutive frames, and how fewer convolutions than taps make the frames of a tile."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import is_fake

from ..frames import shifted
from ..neighbours import Neighbours

if TYPE_CHECKING:
    from ..tdc import GroupCausalConv3d

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Algorithm:
    """How outputs of a 3-tap convolution come from K products of a combination of frames and one of the kernel's slices.

    Args:
        frames: `(K, J)`, of the frame before a tile, the tile's frames, and the one after it if that is not made of them.
        kernel: `(L, 3)`, for the first products; the last of these L kernels serves all the others as well.
        products: `(T, K)`, for the T frames of a tile.
    """

    frames: Matrix
    kernel: Matrix
    products: Matrix


def combine(matrix: Matrix, parts: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Linear combinations of `parts`, `(columns, ...)` to `(rows, ...)`, written into `out` if there is one."""
    if torch.compiler.is_compiling() or is_fake(parts):
        factors = parts.new_tensor(matrix)  # of this trace
    else:
        factors = constant(tuple(map(tuple, matrix)), parts.dtype, parts.device)
    if out is None:
        return (factors @ parts.flatten(1)).unflatten(1, parts.shape[1:])
    torch.mm(factors, parts.flatten(1), out=out.view(len(out), -1))
    return out


@cache
def constant(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix on a device, made once: on GPUs the copy would make the program wait, and cannot be recorded in a graph."""
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=dtype, device=device)


@dataclass(frozen=True)
class Tiles:
    """A chunk of groups in tiles, channels last.

    Args:
        before: the frame before each tile, `(B, tiles, H, W, C)`.
        frames: the frames of the tiles, `(size, B, tiles, H, W, C)`.
        after: the frame after each tile, of `before`'s shape; None where groups are tiles, and it is missing.
    """

    before: torch.Tensor
    frames: torch.Tensor
    after: torch.Tensor | None

    @classmethod
    def cut(cls, neighbours: Neighbours, x: torch.Tensor, past: torch.Tensor | None, group: int, size: int) -> "Tiles":
        """Cut groups of `group` frames into tiles of `size`."""
        frames = x.movedim(1, -1).unflatten(1, (-1, size)).movedim(2, 0)
        first, last = (frame.movedim(-1, 1) for frame in (frames[0], frames[-1]))
        before = shifted(neighbours.before(x, past), last).movedim(1, -1)
        after = None if group == size else _following(neighbours, first, last, group // size).movedim(1, -1)
        return cls(before, frames, after)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """Join the outputs of tiles, `(size, B, tiles, H, W, C_out)`, to a chunk `(B, C_out, T, H, W)`."""
        return y.movedim(0, 2).flatten(1, 2).movedim(-1, 1)


def _following(neighbours: Neighbours, first: torch.Tensor, last: torch.Tensor, count: int) -> torch.Tensor:
    """The frame after each tile: the first of the next one; it is missing after every `count`-th, a group's last."""
    missing = neighbours.missing(last).unflatten(2, (-1, count))
    following = torch.cat([first[:, :, 1:], first[:, :, :1]], dim=2).unflatten(2, (-1, count))
    return torch.cat([following[:, :, :, :-1], missing[:, :, :, -1:]], dim=3).flatten(2, 3)


def few_pixels(layer: "GroupCausalConv3d", x: torch.Tensor, group: int) -> bool:
    """Whether other than direct evaluation pays not: it was measured on CPUs, for kernels that are fused or enough frames.

    Computing other kernels takes as long as convolving a few small frames.
    """
    return x.device.type != "cpu" or not (layer.keeps_kernels or group * x[0, 0, 0].numel() >= 1024)
