"""2-D convolutions of frames by a kernel that is at hand, packed for oneDNN where it is fused.

Most ways come down to these. A fused kernel is packed for oneDNN, PyTorch's library for convolutions on CPUs: put into the
order in which its kernels read weights. Otherwise that happens at every call, and where images are small it takes as long as
the convolution. A packed convolution can also add to what its output holds before rounding, which saves a pass over memory
and a rounding. PyTorch packs so itself when `torch.compile` freezes a model; the operators it uses are
private, so that everything here works without them too (`can_pack`). Kernels of one pixel are matrices on CPUs instead,
which need no packing: packed ones are 50 times slower on frames of other sizes than they were packed for.

Frames are `(..., H, W, C)` here, channels last.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake

# The order that oneDNN chooses depends on the size of the frames; for kernels of more than a pixel, the one for this size
# serves all that were tried.
_PACKED_FOR = 64


def onednn_serves(weight: torch.Tensor) -> bool:
    """Whether oneDNN is fast for kernels like this one: x86, float32, and bfloat16 where the processor knows it."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if weight.dtype == torch.bfloat16:
        operators = torch.ops.mkldnn  # private: a build of PyTorch may lack them
        return hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs kernels like this one: where it serves, and PyTorch has the private operators."""
    return not is_fake(weight) and onednn_serves(weight) and _packs(weight.dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether a packed convolution runs here: its operators are private, and oneDNN may be held to an older processor."""
    frames = torch.zeros(1, 3, 3, 1, dtype=dtype)
    try:
        with torch.no_grad():
            conv = FrameConv(torch.zeros(1, 1, 3, 3, dtype=dtype), padding=1)._pack()
            conv.add_to(conv(frames), frames)
    except (AttributeError, RuntimeError):
        return False
    return True


class FrameConv:
    """A 2-D convolution by a kernel that is at hand.

    Args:
        weight: `(out, in, k, k)`.
        bias: `(out,)` or None.
        stride, padding: of both axes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0):
        self.weight, self.bias = weight, bias
        self.stride, self.padding = [stride] * 2, [padding] * 2
        self.packed = False

    def pack(self) -> "FrameConv":
        """Make ready for inference, in place: a matrix or packed where that can be, in `channels_last` elsewhere.

        A packed kernel has neither gradients nor a layout that `torch.compile`, autocast or pickle know.
        """
        self.weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
        if self.weight.device.type == "cpu" and self.weight.shape[2:] == (1, 1) and self.stride == [1, 1]:
            self.weight = self.weight.flatten(1).T.contiguous()  # (in, out)
        elif can_pack(self.weight):
            self._pack()
        return self

    def _pack(self) -> "FrameConv":
        size = [1, self.weight.shape[1], _PACKED_FOR, _PACKED_FOR]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = reorder(self.weight, self.padding, self.stride, [1, 1], 1, size)
        self.packed = True
        return self

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Convolve frames `(..., H, W, C)` to `(..., H', W', C_out)`."""
        if self.weight.ndim == 2:
            # `F.linear` takes frames that are cut from larger ones for a batch, with a copy of the matrix for each.
            y = F.linear(_pixels(frames), self.weight.T, self.bias)
            return y.unflatten(0, frames.shape[:-1])
        x = _folded(frames)
        if self.packed:
            arguments: tuple[Any, ...] = (self.padding, self.stride, [1, 1], 1, "none", [], "")
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *arguments)
        else:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y.movedim(1, -1).unflatten(0, frames.shape[:-3])

    def add_to(self, y: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Return `y` plus the convolution of frames; without gradients the sum takes y's place in memory."""
        if torch.is_grad_enabled():
            return y + self(frames)
        if self.weight.ndim == 2 and self.bias is None and y.is_contiguous():
            torch.addmm(_pixels(y), _pixels(frames), self.weight, out=_pixels(y))
            return y
        if not (self.packed and y.is_contiguous()):
            return y.add_(self(frames))
        arguments: tuple[Any, ...] = (self.padding, self.stride, [1, 1], 1, "add", 1.0, None, [], None)
        torch.ops.mkldnn._convolution_pointwise_.binary(_folded(y), _folded(frames), self.weight, self.bias, *arguments)
        return y


def _folded(frames: torch.Tensor) -> torch.Tensor:
    """`(..., H, W, C)` as `(N, C, H, W)`."""
    return frames.flatten(0, -4).movedim(-1, 1)


def _pixels(frames: torch.Tensor) -> torch.Tensor:
    """`(..., C)` as `(pixels, C)`."""
    return frames.reshape(-1, frames.shape[-1])
