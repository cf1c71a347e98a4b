"""Nearest-neighbour upsampling by two and a 3x3 convolution of frames `(N, C, H, W)`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .packing import FrameConv
from .way import Way

if TYPE_CHECKING:
    from ..frame_conv import FrameConv2d


@dataclass(frozen=True)
class OfFrames(Way["FrameConv2d", tuple[FrameConv]]):
    """A 2-D convolution as it stands."""

    def serves(self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return True

    def kernels(self, layer: "FrameConv2d") -> tuple[FrameConv]:
        return (FrameConv(layer.weight, layer.bias, layer.stride[0], layer.padding[0]),)

    def __call__(
        self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (convolution,) = layer.kernels(self)
        return convolution(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Upsampled(OfFrames):
    """Upsampling and convolution one after the other."""

    def __call__(
        self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        return super().__call__(layer, F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class OfDifferences(Way["FrameConv2d", tuple[FrameConv, ...]]):
    """Both at once, at a quarter of the multiplications: Eq. 5 in space, the anchor being the pixel.

    Along one axis, an output pixel sees its own small pixel twice or thrice and one neighbour once or not at all. So the
    convolution is the sum of the kernel's taps on the pixel itself, and its first or last tap on the *difference* of the
    neighbour before or after to it. Along both axes these are nine 1x1 convolutions, which the four outputs of a pixel
    share: of the pixel, of its differences along one axis (two and two), and of the differences along both (four).
    """

    def serves(self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return x.device.type == "cpu" and layer.kernel_size == (3, 3)  # LoRA has layers of the same class and one pixel

    def kernels(self, layer: "FrameConv2d") -> tuple[FrameConv, ...]:
        """Of the pixel; of the differences to left and right; and of those above and below, each alone and to both sides."""
        kernels = []
        for rows in _taps(layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32)), dim=2):
            kernels += _taps(rows, dim=3)
        pixel, *others = (kernel.to(layer.weight.dtype).contiguous() for kernel in kernels)
        return (FrameConv(pixel, layer.bias), *(FrameConv(kernel) for kernel in others))

    def __call__(
        self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        pixel, left, right, above, above_left, above_right, below, below_left, below_right = layer.kernels(self)
        frames = x.movedim(1, -1)
        count, height, width, _ = frames.shape
        across, down = _differences(frames, dim=2), _differences(frames, dim=1)
        both = _differences(across, dim=1)
        own = pixel(frames)
        beside = left(across[:, :, :-1]), right(across[:, :, 1:])
        y = own.new_empty(count, height, 2, width, 2, layer.out_channels)
        for i, (vertical, *diagonal) in enumerate(((above, above_left, above_right), (below, below_left, below_right))):
            row = vertical.add_to(own.clone(), down[:, i : i + height])
            for j, kernel in enumerate(diagonal):
                corner = both[:, i : i + height, j : j + width]
                y[:, :, i, :, j] = kernel.add_to(row + beside[j], corner)
        return y.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _taps(kernel: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """The kernel along `dim`: for the pixel, for its difference to the one before, for that of the one after to it."""
    first, _, last = kernel.split(1, dim)
    return [kernel.sum(dim, keepdim=True), -first, last]


def _differences(frames: torch.Tensor, dim: int) -> torch.Tensor:
    """Between neighbours of `(N, H, W, C)`, one more than there are pixels: around the frame is zero."""
    around = (0, 0, 1, 1) if dim == 2 else (0, 0, 0, 0, 1, 1)
    return F.pad(frames, around).diff(dim=dim)
