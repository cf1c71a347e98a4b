"""2-D convolutions of frames `(N, C, H, W)` that can be fused, with the contract of `nn.Conv2d`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .evaluation import FRAMES, UPSAMPLING, Way, choose, evaluate
from .evaluation.fusing import KernelLayer


class FrameConv2d(KernelLayer, nn.Conv2d):
    """`nn.Conv2d` for square kernels, that can be fused."""

    ways: Sequence[Way] = FRAMES
    stride: tuple[int, int]
    padding: tuple[int, int]

    def inference_ways(self) -> Sequence[Way]:
        return (choose(self, self.weight),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return evaluate(self, x)


class PointConv2d(nn.Conv2d):
    """`nn.Conv2d` for kernels of one pixel. On GPUs it is a matrix product, whose bias costs no pass over memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return super().forward(x)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class UpsampledConv2d(FrameConv2d):
    """A 3x3 convolution of frames that nearest-neighbour upsampling by two comes before: see `upsample`."""

    ways = UPSAMPLING

    def forward(self, x: torch.Tensor, upsampled: bool = False) -> torch.Tensor:
        """Convolve `(N, C, H, W)` as `nn.Conv2d` does; or `upsampled`, to `(N, C_out, 2 * H, 2 * W)`."""
        return evaluate(self, x) if upsampled else F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def upsample(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Upsample frames `(N, C, H, W)` by two and convolve them with any layer that has the contract of `nn.Conv2d`."""
    if isinstance(conv, UpsampledConv2d):
        return conv(x, upsampled=True)
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
