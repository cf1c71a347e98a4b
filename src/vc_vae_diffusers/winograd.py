"""Temporal Winograd convolution: several output frames of a 3-tap temporal convolution from fewer 2-D convolutions.

F(m, 3) gives m consecutive frames from m + 2 two-dimensional convolutions of linear combinations of m + 2 frames, where the
direct way needs 3m: F(4, 3) for groups of 4 frames, F(2, 3) for groups of 2 (Toom and Cook's interpolation, used for
convolutions by Winograd and for networks by Lavin and Gray, 2015; here along time alone). Not in the paper: it changes how
an operator is evaluated, and results by rounding only.

The points of interpolation are 0, 1, -1 and infinity for F(2, 3), as usual. F(4, 3) interpolates at 0, 3/4, -3/4, 3/2, -3/2
and infinity instead of the usual 0, 1, -1, 2, -2: an output frame weighs the products by powers of the points, and with
these no frame's rounding stands out. Transforms are matrix products, which sum in float32 whatever the dtype. Together
that makes F(4, 3) good enough for bfloat16 (`tests/test_tdc.py` measures it, docs/performance.md has the figures).
"""

from collections.abc import Sequence
from functools import cache

import torch

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


def polynomial(roots: Sequence[float]) -> list[float]:
    """Coefficients of the monic polynomial with these roots, the constant one first."""
    coefficients = [1.0]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)]
    return coefficients


@cache
def matrices(outputs: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """The transforms of F(m, 3), m outputs: of frames `(m+2, m+2)`, of kernel slices `(m+2, 3)`, of products `(m, m+2)`.

    Raises:
        ValueError: for another number of outputs than 2 and 4.
    """
    if outputs not in POINTS:
        raise ValueError(f"outputs is {outputs}: pass one of {sorted(POINTS)}")
    points = POINTS[outputs]
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


def combine(matrix: Sequence[Sequence[float]], parts: torch.Tensor) -> torch.Tensor:
    """Linear combinations of `parts`, `(columns, ...)` to `(rows, ...)`."""
    return (parts.new_tensor(matrix) @ parts.flatten(1)).unflatten(1, parts.shape[1:])


def transform_kernel(kernel: torch.Tensor, outputs: int) -> torch.Tensor:
    """Map a plain kernel `(out, in, 3, k, k)` to the 2-D kernels `(outputs + 2, out, in, k, k)` of F(outputs, 3).

    Sums are made in float32 at least, and the result is of the kernel's dtype.
    """
    slices = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    slices = slices.permute(2, 0, 3, 4, 1).contiguous()  # channels last, which is how 2-D convolutions are fastest
    return combine(matrices(outputs)[1], slices).permute(0, 1, 4, 2, 3).to(kernel.dtype)


def transform_bias(bias: torch.Tensor, outputs: int) -> torch.Tensor:
    """Split a bias `(out,)` into those of the products, `(outputs + 2, out)`, which add up to it in every output frame."""
    frames, kernel, _ = matrices(outputs)
    shares = [sum(row) * weights[0] for row, weights in zip(frames, kernel, strict=True)]  # of a kernel's effect on ones
    return bias.new_tensor(shares)[:, None] * bias


def transform_frames(before: torch.Tensor, frames: torch.Tensor, outputs: int, replicate: bool) -> list[torch.Tensor]:
    """Combine neighbouring frames into the inputs of the `outputs + 2` products.

    Args:
        before: the frame before the tile, of any shape.
        frames: the `outputs` frames of the tile and the one after it, `(outputs + 1, ...)`; or without the last one, which
            is missing then.
        outputs: m of F(m, 3).
        replicate: whether the frame before stands for a missing one; it is zero otherwise.
    """
    (weight, *_), *_ = rows = matrices(outputs)[0]
    matrix = [row[1:] for row in rows]
    if len(frames) == outputs:
        matrix = [[*row[:-2], row[-2] + row[-1] if replicate else row[-2]] for row in matrix]
    first, *others = combine(matrix, frames)
    return [torch.add(first, before, alpha=weight), *others]  # 0 is a point, and so no other product sees the frame before


def combine_products(products: Sequence[torch.Tensor], outputs: int) -> torch.Tensor:
    """Combine the `outputs + 2` convolved inputs into the output frames, `(outputs, ...)`."""
    return combine(matrices(outputs)[2], torch.stack(list(products)))
