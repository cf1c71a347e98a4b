"""Winograd over space: 2x2 pixels of a 3x3 convolution from 16 products of channels where 36 are the direct way.

F(2x2, 3x3) of Lavin and Gray (2015), between the two maps over time of a `Algorithm`, so that a tile is four frames
(or a pair) of 2x2 pixels. Its transforms are sums and differences of neighbouring pixels. They cost a pass over memory each,
which pays where there are many channels a pixel; frames are worked off in blocks that stay in the processor's cache, however
large they are, and in memory that is kept. For inference alone: results are written in place. Not in the paper: it changes
how an operator is evaluated, and results by rounding only.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import is_fake

from .packing import onednn_serves
from .pairs import Pairwise
from .tiles import Algorithm, Tiles, combine
from .way import Way
from .winograd import FourFrames

if TYPE_CHECKING:
    from ..tdc import GroupCausalConv3d

# Fewer channels than this leave too little to gain for what the transforms cost.
MIN_CHANNELS = 128
# The combinations of frames that are worked off as one block, or their products, in bytes.
BLOCK_BYTES = 8 * 2**20

_OF_KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class InSpace(Way["GroupCausalConv3d", tuple[torch.Tensor]]):
    """Tiles of 2x2 pixels in the frames that another way combines. Takes fused kernels, and frames of an even size.

    Args:
        in_time: the way whose algorithm makes the frames of a tile.
    """

    in_time: FourFrames | Pairwise

    def serves(self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        even = x.shape[-1] % 2 == 0 and x.shape[-2] % 2 == 0
        return self.in_time.fits(layer, group) and even and layer.keeps_kernels and pays(layer.weight)

    def kernels(self, layer: "GroupCausalConv3d") -> tuple[torch.Tensor]:
        return (transform_kernel(layer.plain_kernel(), self.in_time.algorithm(layer, layer.group_size)),)

    def __call__(
        self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (matrices,) = layer.kernels(self)
        algorithm = self.in_time.algorithm(layer, group)
        tiles = Tiles.cut(layer.neighbours, x, past, group, size=len(algorithm.products))
        frames = (tiles.before, *tiles.frames) if tiles.after is None else (tiles.before, *tiles.frames, tiles.after)
        y = convolve(matrices, algorithm, [frame.flatten(0, 1) for frame in frames], layer.bias)
        return y.unflatten(0, tiles.before.shape[:2]).flatten(1, 2).movedim(-1, 1)


class Workspace(threading.local):
    """Memory for the steps of a block, kept from call to call: the system takes as long to give it as it is worked on.

    A name for every step, and the same shapes in every block: PyTorch divides a step among its threads by position, so that
    these stay with what is in the cache of their core. What another core has written comes at a fifth of the speed if they
    share no cache.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """A tensor of like's dtype whose values are undefined, and which loses them when its name is asked for again."""
        if is_fake(like):
            return like.new_empty(shape)
        size = math.prod(shape) * like.itemsize
        if name not in self.buffers or len(self.buffers[name]) < size:
            with torch.inference_mode(False):  # so that it serves outside of it as well
                self.buffers[name] = torch.empty(size, dtype=torch.uint8)
        return self.buffers[name][:size].view(like.dtype).view(shape)


workspace = Workspace()


def pays(weight: torch.Tensor) -> bool:
    """Whether convolutions by a weight `(out, in, slices, 3, 3)` are faster this way, where it was measured."""
    return onednn_serves(weight) and weight.shape[-1] == 3 and min(weight.shape[:2]) >= MIN_CHANNELS


def transform_kernel(kernel: torch.Tensor, algorithm: Algorithm) -> torch.Tensor:
    """Map a plain kernel `(out, in, 3, 3, 3)` to the matrices of the products, `(L, 16, in, out)`; sums in float32."""
    slices = kernel.to(torch.promote_types(kernel.dtype, torch.float32)).permute(2, 3, 4, 1, 0)  # (3, 3, 3, in, out)
    in_time = combine(algorithm.kernel, slices.contiguous())
    matrix = in_time.new_tensor(_OF_KERNEL)
    return torch.einsum("ai,bj,kijco->kabco", matrix, matrix, in_time).flatten(1, 2).to(kernel.dtype)


