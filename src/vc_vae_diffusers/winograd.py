"""Temporal Winograd convolution: four output frames of a 3-tap temporal convolution from six 2-D convolutions.

F(4, 3) gives 4 consecutive frames from 2-D convolutions of 6 linear combinations of 6 frames, where the direct way needs 12
(Toom and Cook's interpolation, used for convolutions by Winograd and for networks by Lavin and Gray, 2015; here along time
alone). Not in the paper: it changes how an operator is evaluated, and results by rounding only.

The points of interpolation are 0, 3/4, -3/4, 3/2, -3/2 and infinity instead of the usual 0, 1, -1, 2, -2: an output frame
weighs the products by powers of the points, and with these no frame's rounding stands out. Transforms are matrix products,
which sum in float32 whatever the dtype. Together that makes F(4, 3) good enough for bfloat16 (`tests/test_tdc.py` measures
it, docs/performance.md has the figures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .frame_conv import FrameConv

OUTPUTS = 4
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)

Matrix = Sequence[Sequence[float]]


def polynomial(roots: Sequence[float]) -> list[float]:
    """Coefficients of the monic polynomial with these roots, the constant one first."""
    coefficients = [1.0]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)]
    return coefficients


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


# A group of two, where the last frame stands for the one after it: see `GroupCausalConv3d.convolve_pair`.
PAIR = Algorithm(
    frames=((0.0, 0.0, 1.0), (0.0, 1.0, -1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    kernel=((0.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
    products=((1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0)),
)


def four_frames(after: str) -> Algorithm:
    """F(4, 3); the frame after the tile is `"given"`, missing and replaced by the last (`"replicate"`), or `"zeros"`."""
    frames, kernel, products = matrices(POINTS)
    if after == "replicate":
        frames = [[*row[:-2], row[-2] + row[-1]] for row in frames]
    elif after == "zeros":
        frames = [row[:-1] for row in frames]
    return Algorithm(frames, kernel, products)


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


def combine(matrix: Matrix, parts: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Linear combinations of `parts`, `(columns, ...)` to `(rows, ...)`, written into `out` if there is one."""
    if out is None:
        return (parts.new_tensor(matrix) @ parts.flatten(1)).unflatten(1, parts.shape[1:])
    torch.mm(parts.new_tensor(matrix), parts.flatten(1), out=out.view(len(out), -1))
    return out


def transform_kernel(kernel: torch.Tensor, bias: torch.Tensor | None, padding: int) -> tuple[FrameConv, ...]:
    """Map a plain kernel `(out, in, 3, k, k)` to the six 2-D convolutions of F(4, 3).

    Sums are made in float32 at least; the results are of the kernel's dtype. The bias is split so that it comes to itself
    in every output frame.
    """
    of_frames, of_kernel, _ = matrices(POINTS)
    slices = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    slices = slices.permute(2, 0, 3, 4, 1).contiguous()  # channels last, which is how 2-D convolutions are fastest
    weights = combine(of_kernel, slices).permute(0, 1, 4, 2, 3).to(kernel.dtype)
    if bias is None:
        return tuple(FrameConv(weight, padding=padding) for weight in weights)
    # A bias is the effect of a first slice on frames of ones.
    shares = [sum(row) * slices[0] for row, slices in zip(of_frames, of_kernel, strict=True)]
    return tuple(FrameConv(weight, share * bias, padding=padding) for weight, share in zip(weights, shares, strict=True))


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
