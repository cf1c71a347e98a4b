"""The definition: one convolution of the neighbourhoods by the plain kernel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .way import Way

if TYPE_CHECKING:
    from ..tdc import TemporalConv3d


@dataclass(frozen=True)
class Direct(Way["TemporalConv3d", tuple[torch.Tensor]]):
    """Lay out the neighbours of every frame and convolve them: Eq. 1, 2, 5, 6 and 7 as they stand."""

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return True

    def kernels(self, layer: "TemporalConv3d") -> tuple[torch.Tensor]:
        return (layer.plain_kernel(),)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        y = self.convolve(layer, layer.neighbours.clips(x, past, group))
        return layer.neighbours.frames(y, x.shape[0])

    def convolve(self, layer: "TemporalConv3d", clips: torch.Tensor) -> torch.Tensor:
        """The plain convolution, without temporal padding."""
        (kernel,) = layer.kernels(self)
        return F.conv3d(clips, kernel, layer.bias, layer.stride, layer.padding)