def convolve(
    matrices: torch.Tensor, algorithm: Algorithm, frames: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """Convolve tiles of frames, zero-padded in space, without gradients.

    Args:
        matrices: what `transform_kernel` made, `(L, 16, C, C_out)`.
        algorithm: the maps over time.
        frames: those that the algorithm combines, each `(N, H, W, C)`, H and W even.
        bias: `(C_out,)` or None.

    Returns:
        `(N, T, H, W, C_out)`.
    """
    count, height, width, channels = frames[0].shape
    out_channels, products, size = matrices.shape[-1], len(algorithm.frames), len(algorithm.products)
    y = matrices.new_empty(count, size, height, width, out_channels)
    for clip, rows in _blocks(count, height, width, products * max(channels, out_channels) * matrices.itemsize):
        padded = _padded([frame[clip] for frame in frames], rows)
        n, lines = len(padded[0]), rows.stop - rows.start
        combined = workspace.tensor("combined", y, products, n, lines + 2, width + 2, channels)
        combine(algorithm.frames, padded, out=combined)
        made = workspace.tensor("made", y, products, n, lines, width, out_channels)
        for parts in _by_kernel(matrices, combined, made):
            _convolve_block(*parts)
        result = combine(algorithm.products, made, out=workspace.tensor("result", y, size, n, lines, width, out_channels))
        into = y[clip, :, rows]
        if bias is None:
            into.copy_(result.transpose(0, 1))
        else:
            torch.add(result.transpose(0, 1), bias, out=into)
    return y


def _blocks(count: int, height: int, width: int, pixel_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut N tiles of frames into blocks of several whole ones, or of some rows, an even number, of one."""
    pairs = max(1, BLOCK_BYTES // (2 * width * pixel_bytes))  # of rows
    several = max(1, 2 * pairs // height)
    parts = math.ceil(height / (2 * pairs))
    some = 2 * math.ceil(height / (2 * parts))
    for first in range(0, count, several):
        for row in range(0, height, some):
            yield slice(first, first + several), slice(row, min(row + some, height))


def _padded(frames: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
    """Some rows of frames `(n, H, W, C)` and the pixels around them, `(J, n, rows + 2, W + 2, C)`, zeros beyond."""
    count, height, width, channels = frames[0].shape
    y = workspace.tensor("padded", frames[0], len(frames), count, rows.stop - rows.start + 2, width + 2, channels)
    first, last = max(rows.start - 1, 0), min(rows.stop + 1, height)
    y[:, :, :, 0].zero_()
    y[:, :, :, -1].zero_()
    if rows.start == 0:
        y[:, :, 0].zero_()
    if rows.stop == height:
        y[:, :, -1].zero_()
    offset = first - rows.start + 1
    for into, frame in zip(y, frames, strict=True):
        into[:, offset : offset + last - first, 1:-1].copy_(frame[:, first:last])
    return y


def _by_kernel(matrices: torch.Tensor, *products: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Two kernels at once and the frames of their products, `(k, n, ...)`; those that share the last are n more of it."""
    shared = len(products[0]) - len(matrices)
    own = len(matrices) - 1 if shared else len(matrices)
    yield from zip(*(tensor[:own].split(2) for tensor in (matrices, *products)), strict=True)
    if shared:
        yield matrices[own:], *(tensor[own:].flatten(0, 1)[None] for tensor in products)


def _convolve_block(matrices: torch.Tensor, frames: torch.Tensor, y: torch.Tensor) -> None:
    """Convolve padded frames `(k, n, h + 2, w + 2, C)` with a kernel each into y, `(k, n, h, w, C_out)`."""
    k, n, height, width, out_channels = y.shape
    height, width, channels = height // 2, width // 2, frames.shape[-1]
    rows = workspace.tensor("rows", y, k, 4, n, height, 2 * width + 2, channels)
    _split(frames, rows.movedim(1, 0), dim=2)
    pixels = workspace.tensor("pixels", y, k, 4, 4, n, height, width, channels)
    _split(rows, pixels.movedim(2, 0), dim=4)
    products = workspace.tensor("products", y, 16 * k, n * height * width, out_channels)
    torch.bmm(pixels.view(16 * k, -1, channels), matrices.flatten(0, 1), out=products)
    products = products.view(k, 4, 4, n, height, width, out_channels)
    columns = workspace.tensor("columns", y, k, 4, n, height, width, 2, out_channels)
    _join(products.movedim(2, 0), columns[..., 0, :], columns[..., 1, :])
    y = y.unflatten(2, (height, 2))
    _join(columns.flatten(4, 5).movedim(1, 0), y[:, :, :, 0], y[:, :, :, 1])


def _split(x: torch.Tensor, y: torch.Tensor, dim: int) -> None:
    """Combine every two lines along `dim` and the ones before and after them into the inputs of four products."""
    before, first = x.unflatten(dim, (-1, 2)).unbind(dim + 1)  # x begins with the line before the first tile
    last, after = before.narrow(dim, 1, before.shape[dim] - 1), first.narrow(dim, 1, first.shape[dim] - 1)
    before, first = before.narrow(dim, 0, last.shape[dim]), first.narrow(dim, 0, after.shape[dim])
    torch.sub(before, last, out=y[0])
    torch.add(first, last, out=y[1])
    torch.sub(last, first, out=y[2])
    torch.sub(after, first, out=y[3])


def _join(products: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> None:
    """Both lines of a tile from its four products."""
    torch.add(products[1], products[2], out=first)
    torch.sub(products[1], products[2], out=last)
    first.add_(products[0])
    last.add_(products[3])
