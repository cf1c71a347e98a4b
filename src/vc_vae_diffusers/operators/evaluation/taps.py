"""Fewer taps than the kernel has, where what they would multiply is known: in static clips and at the ends of groups."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..frames import shifted
from ..neighbours import Group, Pairs
from .packing import FrameConv
from .way import Way

if TYPE_CHECKING:
    from ..tdc import GroupCausalConv3d, TemporalConv3d


def frame_kernels(kernel: torch.Tensor) -> torch.Tensor:
    """Cut `(out, in, slices, k, k)` into 2-D kernels `(slices, out, in, k, k)`, each dense in `channels_last`."""
    return kernel.permute(2, 0, 3, 4, 1).contiguous().permute(0, 1, 4, 2, 3)


def two_taps(layer: "TemporalConv3d") -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels of a frame's past and its own where nothing follows it, each `(out, in, k, k)`."""
    if len(layer.slices) == 2 or layer.temporal_padding == "zeros":
        past, current, *_ = layer.plain_kernel().unbind(2)
        return past, current
    past, current, future = layer.weight.unbind(2)
    # The frame stands for the one after it: the difference to it is zero, or its kernel is one of the frame's.
    return (past, current - past) if layer.differences else (past, current + future)


@dataclass(frozen=True)
class Static(Way["TemporalConv3d", tuple[FrameConv]]):
    """One frame that stands for a static clip: every difference is zero, and a 2-D convolution by the anchor is all."""

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return x.shape[2] == 1 and past is None

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv]:
        if layer.temporal_padding == "zeros":
            kernel = layer.plain_kernel()[:, :, layer.anchor]
        elif layer.differences:
            kernel = layer.weight[:, :, layer.anchor]
        else:
            kernel = layer.weight.sum(2)
        return (FrameConv(kernel, layer.bias, padding=layer.padding[1]),)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (convolution,) = layer.kernels(self)
        return convolution(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class TwoTaps(Way["TemporalConv3d", tuple[FrameConv, FrameConv]]):
    """Two 2-D convolutions, of a frame and its past, where it has no future: in pairs, and in groups of one."""

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return isinstance(layer.neighbours, Pairs) or (isinstance(layer.neighbours, Group) and group == 1)

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv, FrameConv]:
        past, current = frame_kernels(torch.stack(two_taps(layer), dim=2))
        padding = layer.padding[1]
        return FrameConv(past, padding=padding), FrameConv(current, layer.bias, padding=padding)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        neighbours = layer.neighbours
        if isinstance(neighbours, Pairs):
            before, current = neighbours.clips(x, past, group).unflatten(2, (-1, 2)).unbind(3)
        else:
            before, current = shifted(neighbours.before(x, past), x), x
        of_past, of_current = layer.kernels(self)
        return of_past.add_to(of_current(current.movedim(1, -1)), before.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class GroupEnds(Way["GroupCausalConv3d", tuple[torch.Tensor, FrameConv, FrameConv]]):
    """Three taps for all frames of a group but its last one, which takes two."""

    def serves(self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return isinstance(layer.neighbours, Group) and group > 1

    def kernels(self, layer: "GroupCausalConv3d") -> tuple[torch.Tensor, FrameConv, FrameConv]:
        return layer.plain_kernel(), *TwoTaps().kernels(layer)

    def __call__(
        self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        kernel, of_past, of_current = layer.kernels(self)
        windows = layer.neighbours.windows(x, past, group)  # (B * n, C, group + 1, H, W)
        inner = F.conv3d(windows, kernel, layer.bias, layer.stride, layer.padding)
        before, current = (windows[:, :, t].unsqueeze(1).movedim(2, -1) for t in (-2, -1))  # (B * n, 1, H, W, C)
        last = of_past.add_to(of_current(current), before).movedim(-1, 1)
        return layer.neighbours.frames(torch.cat([inner, last], dim=2), x.shape[0])
