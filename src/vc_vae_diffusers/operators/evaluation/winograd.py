"""Temporal Winograd convolution: four output frames of a 3-tap temporal convolution from six 2-D convolutions.

F(4, 3) gives 4 consecutive frames from 2-D convolutions of 6 linear combinations of 6 frames, where the direct way needs 12
(Toom and Cook's interpolation, used for convolutions by Winograd and for networks by Lavin and Gray, 2015; here along time
alone). Not in the paper: it changes how an operator is evaluated, and results by rounding only.

The points of interpolation are 0, 3/4, -3/4, 3/2, -3/2 and infinity instead of the usual 0, 1, -1, 2, -2: an output frame
weighs the products by powers of the points, and with these no frame's rounding stands out. Transforms are matrix products,
which sum in float32 whatever the dtype. Together that makes F(4, 3) good enough for bfloat16 (`tests/operators` measures it,
docs/performance.md has the figures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..neighbours import Group
from .packing import FrameConv
from .tiles import Algorithm, Matrix, Tiles, combine, few_pixels
from .way import Way

if TYPE_CHECKING:
    from ..tdc import GroupCausalConv3d, TemporalConv3d


@dataclass(frozen=True)
class FourFrames(Way["GroupCausalConv3d", tuple[FrameConv, ...]]):
    """F(4, 3) along time, for groups of four frames or a multiple of it.

    Args:
        always: also for few pixels and on other devices than CPUs, where it was measured to be faster.
    """

    always: bool = False

    @staticmethod
    def points() -> tuple[float, ...]:
        """Those of interpolation, 0 the first one and infinity one more. The compiler takes attributes for inputs."""
        return 0.0, 0.75, -0.75, 1.5, -1.5

    def algorithm(self, layer: "TemporalConv3d", group: int) -> Algorithm:
        """The maps over time; a group's last frame, or zeros, stand for the frame after it."""
        return four_frames(layer.temporal_padding if group == 4 else "given", self.points())

    def fits(self, layer: "TemporalConv3d", group: int) -> bool:
        """Whether groups are made of tiles."""
        return isinstance(layer.neighbours, Group) and group % 4 == 0

    def serves(self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return self.fits(layer, group) and (self.always or not few_pixels(layer, x, group))

    def kernels(self, layer: "GroupCausalConv3d") -> tuple[FrameConv, ...]:
        """Six 2-D kernels, summed in float32 at least. The bias is split so that it comes to itself in every frame."""
        kernel, padding = layer.plain_kernel(), layer.padding[1]
        of_frames, of_kernel, _ = matrices(self.points())
        slices = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        slices = slices.permute(2, 0, 3, 4, 1).contiguous()  # channels last, which is how 2-D convolutions are fastest
        weights = combine(of_kernel, slices).permute(0, 1, 4, 2, 3).to(kernel.dtype)
        if layer.bias is None:
            return tuple(FrameConv(weight, padding=padding) for weight in weights)
        # A bias is the effect of a first slice on frames of ones.
        shares = [sum(row) * slices[0] for row, slices in zip(of_frames, of_kernel, strict=True)]
        return tuple(
            FrameConv(weight, share * layer.bias, padding=padding) for weight, share in zip(weights, shares, strict=True)
        )

    def __call__(
        self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        tiles, algorithm = Tiles.cut(layer.neighbours, x, past, group, size=4), self.algorithm(layer, group)
        frames = tiles.frames if tiles.after is None else torch.cat([tiles.frames, tiles.after[None]])
        return tiles.join(convolve(layer.kernels(self), algorithm, tiles.before, frames))


@cache
def four_frames(after: str, points: tuple[float, ...]) -> Algorithm:
    """F(4, 3); the frame after the tile is `"given"`, missing and replaced by the last (`"replicate"`), or `"zeros"`."""
    frames, kernel, products = matrices(points)
    if after == "replicate":
        frames = [[*row[:-2], row[-2] + row[-1]] for row in frames]
    elif after == "zeros":
        frames = [row[:-1] for row in frames]
    return Algorithm(frames, kernel, products)


def polynomial(roots: Sequence[float]) -> list[float]:
    """Coefficients of the monic polynomial with these roots, the constant one first."""
    coefficients = [1.0]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)]
    return coefficients


@cache
def matrices(points: tuple[float, ...]) -> tuple[Matrix, Matrix, Matrix]:
    """The transforms of F(m, 3) for m + 1 points, infinity being one more.

    Of frames, `(m+2, m+2)`; of the slices of a kernel, `(m+2, 3)`; and of products, `(m, m+2)`.
    """
    outputs = len(points) - 1
    frames, kernel = [], []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = 1.0
        for other in others:
            scale *= point - other
        frames.append([*polynomial(others), 0.0])
        kernel.append([point**k / scale for k in range(3)])
    frames.append(polynomial(points))
    kernel.append([0.0, 0.0, 1.0])
    products = [[point**k for point in points] + [float(k == outputs - 1)] for k in range(outputs)]
    return frames, kernel, products


def transform_frames(algorithm: Algorithm, before: torch.Tensor, frames: torch.Tensor) -> list[torch.Tensor]:
    """Combine neighbouring frames into the inputs of the six convolutions.

    Args:
        algorithm: `four_frames`.
        before: the frame before the tile, of any shape.
        frames: the four frames of the tile, and the one after it if the algorithm takes it, `(4 or 5, ...)`.
    """
    first, *others = combine([row[1:] for row in algorithm.frames], frames)
    # 0 is a point, and so no other product sees the frame before.
    return [torch.add(first, before, alpha=algorithm.frames[0][0]), *others]


def convolve(kernels: Sequence[FrameConv], algorithm: Algorithm, before: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Convolve the four frames of tiles to `(4, ..., H, W, C_out)`. Arguments: `transform_frames`."""
    inputs = transform_frames(algorithm, before, frames)
    if torch.is_grad_enabled():
        products = [kernel(x) for kernel, x in zip(kernels, inputs, strict=True)]
        return combine(algorithm.products, torch.stack(products))
    # The first product goes into the first output frame alone, the last one into the last: they are added in place.
    products = [kernel(x) for kernel, x in zip(kernels[1:-1], inputs[1:-1], strict=True)]
    y = combine([row[1:-1] for row in algorithm.products], torch.stack(products))
    kernels[0].add_to(y[0], inputs[0])
    kernels[-1].add_to(y[-1], inputs[-1])
    return y
