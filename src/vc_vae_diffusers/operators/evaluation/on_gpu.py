"""Ways for GPUs: 2-D convolutions of frames with the channels last and no bias, which cuDNN runs near the processor's peak.

What comes before and after them, combinations of frames and the bias, is one pass each (`gpu_ops.combine`). Frames are
worked off in blocks, so that no more than `BLOCK_BYTES` of combinations or products are alive. Layers with few channels at
one end have their taps there: as more channels of the input, or of the output.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..neighbours import Causal, Group, Pairs
from . import gpu_ops
from .packing import FrameConv
from .pairs import Pairwise
from .tiles import Algorithm, Matrix, Tiles
from .way import Way
from .winograd import FourFrames

if TYPE_CHECKING:
    from ..frame_conv import FrameConv2d
    from ..tdc import TemporalConv3d

# The combinations of frames that are worked off as one block, or their products, in bytes.
BLOCK_BYTES = 2**28
# Layers with fewer channels than this at one end have the taps there; cuDNN wants multiples of eight.
FEW_CHANNELS = 16
_MULTIPLE = 8


@dataclass(frozen=True)
class LastOfGroup:
    """A frame that sees its past and no future, in pairs and groups of one, as a tile: two products."""

    def algorithm(self, layer: "TemporalConv3d", group: int) -> Algorithm:
        """Past and current slice; what stands for a missing future is the frame itself, or zeros."""
        if len(layer.slices) == 2:
            kernel: Matrix = ((1.0, 0.0), (0.0, 1.0))
        else:
            kernel = ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0 if layer.temporal_padding == "replicate" else 0.0))
        return Algorithm(frames=((1.0, 0.0), (0.0, 1.0)), kernel=kernel, products=((1.0, 1.0),))

    def fits(self, layer: "TemporalConv3d", group: int) -> bool:
        """Whether no frame has a future."""
        return isinstance(layer.neighbours, Pairs) or (isinstance(layer.neighbours, Group) and group == 1)


@dataclass(frozen=True)
class Combined(Way["TemporalConv3d", tuple[FrameConv, ...]]):
    """The 2-D convolutions of a way over time, for inference.

    Args:
        in_time: the way whose algorithm says what is convolved and how it makes the frames of a tile.
        always: on other devices as well.
    """

    in_time: LastOfGroup | Pairwise | FourFrames
    always: bool = False

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        if torch.is_grad_enabled() or not self.in_time.fits(layer, group):
            return False
        return gpu_ops.compiled(x) or gpu_ops.serve(x, self.always)

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv, ...]:
        rows = self.in_time.algorithm(layer, layer.neighbours.size).kernel
        kernel = layer.plain_kernel()
        slices = kernel.to(torch.promote_types(kernel.dtype, torch.float32)).unbind(2)
        weights = (_sum(row, slices).to(kernel.dtype) for row in rows)
        return tuple(FrameConv(_last(weight), padding=layer.padding[1]) for weight in weights)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        algorithm, x = self.in_time.algorithm(layer, group), x.contiguous(memory_format=torch.channels_last_3d)
        if isinstance(layer.neighbours, Pairs):
            parts: Sequence[torch.Tensor] = (
                layer.neighbours.clips(x, past, group).movedim(1, -1).unflatten(1, (-1, 2)).unbind(2)
            )
        else:
            tiles = Tiles.cut(layer.neighbours, x, past, group, size=len(algorithm.products))
            parts = (tiles.before, *tiles.frames, *(() if tiles.after is None else (tiles.after,)))
            parts = parts[: len(algorithm.frames[0])]  # a missing frame is no column of the algorithm
        frames = [part.flatten(0, 1) for part in parts]
        y = convolve(layer.kernels(self), algorithm, frames, layer.bias, layer.out_channels)
        return y.unflatten(0, parts[0].shape[:2]).flatten(1, 2).movedim(-1, 1)


def convolve(
    kernels: Sequence[FrameConv],
    algorithm: Algorithm,
    frames: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_channels: int,
) -> torch.Tensor:
    """Convolve tiles of frames, without gradients.

    Args:
        kernels: of the first products; the last one serves all others.
        algorithm: the maps over time.
        frames: those that the algorithm combines, each `(N, H, W, C)`.
        bias: `(C_out,)` or None.
        out_channels: C_out.

    Returns:
        `(N, T, H, W, C_out)`.
    """
    if torch.compiler.is_compiling():
        return _convolve_plainly(kernels, algorithm, frames, bias)
    frames = [part if part[0].is_contiguous() else part.contiguous() for part in frames]
    count, height, width, channels = frames[0].shape
    reach, products = kernels[0].padding[0], len(algorithm.frames)
    device = frames[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else frames[0].dtype
    y = frames[0].new_empty(count, len(algorithm.products), height, width, out_channels, dtype=dtype)
    row_bytes = products * width * max(channels, out_channels) * y.itemsize
    for clips, rows in _blocks(count, height, row_bytes):
        first, last = max(rows.start - reach, 0), min(rows.stop + reach, height)
        inputs = _combined(algorithm.frames, [part[clips, first:last] for part in frames])
        inputs.reverse()  # so that each is forgotten when it is convolved
        made = []
        for k in range(products):
            product = _apply(kernels[min(k, len(kernels) - 1)], inputs.pop())
            made.append(product[:, rows.start - first : rows.stop - first])
        gpu_ops.combine(y[clips, :, rows].transpose(0, 1), made, algorithm.products, bias)
    return y


def _convolve_plainly(
    kernels: Sequence[FrameConv], algorithm: Algorithm, frames: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """The same by plain PyTorch, whose sums the compiler fuses."""
    inputs = [_sum(row, frames) for row in algorithm.frames]
    products = [_apply(kernels[min(k, len(kernels) - 1)], x) for k, x in enumerate(inputs)]
    outputs = [_sum(row, products) for row in algorithm.products]
    return torch.stack(outputs if bias is None else [(y + bias).to(y.dtype) for y in outputs], dim=1)


def _sum(factors: Sequence[float], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A linear combination; the compiler sums in float32."""
    kind = torch.promote_types(parts[0].dtype, torch.float32)
    terms = [part.to(kind) * factor for factor, part in zip(factors, parts, strict=True) if factor]
    return sum(terms[1:], terms[0]).to(parts[0].dtype)


