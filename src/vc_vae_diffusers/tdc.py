"""The temporal operators of VC-VAE: causal and group causal convolutions, and their Temporal Dynamic Difference forms.

An operator keeps its weight in the temporal slices that the paper names, `(out, in, slices, k, k)`:

| operator | slices | equation |
| --- | --- | --- |
| `CausalConv3d` | t-2, t-1, t | Eq. 1 |
| `GroupCausalConv3d` | past, current, future | Eq. 2 |
| `GroupCausalTDC` | past, anchor, future | Eq. 5 |
| `TemporalInteractionTDC` (`TemporalInteractionConv3d` without differences) | past, anchor | Eq. 6 |
| `CausalTDC` | t-2, t-1, anchor | Eq. 7 |

Eq. 5, 6 and 7 are one statement: the anchor frame `X_a` is convolved by `W_a`, its difference to every other frame of the
receptive field by that frame's slice. Sorting by frames gives a plain kernel, see `fold_tdc`, so that an operator costs one
convolution and no parameter more than its plain twin.

Tensors are `(B, C, T, H, W)`; `channels_last_3d` is the fast layout. State is explicit: `y, cache = layer(x, cache)` with
`cache=None` at the start of a stream. The module needs nothing but PyTorch and serves outside the VAE as well.

How a folded kernel is evaluated is a matter of speed and changes results by rounding only: directly, or with fewer 2-D
convolutions than taps, as pairs for groups of two frames and by temporal Winograd (`winograd.py`) for groups of four; and
where kernels of many channels are fused, by Winograd in space as well (`frame_winograd.py`): see `evaluation` below.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import frame_winograd, winograd
from .frame_conv import FrameConv, KernelLayer

# Of a form whose tiles extend over space, see `frame_winograd.py`.
IN_SPACE = "_in_space"


def fold_tdc(weight: torch.Tensor, anchor: int) -> torch.Tensor:
    """Return the plain kernel that equals the difference form (Eq. 5, 6, 7).

    `W_a*X_a + sum_k W_k*(X_k - X_a)` is `sum_k W_k*X_k + (W_a - sum_k W_k)*X_a`, sums over `k != a`. Differentiable.

    Args:
        weight: `(out, in, slices, ...)`, the slices of the difference form.
        anchor: index of the anchor's slice.
    """
    slices = list(weight.unbind(2))
    anchor %= len(slices)
    slices[anchor] = slices[anchor] - sum(w for k, w in enumerate(slices) if k != anchor)
    return torch.stack(slices, dim=2)


def unfold_tdc(kernel: torch.Tensor, anchor: int) -> torch.Tensor:
    """Return the slices of the difference form that equals a plain kernel: the inverse of `fold_tdc`."""
    slices = list(kernel.unbind(2))
    slices[anchor] = kernel.sum(2)
    return torch.stack(slices, dim=2)


def frame_kernels(kernel: torch.Tensor) -> torch.Tensor:
    """Cut `(out, in, slices, k, k)` into 2-D kernels `(slices, out, in, k, k)`, each dense in `channels_last`."""
    return kernel.permute(2, 0, 3, 4, 1).contiguous().permute(0, 1, 4, 2, 3)


def shifted(past: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The frames before those of x: `past`, then all of x but its last frame."""
    return past if x.shape[2] == 1 else torch.cat([past, x[:, :, :-1]], dim=2)


def interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join n clips `(B, C, T, H, W)` by turns to `(B, C, n * T, H, W)`, in `channels_last_3d`."""
    return torch.stack([part.movedim(1, -1) for part in parts], dim=2).flatten(1, 2).movedim(-1, 1)


def per_frame(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a 2-D module to every frame of `(B, C, T, H, W)`: time folds into the batch (free in `channels_last_3d`)."""
    # Folded with the channels last, an only frame keeps the strides by which PyTorch knows `channels_last`.
    y = module(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1))
    return y.movedim(1, -1).unflatten(0, (x.shape[0], x.shape[2])).movedim(-1, 1)


