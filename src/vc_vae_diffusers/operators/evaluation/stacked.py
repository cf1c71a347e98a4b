"""Neighbours in the channels: for training on a GPU, where convolutions of few channels leave it idle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..neighbours import Group
from .packing import FrameConv
from .way import Way

if TYPE_CHECKING:
    from ..tdc import TemporalConv3d


@dataclass(frozen=True)
class Stacked(Way["TemporalConv3d", tuple[FrameConv]]):
    """One 2-D convolution of every frame, stacked with its neighbours, or with its differences to them (Eq. 5 as it stands).

    Differences of frames that are alike are small and keep their digits in bfloat16, which a plain kernel's sum does not. It
    costs the memory of three inputs, and is in no list: give it to a layer by `layer.ways = (Stacked(), *layer.ways)`.
    """

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return isinstance(layer.neighbours, Group) and len(layer.slices) == 3 and group > 1

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv]:
        return (FrameConv(layer.weight.movedim(2, 1).flatten(1, 2), layer.bias, padding=layer.padding[1]),)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        clips = layer.neighbours.clips(x, past, group).movedim(1, -1)  # (B * n, group + 2, H, W, C)
        before, current, after = clips[:, :-2], clips[:, 1:-1], clips[:, 2:]
        if layer.differences:
            before, after = before - current, after - current
        (convolution,) = layer.kernels(self)
        y = convolution(torch.cat([before, current, after], dim=-1))
        return layer.neighbours.frames(y.movedim(-1, 1), x.shape[0])
