"""2-D convolutions of frames, whose kernels a layer computes from its parameters: at every call, or once for inference.

All operators of the model come down to these. A fused kernel is packed for oneDNN, PyTorch's library for convolutions on
CPUs: put into the order in which its kernels read weights. Otherwise that happens at every call, and where images are small
it takes as long as the convolution. A packed convolution can also add to what its output holds before rounding, which saves
a pass over memory and a rounding. PyTorch packs so itself when `torch.compile` freezes a model; the operators it uses are
private, so that everything here works without them too (`can_pack`). Kernels of one pixel are matrices on CPUs instead,
which need no packing: packed ones are 50 times slower on frames of other sizes than they were packed for.

Frames are `(..., H, W, C)` here, channels last.
"""

import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
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
    operators = ("_convolution_pointwise_", "_reorder_convolution_weight")
    return not is_fake(weight) and onednn_serves(weight) and all(hasattr(torch.ops.mkldnn, name) for name in operators)


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
            size = [1, self.weight.shape[1], _PACKED_FOR, _PACKED_FOR]
            arguments = (self.padding, self.stride, [1, 1], 1, size)
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *arguments)
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
            arguments = (self.padding, self.stride, [1, 1], 1, "none", [], "")
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
        arguments = (self.padding, self.stride, [1, 1], 1, "add", 1.0, None, [], None)
        torch.ops.mkldnn._convolution_pointwise_.binary(_folded(y), _folded(frames), self.weight, self.bias, *arguments)
        return y


def _folded(frames: torch.Tensor) -> torch.Tensor:
    """`(..., H, W, C)` as `(N, C, H, W)`."""
    return frames.flatten(0, -4).movedim(-1, 1)


def _pixels(frames: torch.Tensor) -> torch.Tensor:
    """`(..., C)` as `(pixels, C)`."""
    return frames.reshape(-1, frames.shape[-1])


class KernelLayer(nn.Module):
    """A layer that computes kernels from its `weight`, in one or several forms, and can do so once for inference."""

    weight: nn.Parameter

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unfuse()

    def kernels(self, form: str) -> tuple:
        """The kernels of a form, fused ones if they can serve: see `fuse`."""
        return self.fused[form] if self.has_fused(form) else self.compute_kernels(form)

    def compute_kernels(self, form: str) -> tuple:
        """Compute the kernels of a form, `FrameConv`s or tensors, from the parameters. Differentiable."""
        raise NotImplementedError

    def inference_forms(self) -> Sequence[str]:
        """The forms that inference takes."""
        raise NotImplementedError

    def fuse(self) -> None:
        """Compute the kernels once for inference. The parameters stay: the state dict, and training, do not change.

        Whatever changes parameters other than in place makes them be forgotten: loading, moving, casting; and so do copies.
        """
        self.unfuse()
        self.fused_on = self.weight.device
        with torch.no_grad():
            for form in self.inference_forms():
                kernels = self.compute_kernels(form)
                self.fused[form] = tuple(k.pack() if isinstance(k, FrameConv) else k.contiguous() for k in kernels)

    def unfuse(self) -> None:
        """Forget the fused kernels: they are computed at every call again."""
        self.fused: dict[str, tuple] = {}
        self.fused_on: torch.device | None = None

    def fused_serve(self) -> bool:
        """Whether fused kernels can be used now: packed ones know no gradients, no compiler and no autocast."""
        if self.weight.device != self.fused_on:  # none are fused, or an offloading hook has moved the weight
            return False
        if self.fused_on.type == "cpu":
            return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        return not (torch.is_grad_enabled() and self.weight.requires_grad)

    def has_fused(self, form: str) -> bool:
        """Whether there are fused kernels of a form that can be used now."""
        return form in self.fused and self.fused_serve()

    def fused_tensors(self) -> list[torch.Tensor]:
        """What the fused kernels consist of."""
        return [k.weight if isinstance(k, FrameConv) else k for kernels in self.fused.values() for k in kernels]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.unfuse()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "fused": {}, "fused_on": None}


class FrameConv2d(KernelLayer, nn.Conv2d):
    """`nn.Conv2d` for square kernels, of frames `(..., H, W, C)`, that can be fused."""

    def compute_kernels(self, form: str) -> tuple[FrameConv]:
        return (FrameConv(self.weight, self.bias, self.stride[0], self.padding[0]),)

    def inference_forms(self) -> Sequence[str]:
        return ("plain",)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        (convolution,) = self.kernels("plain")
        return convolution(frames)


class UpsampledConv2d(FrameConv2d):
    """Nearest-neighbour upsampling of frames `(..., H, W, C)` by two, then a 3x3 convolution.

    Both at once on CPUs, at a quarter of the multiplications and equal but for rounding. Along one axis, an output pixel
    sees its own small pixel twice or thrice and one neighbour once or not at all, so that the convolution is the sum `s` of
    the kernel's taps on the pixel itself, and its first or last tap on the *difference* of the neighbour before or after to
    it. That is Eq. 5 in space, the anchor being the pixel. Along both axes these are nine 1x1 convolutions of the small
    frame and its differences, which the four outputs of a pixel share: one of the pixel, two by two of its differences
    along an axis, and four of the differences along both.
    """

    def compute_kernels(self, form: str) -> tuple[FrameConv, ...]:
        if form == "plain":
            return super().compute_kernels(form)
        kernels = []
        for rows in self._taps(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), dim=2):
            kernels += self._taps(rows, dim=3)
        pixel, *others = (kernel.to(self.weight.dtype).contiguous() for kernel in kernels)
        return (FrameConv(pixel, self.bias), *(FrameConv(kernel) for kernel in others))

    @staticmethod
    def _taps(kernel: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The kernel along `dim`: for the pixel, for its difference to the one before, for that of the one after to it."""
        first, _, last = kernel.split(1, dim)
        return [kernel.sum(dim, keepdim=True), -first, last]

    def inference_forms(self) -> Sequence[str]:
        return ("differences",) if self.weight.device.type == "cpu" else ("plain",)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        if frames.device.type != "cpu":
            larger = F.interpolate(_folded(frames), scale_factor=2.0, mode="nearest").movedim(1, -1)
            return super().forward(larger).unflatten(0, frames.shape[:-3])
        *batch, height, width, _ = frames.shape
        pixel, *columns_and_rows = self.kernels("differences")
        columns, rows = columns_and_rows[:2], (columns_and_rows[2:5], columns_and_rows[5:])
        # Between neighbours, one difference more than there are pixels: around the frame is zero.
        across = F.pad(frames, (0, 0, 1, 1)).diff(dim=-2)
        down = F.pad(frames, (0, 0, 0, 0, 1, 1)).diff(dim=-3)
        both = F.pad(across, (0, 0, 0, 0, 1, 1)).diff(dim=-3)
        own = pixel(frames)
        beside = [kernel(across[..., j : j + width, :]) for j, kernel in enumerate(columns)]
        y = own.new_empty(*batch, height, 2, width, 2, self.out_channels)
        for i, (vertical, *diagonal) in enumerate(rows):
            row = vertical.add_to(own.clone(), down[..., i : i + height, :, :])
            for j, kernel in enumerate(diagonal):
                differences = both[..., i : i + height, j : j + width, :]
                y[..., i, :, j, :] = kernel.add_to(row + beside[j], differences)
        return y.flatten(-3, -2).flatten(-4, -3)