class TemporalConv3d(KernelLayer, nn.Conv3d):
    """What the operators share: the slices, their kernels, and the frame that stands in for a missing neighbour.

    Args:
        in_channels, out_channels: as in `nn.Conv3d`.
        kernel_size: odd spatial size `k`, zero-padded to keep H and W.
        temporal_padding: `"replicate"` puts the nearest existing frame in the place of a missing one, so that a difference
            that cannot be formed is zero (Sec. 3.3; the choice is not in the paper). `"zeros"` is what IV-VAE does.
        bias: as in `nn.Conv3d`.

    Attributes:
        evaluation: `"direct"`, `"winograd"` (fewer convolutions than taps), or `"auto"`: the latter on the CPU where it was
            measured to be faster.

    Raises:
        ValueError: for an even `kernel_size` or an unknown `temporal_padding`.
    """

    slices: tuple[str, ...]
    anchor: int
    differences = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        temporal_padding: str = "replicate",
        temporal_stride: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, it must be odd so that frames keep their size: pass 1, 3, …")
        if temporal_padding not in ("replicate", "zeros"):
            raise ValueError(f"temporal_padding is {temporal_padding!r}: pass 'replicate' or 'zeros'")
        super().__init__(
            in_channels,
            out_channels,
            (len(self.slices), kernel_size, kernel_size),
            stride=(temporal_stride, 1, 1),
            padding=(0, kernel_size // 2, kernel_size // 2),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.temporal_padding = temporal_padding
        self.evaluation = "auto"

    def reset_parameters(self) -> None:
        """As in `nn.Conv3d`. A layer of differences starts as the anchor's 2-D convolution, the other slices at zero.

        So it starts when inflated (Sec. 3.2). Random slices as large as the anchor's would amplify whatever differs between
        two frames, rounding included, up to threefold a layer.
        """
        super().reset_parameters()
        if self.differences:
            with torch.no_grad():
                self.weight.zero_()
            nn.init.kaiming_uniform_(self.weight[:, :, self.anchor], a=math.sqrt(5))  # what nn.Conv2d does

    # Kernels

    def plain_kernel(self) -> torch.Tensor:
        """The kernel of the plain convolution that this layer equals, `(out, in, slices, k, k)`. Differentiable."""
        return self.weight

    def two_tap_kernel(self) -> torch.Tensor:
        """The kernel that serves where a frame has a past and no future, `(out, in, 2, k, k)`. Differentiable."""
        raise NotImplementedError

    def static_kernel(self) -> torch.Tensor:
        """The 2-D kernel that serves where all frames are equal, `(out, in, k, k)`."""
        if self.temporal_padding == "zeros":
            return self.plain_kernel()[:, :, self.anchor]
        return self.weight.sum(2)

    def compute_kernels(self, form: str) -> tuple:
        """Compute the kernels of a form: `"direct"` is three taps at once, `"two_tap"` and `"static"` frame by frame."""
        if form == "direct":
            return (self.plain_kernel(),)
        if form == "static":
            return (self.frame_conv(self.static_kernel(), self.bias),)
        past, current = frame_kernels(self.two_tap_kernel())
        return self.frame_conv(past), self.frame_conv(current, self.bias)

    def inference_forms(self) -> Sequence[str]:
        return ("direct", "static") if len(self.slices) == 3 else ("two_tap", "static")

    def frame_conv(self, kernel: torch.Tensor, bias: torch.Tensor | None = None) -> FrameConv:
        """The convolution of every frame with one 2-D kernel, `(out, in, k, k)`."""
        return FrameConv(kernel, bias, padding=self.padding[1])

    # Evaluation

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The plain 3-tap convolution without temporal padding: T frames in, T - 2 out."""
        (kernel,) = self.kernels("direct")
        return F.conv3d(x, kernel, self.bias, self.stride, self.padding)

    def convolve_pairs(self, past: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Convolve frames that have a past and no future, given frame by frame: two taps."""
        of_past, of_current = self.kernels("two_tap")
        return of_past.add_to(of_current(x.movedim(1, -1)), past.movedim(1, -1)).movedim(-1, 1)

    def convolve_static(self, x: torch.Tensor) -> torch.Tensor:
        """One frame that stands for a static clip: every difference is zero and the anchor is all there is."""
        (convolution,) = self.kernels("static")
        return convolution(x.movedim(1, -1)).movedim(-1, 1)

    def missing_past(self, x: torch.Tensor) -> torch.Tensor:
        """The frame before the first one, `(B, C, 1, H, W)`."""
        return self.missing_neighbour(x[:, :, :1])

    def missing_neighbour(self, nearest: torch.Tensor) -> torch.Tensor:
        """What stands in for a frame that does not exist, given the nearest one that does."""
        return nearest if self.temporal_padding == "replicate" else torch.zeros_like(nearest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slices={self.slices}, temporal_padding={self.temporal_padding}"


class GroupCausalConv3d(TemporalConv3d):
    """Group causal convolution (Eq. 2): a frame sees its neighbours in its group and the last frame of the group before.

    Args:
        group_size: frames a group. A chunk holds whole groups; a chunk of fewer frames than one group is one short group.
        Others: see `TemporalConv3d`.
    """

    slices = ("past", "current", "future")
    anchor = 1

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, group_size: int, **kwargs):
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}, it must be at least 1: pass the frames of one group")
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.group_size = group_size

    def two_tap_kernel(self) -> torch.Tensor:
        """For a group's last frame, whose future is missing."""
        past, current, future = self.plain_kernel().unbind(2)
        return torch.stack([past, current if self.temporal_padding == "zeros" else current + future], dim=2)

    def compute_kernels(self, form: str) -> tuple:
        """Those of `TemporalConv3d`; `"pair"` and `"winograd"` for groups of two and of four, and both with `IN_SPACE`."""
        if form.endswith(IN_SPACE):
            algorithm = self.algorithm(form.removesuffix(IN_SPACE), self.group_size)
            return (frame_winograd.transform_kernel(self.plain_kernel(), algorithm),)
        if form == "winograd":
            return winograd.transform_kernel(self.plain_kernel(), self.bias, self.padding[1])
        if form == "pair":
            past, last = self.two_tap_kernel().unbind(2)
            current = self.plain_kernel()[:, :, self.anchor]
            past, current, last = frame_kernels(torch.stack([past, current, last], dim=2))
            return self.frame_conv(past), self.frame_conv(current), self.frame_conv(last, self.bias)
        return super().compute_kernels(form)

    def inference_forms(self) -> Sequence[str]:
        form = self.form(self.weight, self.group_size)
        if form == "direct":
            return form, "two_tap", "static"
        if form != "two_tap" and frame_winograd.pays(self.weight):
            form += IN_SPACE
        return form, "static"

    def algorithm(self, form: str, group: int) -> winograd.Algorithm:
        """How the frames of a tile come from fewer convolutions than taps, for the forms that do so."""
        if form == "pair":
            return winograd.PAIR
        return winograd.four_frames(self.temporal_padding if group == winograd.OUTPUTS else "given")

    def form(self, x: torch.Tensor, group: int) -> str:
        """How groups of `group` frames like x are evaluated: the form of the kernels that it takes."""
        if group == 1:
            return "two_tap"
        if self.evaluation == "winograd" or (self.evaluation == "auto" and x.device.type == "cpu"):
            if group == 2 and self.temporal_padding == "replicate":
                return "pair"
            if group % winograd.OUTPUTS == 0:
                return "winograd"
        return "direct"

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve a chunk of whole groups.

        Args:
            x: `(B, C, T, H, W)`, T a multiple of `group_size`, or fewer frames than one group.
            cache: the last frame of the chunk before, `(B, C, 1, H, W)`; None at the start.

        Returns:
            The output, `(B, C_out, T, H, W)`, and the cache for the next chunk.

        Raises:
            ValueError: if T is more than one group and not a multiple of `group_size`.
        """
        frames = x.shape[2]
        group = min(self.group_size, frames)
        if frames % group != 0:
            raise ValueError(
                f"x has {frames} frames, not a multiple of group_size {group}: pass whole groups (repeat the last frame)"
            )
        if frames == 1 and cache is None:
            y = self.convolve_static(x)
        else:
            past = self.missing_past(x) if cache is None else cache
            y = self.convolve_groups(x, past, group)
        return y, x[:, :, -1:].clone(memory_format=torch.channels_last_3d)

    def convolve_groups(self, x: torch.Tensor, past: torch.Tensor, group: int) -> torch.Tensor:
        """Convolve whole groups; `past` is the frame before the first one."""
        form = self.form(x, group)
        if form == "two_tap":
            return self.convolve_pairs(shifted(past, x), x)
        even = x.shape[-1] % 2 == 0 and x.shape[-2] % 2 == 0
        if even and self.has_fused(form + IN_SPACE):
            return self.convolve_tiles(x, past, group, form, in_space=True)
        # Computing Winograd's kernels takes as long as convolving a few small frames.
        small = self.evaluation == "auto" and group * x[0, 0, 0].numel() < 1024
        if form == "direct" or (small and not self.has_fused(form)):
            return self.convolve_directly(x, past, group)
        return self.convolve_tiles(x, past, group, form)

    def convolve_directly(self, x: torch.Tensor, past: torch.Tensor, group: int) -> torch.Tensor:
        """Three taps for all frames but a group's last one, which takes two."""
        batch, channels, frames, height, width = x.shape
        windows = torch.cat([past, x], dim=2).unfold(2, group + 1, group)  # (B, C, n, H, W, group + 1)
        windows = windows.permute(0, 2, 5, 3, 4, 1).reshape(-1, group + 1, height, width, channels).movedim(-1, 1)
        inner = self.convolve(windows)  # (B * n, C_out, group - 1, H, W)
        last = self.convolve_pairs(windows[:, :, -2:-1], windows[:, :, -1:])  # (B * n, C_out, 1, H, W)
        y = torch.cat([inner, last], dim=2).movedim(1, -1)
        return y.reshape(batch, frames, height, width, self.out_channels).movedim(-1, 1)

    def following(self, first: torch.Tensor, last: torch.Tensor, count: int) -> torch.Tensor:
        """The frame after each tile: the first of the next one; it is missing after every `count`-th, a group's last."""
        missing = self.missing_neighbour(last)
        if count == 1:
            return missing
        following = torch.cat([first[:, :, 1:], first[:, :, :1]], dim=2).unflatten(2, (-1, count))
        missing = missing.unflatten(2, (-1, count))
        return torch.cat([following[:, :, :, :-1], missing[:, :, :, -1:]], dim=3).flatten(2, 3)

    def convolve_tiles(
        self, x: torch.Tensor, past: torch.Tensor, group: int, form: str, in_space: bool = False
    ) -> torch.Tensor:
        """Evaluate tiles, of two frames as a pair or of four by F(4, 3)."""
        algorithm = self.algorithm(form, group)
        size = len(algorithm.products)
        frames = x.movedim(1, -1).unflatten(1, (-1, size)).movedim(2, 0)  # (size, B, tiles, H, W, C)
        first, last = (frame.movedim(-1, 1) for frame in (frames[0], frames[-1]))
        before = shifted(past, last).movedim(1, -1)
        after = [self.following(first, last, group // size).movedim(1, -1)] if group != size else []
        if in_space:
            tiles = [frame.flatten(0, 1) for frame in (before, *frames, *after)]
            y = frame_winograd.convolve(*self.kernels(form + IN_SPACE), algorithm, tiles, self.bias)
            return y.unflatten(0, before.shape[:2]).flatten(1, 2).movedim(-1, 1)
        if form == "pair":
            y = self.convolve_pair(before, *frames)
        else:
            frames = torch.cat([frames, after[0][None]]) if after else frames
            y = winograd.convolve(self.kernels(form), algorithm, before, frames)
        return y.movedim(0, 2).flatten(1, 2).movedim(-1, 1)  # from (size, B, tiles, H, W, C_out)

    def convolve_pair(self, before: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Both frames of a group of two, `(2, ..., H, W, C)`, by four 2-D convolutions where the taps are five.

        As the last frame stands for the one after it, the sum of the kernels of current and future frame is applied to it
        in both outputs: `P*X_0 + C*X_1 + F*X_2 = P*X_0 + C*(X_1 - X_2) + (C + F)*X_2`, and `P*X_1 + (C + F)*X_2`.
        """
        of_past, of_current, of_last = self.kernels("pair")
        shared = of_last(last)
        y = torch.stack([shared, shared])
        y_first, y_last = of_current.add_to(y[0], first - last), y[1]
        y_first, y_last = of_past.add_to(y_first, before), of_past.add_to(y_last, first)
        return torch.stack([y_first, y_last]) if torch.is_grad_enabled() else y  # without gradients they are in y


class GroupCausalTDC(GroupCausalConv3d):
    """Group causal TDC (Eq. 5): `W_a*X_t + W_p*(X_{t-1} - X_t) + W_f*(X_{t+1} - X_t)`. Arguments of its plain twin."""

    slices = ("past", "anchor", "future")
    differences = True

    def plain_kernel(self) -> torch.Tensor:
        return fold_tdc(self.weight, self.anchor)

    def static_kernel(self) -> torch.Tensor:
        return self.weight[:, :, 1] if self.temporal_padding == "replicate" else super().static_kernel()

    def two_tap_kernel(self) -> torch.Tensor:
        if self.temporal_padding == "zeros":
            return super().two_tap_kernel()
        return fold_tdc(self.weight[:, :, :2], anchor=1)  # X_{t+1} = X_t: W_f multiplies zero

    def components(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The terms of Eq. 5 apart (Fig. 5): with the bias, their sum is what `forward` returns.

        Args:
            x, cache: as for `forward`.

        Returns:
            `(B, C_out, T, H, W)` by slice: `anchor` is `W_a*X_t`, `past` and `future` are what the differences add.
        """
        past = shifted(self.missing_past(x) if cache is None else cache, x)
        future = self.following(x, x, min(self.group_size, x.shape[2]))
        inputs = {"past": past - x, "anchor": x, "future": future - x}
        kernels = zip(self.slices, frame_kernels(self.weight), strict=True)
        return {name: self.frame_conv(kernel)(inputs[name].movedim(1, -1)).movedim(-1, 1) for name, kernel in kernels}


class CausalConv3d(TemporalConv3d):
    """Causal convolution (Eq. 1): a frame sees itself and the two before it. Arguments: see `TemporalConv3d`."""

    slices = ("t-2", "t-1", "current")
    anchor = 2

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve a chunk of any length.

        Args:
            x: `(B, C, T, H, W)`.
            cache: the last two frames seen, `(B, C, 2, H, W)`; None at the start.

        Returns:
            The output, `(B, C_out, T, H, W)`, and the cache for the next chunk.
        """
        past = torch.cat([self.missing_past(x)] * 2, dim=2) if cache is None else cache
        extended = torch.cat([past, x], dim=2)
        static = x.shape[2] == 1 and cache is None
        y = self.convolve_static(x) if static else self.convolve(extended)
        return y, extended[:, :, -2:].clone(memory_format=torch.channels_last_3d)


class CausalTDC(CausalConv3d):
    """Causal TDC (Eq. 7): `W_t*X_t + W_{t-1}*(X_{t-1} - X_t) + W_{t-2}*(X_{t-2} - X_t)`. Arguments of its plain twin."""

    slices = ("t-2", "t-1", "anchor")
    differences = True

    def plain_kernel(self) -> torch.Tensor:
        return fold_tdc(self.weight, self.anchor)

    def static_kernel(self) -> torch.Tensor:
        return self.weight[:, :, 2] if self.temporal_padding == "replicate" else super().static_kernel()


class TemporalInteractionConv3d(TemporalConv3d):
    """Temporal downsampling by a plain convolution over pairs of frames, kernel 2, stride 2 (Sec. 3.2).

    Pairs never cross a chunk, so that there is no cache. Arguments: see `TemporalConv3d`.
    """

    slices = ("past", "current")
    anchor = 1

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, temporal_stride=2, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, C, T, H, W)`, T even, to `(B, C_out, T / 2, H, W)`.

        A single frame is its own past and gives one frame.

        Raises:
            ValueError: if T is odd and not 1.
        """
        if x.shape[2] == 1:
            return self.convolve_static(x)
        if x.shape[2] % 2 != 0:
            raise ValueError(f"x has {x.shape[2]} frames, it must be an even number (or 1): repeat the last frame")
        past, current = x.unflatten(2, (-1, 2)).unbind(3)
        return self.convolve_pairs(past, current)

    def two_tap_kernel(self) -> torch.Tensor:
        return self.plain_kernel()


class TemporalInteractionTDC(TemporalInteractionConv3d):
    """Temporal interaction TDC (Eq. 6): `W_a*X_a + W_p*(X_p - X_a)`, the later frame of a pair being the anchor."""

    slices = ("past", "anchor")
    differences = True

    def plain_kernel(self) -> torch.Tensor:
        return fold_tdc(self.weight, self.anchor)

    def static_kernel(self) -> torch.Tensor:
        return self.weight[:, :, 1] if self.temporal_padding == "replicate" else super().static_kernel()


_TDC_OF = {
    GroupCausalConv3d: GroupCausalTDC,
    CausalConv3d: CausalTDC,
    TemporalInteractionConv3d: TemporalInteractionTDC,
}
_CONV_OF = {tdc: conv for conv, tdc in _TDC_OF.items()}


def _twin(layer: TemporalConv3d, twin_class: type[TemporalConv3d], weight: torch.Tensor) -> TemporalConv3d:
    """Build a layer of another class with the same settings, the given weight and a copy of the bias."""
    settings = {"group_size": layer.group_size} if isinstance(layer, GroupCausalConv3d) else {}
    twin = twin_class(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size[1],
        temporal_padding=layer.temporal_padding,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **settings,
    )
    twin.evaluation = layer.evaluation
    with torch.no_grad():
        twin.weight.copy_(weight)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias).requires_grad_(layer.bias.requires_grad)
    twin.weight.requires_grad_(layer.weight.requires_grad)
    return twin.train(layer.training)


def to_tdc(conv: TemporalConv3d) -> TemporalConv3d:
    """Return the TDC layer that computes what a trained plain layer computes. The layer given is left alone.

    Raises:
        ValueError: if `conv` is not one of the plain operators of this module.
    """
    if type(conv) not in _TDC_OF:
        names = ", ".join(c.__name__ for c in _TDC_OF)
        raise ValueError(f"conv is a {type(conv).__name__}, it must be one of {names}; `apply_tdc` takes any model")
    return _twin(conv, _TDC_OF[type(conv)], unfold_tdc(conv.weight.detach(), conv.anchor))


def to_conv(tdc: TemporalConv3d) -> TemporalConv3d:
    """Return the plain layer that computes what a TDC layer computes: the inverse of `to_tdc`.

    Raises:
        ValueError: if `tdc` is not one of the TDC operators of this module.
    """
    if type(tdc) not in _CONV_OF:
        names = ", ".join(c.__name__ for c in _CONV_OF)
        raise ValueError(f"tdc is a {type(tdc).__name__}, it must be one of {names}; `remove_tdc` takes any model")
    return _twin(tdc, _CONV_OF[type(tdc)], tdc.plain_kernel().detach())


class TDCParametrization(nn.Module):
    """Makes a foreign `nn.Conv3d` learn TDC slices: its `weight` becomes `fold_tdc(slices)` (torch parametrization)."""

    def __init__(self, anchor: int):
        super().__init__()
        self.anchor = anchor

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return fold_tdc(slices, self.anchor)

    def right_inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        return unfold_tdc(kernel, self.anchor)


def apply_tdc(module: nn.Module, causality: str = "causal") -> list[str]:
    """Turn the temporal convolutions of any model into TDC, in place and with equal outputs.

    Plain operators of this module are replaced by their TDC twins. Any other `nn.Conv3d` with two or more temporal taps
    keeps its class and gets a `TDCParametrization`: the trained parameter is then `parametrizations.weight.original`, the
    slices. Optimizers must be created afterwards.

    Args:
        module: a model, for example diffusers' `AutoencoderKLWan`.
        causality: where the anchor of a foreign kernel is: its last tap (`"causal"`) or its middle one (`"group"`).

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: for an unknown `causality`, or if there is nothing to convert.
    """
    if causality not in ("causal", "group"):
        raise ValueError(f"causality is {causality!r}: pass 'causal' or 'group'")
    converted, twins = [], {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in _TDC_OF:
            twins[layer] = twins.get(layer) or to_tdc(layer)  # a layer with two names stays one
            _replace(module, name, twins[layer])
        elif isinstance(layer, nn.Conv3d) and not isinstance(layer, TemporalConv3d) and layer.kernel_size[0] > 1:
            if parametrize.is_parametrized(layer, "weight"):
                continue
            taps = layer.kernel_size[0]
            anchor = taps // 2 if causality == "group" else taps - 1
            parametrize.register_parametrization(layer, "weight", TDCParametrization(anchor))
        else:
            continue
        converted.append(name)
    if not converted:
        raise ValueError(f"module is a {type(module).__name__} without a plain temporal convolution: nothing to convert")
    return converted


def remove_tdc(module: nn.Module) -> list[str]:
    """Undo `apply_tdc` in place, keeping what was learned: every layer holds its plain kernel again.

    Returns:
        The names of the converted layers.
    """
    converted, twins = [], {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in _CONV_OF:
            twins[layer] = twins.get(layer) or to_conv(layer)
            _replace(module, name, twins[layer])
        elif isinstance(layer, nn.Conv3d) and parametrize.is_parametrized(layer, "weight"):
            if not any(isinstance(p, TDCParametrization) for p in layer.parametrizations.weight):
                continue
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        else:
            continue
        converted.append(name)
    return converted


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    if not name:
        raise ValueError("module is itself a temporal operator: use `to_tdc` or `to_conv`, which return a new layer")
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)
