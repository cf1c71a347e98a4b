"""Kernels for GPUs in Triton: linear combinations of frames, and group norm with SiLU, both with the channels last.

Each is one pass over memory, or three for the norm, where PyTorch takes several. Imported only where they run: Triton comes
with PyTorch for Linux, and runs on CPUs as well when `TRITON_INTERPRET=1` is set, which is how the tests check the results.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Elements a program works on: two warps' worth of 16-byte accesses for each of up to six frames.
_BLOCK = 1024
# Values of a tile that the norm holds in registers, and how many tiles of a frame one program sums up.
_TILE = 4096
_TILES = 8


@triton.jit
def _combine(
    parts,
    strides,
    y_ptr,
    bias_ptr,
    size,
    y_stride,
    y_step,
    ROWS: tl.constexpr,
    MATRIX: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row r of the matrix goes to `y_ptr + n * y_stride + r * y_step`; grid (blocks, N)."""
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    columns: tl.constexpr = len(parts)
    values: tuple = ()
    for k in tl.static_range(columns):
        value = tl.load(parts[k] + n * strides[k] + i, mask=inside, other=0.0).to(tl.float32)
        values = values + (value,)  # noqa: RUF005 (Triton knows no unpacking)
    if BIASED:
        start = tl.load(bias_ptr + i % CHANNELS, mask=inside, other=0.0).to(tl.float32)
    else:
        start = tl.zeros((BLOCK,), tl.float32)
    row_ptr = y_ptr + n * y_stride
    for r in tl.static_range(ROWS):
        total = start
        for k in tl.static_range(columns):
            if MATRIX[r * columns + k] == 1.0:
                total += values[k]
            elif MATRIX[r * columns + k] != 0.0:
                total += MATRIX[r * columns + k] * values[k]
        tl.store(row_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)
        row_ptr += y_step  # step by step, for a multiple may not fit into 32 bits


def combine(y: torch.Tensor, parts: Sequence[torch.Tensor], matrix: Sequence[float], bias: torch.Tensor | None) -> None:
    """See `gpu_ops.combine`; the matrix is flat here."""
    rows, count = y.shape[:2]
    size = y[0, 0].numel()
    with torch.cuda.device_of(y):
        _combine[(triton.cdiv(size, _BLOCK), count)](
            tuple(parts),
            tuple(part.stride(0) for part in parts),
            y,
            y if bias is None else bias,
            size,
            y.stride(1),
            y.stride(0),
            ROWS=rows,
            MATRIX=tuple(matrix),
            CHANNELS=1 if bias is None else y.shape[-1],
            BIASED=bias is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit
def _statistics(
    x_ptr, y_ptr, pixels, blocks, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Mean, sum of squared deviations and count of the pixels of a program, by group; grid (blocks, N).

    Deviations are from the mean of a tile, and tiles are joined by Chan's formula: nothing cancels where means are large.
    """
    block, n = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = CHANNELS // GROUPS
    frame = x_ptr + n.to(tl.int64) * pixels * CHANNELS
    channel = tl.arange(0, CHANNELS)
    mean = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    count = 0.0
    for tile in range(TILES):
        pixel = (block * TILES + tile) * TILE + tl.arange(0, TILE)
        inside = pixel < pixels
        x = tl.load(frame + pixel[:, None].to(tl.int64) * CHANNELS + channel[None, :], mask=inside[:, None], other=0.0)
        x = tl.reshape(x.to(tl.float32), (TILE, GROUPS, width))
        here = tl.sum(inside.to(tl.float32), 0) * width
        mean_here = tl.sum(tl.sum(x, 2), 0) / tl.maximum(here, 1.0)
        deviation = tl.where(inside[:, None, None], x - mean_here[None, :, None], 0.0)
        difference, total = mean_here - mean, tl.maximum(count + here, 1.0)
        squares += tl.sum(tl.sum(deviation * deviation, 2), 0) + difference * difference * (count * here / total)
        mean += difference * (here / total)
        count += here
    into = y_ptr + (n * blocks + block) * 3 * GROUPS + tl.arange(0, GROUPS)
    tl.store(into, mean)
    tl.store(into + GROUPS, squares)
    tl.store(into + 2 * GROUPS, tl.zeros((GROUPS,), tl.float32) + count)


@triton.jit
def _scale(
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    blocks,
    elements,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Factor and summand of every channel, `(N, 2, C)`, from the statistics of all programs; grid (N,)."""
    n = tl.program_id(0)
    block, group = tl.arange(0, BLOCKS), tl.arange(0, GROUPS)
    at = statistics_ptr + (n * blocks + block[:, None]) * 3 * GROUPS + group[None, :]
    there = (block < blocks)[:, None]
    means = tl.load(at, mask=there, other=0.0)
    squares = tl.load(at + GROUPS, mask=there, other=0.0)
    counts = tl.load(at + 2 * GROUPS, mask=there, other=0.0)
    mean = tl.sum(means * counts, 0) / elements
    deviation = means - mean[None, :]
    variance = tl.sum(squares + counts * deviation * deviation, 0) / elements
    factor = 1.0 / tl.sqrt(variance + eps)
    width: tl.constexpr = CHANNELS // GROUPS
    channel = tl.reshape(tl.arange(0, CHANNELS), (GROUPS, width))
    weight = tl.load(weight_ptr + channel).to(tl.float32) * factor[:, None]
    bias = tl.load(bias_ptr + channel).to(tl.float32) - weight * mean[:, None]
    tl.store(y_ptr + n * 2 * CHANNELS + channel, weight)
    tl.store(y_ptr + n * 2 * CHANNELS + CHANNELS + channel, bias)


@triton.jit
def _apply(x_ptr, scale_ptr, y_ptr, pixels, CHANNELS: tl.constexpr, TILE: tl.constexpr, SILU: tl.constexpr):
    """Scale every channel, then SiLU; grid (tiles, N)."""
    n = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    offsets = (n.to(tl.int64) * pixels + pixel[:, None]) * CHANNELS + channel[None, :]
    inside = (pixel < pixels)[:, None]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale_ptr + n * 2 * CHANNELS + channel)
    summand = tl.load(scale_ptr + n * 2 * CHANNELS + CHANNELS + channel)
    y = x * factor[None, :] + summand[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """See `gpu_ops.norm_silu`."""
    count, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile, tiles = max(1, _TILE // channels), _TILES
    while triton.cdiv(pixels, tile * tiles) > 1024:  # programs a frame, which one program joins
        tiles *= 2
    blocks, elements = triton.cdiv(pixels, tile * tiles), float(pixels * (channels // groups))
    statistics = torch.empty(count, blocks, 3, groups, device=x.device, dtype=torch.float32)
    scale = torch.empty(count, 2, channels, device=x.device, dtype=torch.float32)
    y, sizes = torch.empty_like(x), {"CHANNELS": channels, "num_warps": 4}
    with torch.cuda.device_of(x):
        _statistics[(blocks, count)](x, statistics, pixels, blocks, GROUPS=groups, TILE=tile, TILES=tiles, **sizes)
        join = {"GROUPS": groups, "BLOCKS": triton.next_power_of_2(blocks)}
        _scale[(count,)](statistics, weight, bias, scale, blocks, elements, eps, **join, **sizes)
        _apply[(triton.cdiv(pixels, tile), count)](x, scale, y, pixels, TILE=tile, SILU=silu, **sizes)
    return y
