"""Group norm of every frame, and the SiLU after it."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .evaluation import gpu_ops
from .frames import per_frame


class FrameNorm(nn.GroupNorm):
    """`nn.GroupNorm` frame by frame, with SiLU in the same passes over memory on GPUs. Arguments of `nn.GroupNorm`.

    With statistics over time neither causality nor chunked processing would hold. Results are of the frames' dtype, under
    autocast as well: statistics are float32 inside, and frames in float32 would double the memory of what follows.
    """

    def forward(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        """Normalise frames `(N, C, …)`, or every frame of clips `(B, C, T, H, W)`.

        Args:
            x: statistics are of one N, or of one frame.
            silu: whether SiLU follows. It takes no memory of its own, nor keeps any for the gradient.
        """
        if x.ndim == 5:
            return per_frame(lambda frames: self.normalise(frames, silu), x)
        return self.normalise(x, silu)

    def normalise(self, x: torch.Tensor, silu: bool) -> torch.Tensor:
        """Normalise frames `(N, C, …)`."""
        if x.ndim == 4 and self.affine and gpu_ops.norm_serves(x, self.num_groups):
            return gpu_ops.norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        # Devices without data know no autocast.
        with nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
            if silu and self.affine and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _NormSiLU.apply(x, weight, bias, self.num_groups, self.eps)
            y = F.group_norm(x, self.num_groups, weight, bias, self.eps)
            return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def _dense(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """x without gaps, in its own layout or another's: in PyTorch 2.11 `native_group_norm` takes no other."""
    like = x if like is None else like
    last = like.ndim == 4 and like.stride(1) == 1 and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _NormSiLU(torch.autograd.Function):
    """Group norm and SiLU that keep their input for the gradient, and not what is between them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        x, sizes = _dense(x), (x.shape[0], x.shape[1], x[0, 0].numel())
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.groups = sizes, groups
        return F.silu(y, inplace=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        count, channels, _ = ctx.sizes
        shape = (1, channels, *(1,) * (x.ndim - 2))
        # By channel and frame, in the dtype of the statistics: what the norm made of x, before SiLU.
        factor = rstd.repeat_interleave(channels // ctx.groups, dim=1) * weight
        summand = bias - mean.repeat_interleave(channels // ctx.groups, dim=1) * factor
        extent = (count, *shape[1:])
        normed = torch.addcmul(summand.view(extent), x, factor.view(extent)).to(x.dtype)
        gradient = torch.ops.aten.silu_backward(gradient, normed)
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_group_norm_backward(
            _dense(gradient, x), x, mean, rstd, weight, *ctx.sizes, ctx.groups, needed
        )
        return *gradients, None, None