def _blocks(count: int, height: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut N tiles of frames into blocks of several whole ones, or of some rows of one."""
    most = max(1, BLOCK_BYTES // row_bytes)  # rows
    parts = math.ceil(height / most)
    several, rows = max(1, most // height), math.ceil(height / parts)
    for first in range(0, count, several):
        for row in range(0, height, rows):
            yield slice(first, min(first + several, count)), slice(row, min(row + rows, height))


def _combined(matrix: Matrix, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the matrix makes of frames `(n, h, W, C)`; a row that is one frame takes it as it is."""
    whole = {r: row.index(1.0) for r, row in enumerate(matrix) if sorted(row) == [0.0] * (len(row) - 1) + [1.0]}
    others = [row for r, row in enumerate(matrix) if r not in whole]
    if others:
        made = iter(gpu_ops.combine(frames[0].new_empty(len(others), *frames[0].shape), frames, others))
    return [frames[whole[r]] if r in whole else next(made) for r in range(len(matrix))]


def _apply(kernel: FrameConv, frames: torch.Tensor) -> torch.Tensor:
    """A convolution `(n, h, W, C)` to `(n, h, W, C_out)`; of one pixel it is a matrix product."""
    if frames.device.type == "cuda" and kernel.weight.shape[-1] == 1:
        return F.linear(frames, kernel.weight.flatten(1))
    y = kernel(frames)
    return y if y.is_contiguous() else y.contiguous()


def _last(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TapsAsChannels(Way["TemporalConv3d", tuple[FrameConv]]):
    """What both ways share for layers with few channels at one end.

    Args:
        always: on other devices as well.
    """

    always: bool = False

    def serves(self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        near = isinstance(layer.neighbours, Causal | Group) and len(layer.slices) == 3
        return (self.always or x.device.type == "cuda") and near and self.at_end(layer) <= FEW_CHANNELS

    @staticmethod
    @abstractmethod
    def at_end(layer: "TemporalConv3d") -> int:
        """The channels of the end where the taps are."""


@dataclass(frozen=True)
class TapsAsInputs(TapsAsChannels):
    """The neighbours of a frame as its channels, where there are few: one convolution, whose bias is a channel of ones."""

    @staticmethod
    def at_end(layer: "TemporalConv3d") -> int:
        return layer.in_channels

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv]:
        kernel = layer.plain_kernel().transpose(1, 2).flatten(1, 2)  # (out, taps * in, k, k)
        extra = self._channels(layer) - kernel.shape[1]
        kernel = F.pad(kernel, (0, 0, 0, 0, 0, extra))
        if layer.bias is not None:
            middle = layer.padding[1]
            ones = F.pad(layer.bias[:, None, None, None], (middle,) * 4)
            kernel = torch.cat([kernel[:, :-1], ones.to(kernel)], dim=1)
        return (FrameConv(_last(kernel), padding=layer.padding[1]),)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (convolution,) = layer.kernels(self)
        clips = layer.neighbours.clips(x, past, group).movedim(1, -1)  # (N, T + 2, H, W, C)
        count = clips.shape[1] - 2
        taps = torch.cat([clips[:, k : k + count] for k in range(3)], dim=-1)
        extra = self._channels(layer) - taps.shape[-1]
        ones = taps.new_ones(1).expand(*taps.shape[:-1], 1)
        taps = torch.cat([taps, taps.new_zeros(1).expand(*taps.shape[:-1], extra - 1), ones], dim=-1)
        return layer.neighbours.frames(convolution(taps).movedim(-1, 1), x.shape[0])

    @staticmethod
    def _channels(layer: "TemporalConv3d") -> int:
        """Those of the taps and the ones, and zeros."""
        return math.ceil((3 * layer.in_channels + 1) / _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class TapsAsOutputs(TapsAsChannels):
    """What a frame gives to its neighbours as channels, where there are few: one convolution, and sums of its channels."""

    @staticmethod
    def at_end(layer: "TemporalConv3d") -> int:
        return layer.out_channels

    def kernels(self, layer: "TemporalConv3d") -> tuple[FrameConv]:
        kernel = layer.plain_kernel().movedim(2, 0).flatten(0, 1)  # (taps * out, in, k, k)
        extra = -len(kernel) % _MULTIPLE
        return (FrameConv(_last(F.pad(kernel, (0, 0, 0, 0, 0, 0, 0, extra))), padding=layer.padding[1]),)

    def __call__(
        self, layer: "TemporalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (convolution,) = layer.kernels(self)
        given = convolution(x.movedim(1, -1)).movedim(-1, 1)
        before = None if past is None else convolution(past.movedim(1, -1)).movedim(-1, 1)
        clips, size = layer.neighbours.clips(given, before, group), layer.out_channels
        count = clips.shape[2] - 2
        first, second, third = (clips[:, k * size : (k + 1) * size, k : k + count] for k in range(3))
        y = first + second + third
        if layer.bias is not None:
            y = y + layer.bias[:, None, None, None]
        return layer.neighbours.frames(y, x.shape[0])


@dataclass(frozen=True)
class BiasLast(Way["FrameConv2d", tuple[FrameConv]]):
    """A 2-D convolution of frames `(N, C, H, W)` without its bias, which is added in place; for inference.

    Args:
        always: on other devices as well.
    """

    always: bool = False

    def serves(self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return gpu_ops.serve(x, self.always) and layer.bias is not None

    def kernels(self, layer: "FrameConv2d") -> tuple[FrameConv]:
        return (FrameConv(layer.weight, None, layer.stride[0], layer.padding[0]),)

    def __call__(
        self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (convolution,) = layer.kernels(self)
        return add_bias(convolution(x.movedim(1, -1)), layer.bias).movedim(-1, 1)


def add_bias(frames: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Add a bias to frames `(n, H, W, C)` in place."""
    if bias is None:
        return frames
    frames = frames.contiguous()
    gpu_ops.combine(frames[None], [frames], [[1.0]], bias)
    return frames


@dataclass(frozen=True)
class Transposed(Way["FrameConv2d", tuple[torch.Tensor]]):
    """Nearest-neighbour upsampling by two and a 3x3 convolution as one transposed convolution, of 4x4, stride 2.

    Exact, at 4/9 of the multiplications: a small pixel reaches 4x4 large ones, by the sums of the taps that see its copies.

    Args:
        always: on other devices as well.
    """

    always: bool = False

    def serves(self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return (self.always or x.device.type == "cuda") and layer.kernel_size == (3, 3)

    def kernels(self, layer: "FrameConv2d") -> tuple[torch.Tensor]:
        kernel = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
        kernel = _spread(_spread(kernel, 2), 3).to(layer.weight.dtype)
        return (_last(kernel.transpose(0, 1)),)

    def __call__(
        self, layer: "FrameConv2d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        (kernel,) = layer.kernels(self)
        if not gpu_ops.serve(x, self.always):
            return F.conv_transpose2d(x, kernel, layer.bias, stride=2, padding=1)
        y = F.conv_transpose2d(x, kernel, None, stride=2, padding=1)
        return add_bias(y.movedim(1, -1), layer.bias).movedim(-1, 1)


def _spread(kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """From three taps along `dim` to what a small pixel gives to the four large ones that it reaches."""
    before, here, after = kernel.unbind(dim)
    return torch.stack([after, here + after, before + here, before], dim)
