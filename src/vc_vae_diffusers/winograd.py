"""Temporal Winograd convolution: several output frames of a 3-tap temporal convolution from fewer 2-D convolutions.

F(m, 3) gives m consecutive frames from m + 2 two-dimensional convolutions of linear combinations of m + 2 frames, where the
direct way needs 3m. Groups of 4 and 2 frames are its tiles F(4, 3) and F(2, 3) (Lavin and Gray, 2015, along time alone).
Not in the paper: it changes how an operator is evaluated, and results by rounding only. Interpolation points are 0, 1, -1
(and 2, -2 for F(4, 3)) and infinity; every combination below is written with few passes over a frame. Relative errors in
float32 are 2e-6 for F(2, 3), 6e-6 for F(4, 3) and 2e-6 directly; in bfloat16 7e-3, 3e-2 and 4e-3, which is why F(4, 3) is
for float32 alone.
"""

import torch

# This product enters every output once, so that its convolution can carry the bias.
BIASED_PRODUCT = 1


def transform_kernel(kernel: torch.Tensor, outputs: int) -> torch.Tensor:
    """Map a plain kernel `(out, in, 3, k, k)` to the 2-D kernels `(outputs + 2, out, in, k, k)` of F(outputs, 3).

    Sums are made in float32 at least, and the result is of the kernel's dtype.
    """
    dtype = kernel.dtype
    kernel = kernel.to(torch.promote_types(dtype, torch.float32))
    past, middle, future = kernel.permute(2, 0, 3, 4, 1)  # channels last, which is how 2-D convolutions are fastest
    if outputs == 2:
        even, odd = (past + future) / 2, middle / 2
        products = [past, even + odd, even - odd, future]
    else:
        even, odd = (past + future) / -6, middle / -6
        even2, odd2 = past / 24 + future / 6, middle / 12
        products = [past / 4, even + odd, even - odd, even2 + odd2, even2 - odd2, future]
    return torch.stack(products).permute(0, 1, 4, 2, 3).to(dtype)


def transform_frames(frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """Combine `outputs + 2` neighbouring frames into the inputs of the products. Frames are of any one shape."""
    if len(frames) == 4:
        d0, d1, d2, d3 = frames
        return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]
    d0, d1, d2, d3, d4, d5 = frames
    even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    even2, odd2 = d4 - d2, d3 - d1
    return [
        torch.add(even2, d0 - d2, alpha=4),
        even + odd,
        even - odd,
        torch.add(even2, odd2, alpha=2),
        torch.sub(even2, odd2, alpha=2),
        torch.sub(d5 - d3, odd2, alpha=4),
    ]


def combine_products(products: list[torch.Tensor]) -> list[torch.Tensor]:
    """Combine the `outputs + 2` convolved inputs into the output frames."""
    if len(products) == 4:
        m0, m1, m2, m3 = products
        return [m0 + m1 + m2, m1 - m2 - m3]
    m0, m1, m2, m3, m4, m5 = products
    even, odd, even2, odd2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return [
        m0 + even + even2,
        torch.add(odd, odd2, alpha=2),
        torch.add(even, even2, alpha=4),
        torch.add(odd + m5, odd2, alpha=8),
    ]
