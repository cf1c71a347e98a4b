"""The temporal operators of VC-VAE: causal and group causal convolutions, and their Temporal Dynamic Difference forms.

| operator | slices of its weight `(out, in, slices, k, k)` | equation |
| --- | --- | --- |
| `CausalConv3d` | t-2, t-1, current | Eq. 1 |
| `GroupCausalConv3d` | past, current, future | Eq. 2 |
| `GroupCausalTDC` | past, anchor, future | Eq. 5 |
| `TemporalInteractionTDC` (`TemporalInteractionConv3d` without differences) | past, anchor | Eq. 6 |
| `CausalTDC` | t-2, t-1, anchor | Eq. 7 |

Eq. 5, 6 and 7 are one statement: the anchor frame `X_a` is convolved by `W_a`, its difference to every other frame that it
sees by that frame's slice. Sorted by frames that is a plain kernel, `kernel` of each class, so that an operator costs one
convolution and no parameter more than its plain twin.

Tensors are `(B, C, T, H, W)`. An operator is two things. As a layer it has the contract of `nn.Conv3d`: `layer(x)` is the
convolution by the plain kernel, without temporal padding. As an operator it knows which frames are neighbours:
`y, past = layer.stream(x, past)` takes the chunks of a clip one after the other, with `past=None` at the start.

How the convolution is made is left to `evaluation`, and changes results by rounding only.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .evaluation import TEMPORAL, Direct, Way, choose, evaluate
from .evaluation.fusing import KernelLayer
from .neighbours import Causal, Group, Neighbours, Pairs


class TemporalConv3d(KernelLayer, nn.Conv3d):
    """What the operators share: a weight in slices of time, the plain kernel that it stands for, and neighbours.

    Args:
        in_channels, out_channels: as in `nn.Conv3d`.
        kernel_size: odd spatial size `k`, zero-padded to keep H and W; or `(taps, k, k)`, where one tap is the anchor alone.
        stride, padding, dilation, groups: in the places of `nn.Conv3d`, for libraries that build a layer from another's
            class; what the operator has by itself, or left out.
        bias: as in `nn.Conv3d`.
        temporal_padding: what stands in for missing frames, `"replicate"` or `"zeros"`: see `Neighbours`.

    Attributes:
        neighbours: which frames the operator sees.
        ways: how its convolution may be evaluated; the first one that serves is taken.

    Raises:
        ValueError: for an even `kernel_size`, an unknown `temporal_padding`, or settings that are not the operator's.
    """

    slices: tuple[str, ...]
    anchor: int
    differences = False
    temporal_stride = 1
    neighbours: Neighbours
    ways: Sequence[Way] = TEMPORAL
    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] | None = None,
        padding: int | tuple[int, int, int] | None = None,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        temporal_padding: str = "replicate",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        taps, size, width = kernel_size if isinstance(kernel_size, tuple) else (len(self.slices), kernel_size, kernel_size)
        if size % 2 == 0 or width != size:
            raise ValueError(f"kernel_size is {kernel_size}, it must be odd so that frames keep their size: pass 1, 3, …")
        if taps not in (1, len(self.slices)):
            raise ValueError(f"kernel_size is {kernel_size}, {type(self).__name__} has {len(self.slices)} taps, or 1")
        if taps == 1:
            self.slices, self.anchor = self.slices[self.anchor :][:1], 0
        own = {
            "stride": (self.temporal_stride if taps > 1 else 1, 1, 1),
            "padding": (0, size // 2, size // 2),
            "dilation": (1, 1, 1),
        }
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
            if value is not None and (value if isinstance(value, tuple) else (value,) * 3) != own[name]:
                raise ValueError(f"{name} is {value}, {type(self).__name__} has {own[name]}: leave it out")
        if groups != 1:
            raise ValueError(f"groups is {groups}, {type(self).__name__} convolves all channels at once: leave it out")
        super().__init__(in_channels, out_channels, (taps, size, size), **own, bias=bias, device=device, dtype=dtype)
        self.neighbours = Neighbours(temporal_padding)

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

    def kernel(self, *slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The taps of the plain convolution that the slices stand for; subclasses name their slices."""
        return slices

    def plain_kernel(self) -> torch.Tensor:
        """The kernel of the plain convolution that this layer equals, `(out, in, taps, k, k)`. Differentiable."""
        if not self.differences or len(self.slices) == 1:
            return self.weight
        return torch.stack(self.kernel(*self.weight.unbind(2)), dim=2)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None = None, group: int | None = None) -> torch.Tensor:
        """Convolve frames as `nn.Conv3d` does, or with the neighbours of the operator.

        Args:
            x: `(B, C, T, H, W)`.
            past: the frames before, as `neighbours.state` gives them; None at the start. Only with `group`.
            group: how many frames see each other, `neighbours.group(x)`. None: x holds all neighbours itself, and the
                convolution, without temporal padding, has `taps - 1` frames fewer.

        Returns:
            `(B, C_out, T', H, W)`.
        """
        return Direct().convolve(self, x) if group is None else evaluate(self, x, past, group)

    def stream(self, x: torch.Tensor, past: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the operator to the next chunk of a clip: see `stream`, the function."""
        return stream(self, self.neighbours, x, past)

    @classmethod
    def _operator(cls) -> str:
        """The operator's class here, whatever has been derived from it: FSDP and parametrizations do that too."""
        return next(base.__name__ for base in cls.__mro__ if "slices" in vars(base))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """State dicts say which operator their slices are of: they have one name and one shape in all."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["operator"] = self._operator()

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: dict, *args: Any) -> None:
        """As in `nn.Module`; slices of another operator are an error, for they would be another function here."""
        own, given, errors = self._operator(), local_metadata.get("operator"), args[-1]
        if given in (None, own) or len(self.slices) == 1 or prefix + "weight" not in state:
            super()._load_from_state_dict(state, prefix, local_metadata, *args)
            return
        errors.append(
            f"{prefix}weight is of a {given}, this layer is a {own}: load it into a model of that operator, which "
            "`apply_tdc` or `remove_tdc` then converts to its twin"
        )

    @property
    def temporal_padding(self) -> str:
        """What stands in for a missing frame."""
        return self.neighbours.padding

    def inference_ways(self) -> Sequence[Way]:
        """For whole groups of frames that are not few, and for a static one."""
        if len(self.slices) == 1:
            return (Direct(),)
        frame = self.weight.detach()[:1, :, :1, :1, :1]  # of the size of one pixel, repeated without a copy
        clip = frame.expand(-1, -1, self.neighbours.size, 64, 64)
        return choose(self, clip, frame, self.neighbours.size), choose(self, frame)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slices={self.slices}, temporal_padding={self.temporal_padding}"


def stream(
    layer: nn.Module, neighbours: Neighbours, x: torch.Tensor, past: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply an operator to the next chunk of a clip.

    Args:
        layer: an operator; or what stands in its place (what LoRA makes of it, a layer of another class), which needs
            nothing but the contract of `nn.Conv3d` without temporal padding: the neighbours are then laid out for it.
        neighbours: which frames see each other.
        x: `(B, C, T, H, W)`, whole groups, or fewer frames than one.
        past: what the call before returned; None at the start.

    Returns:
        The output, `(B, C_out, T, H, W)`, half as many frames for `Pairs`; and `past` for the next chunk.

    Raises:
        ValueError: if x does not hold whole groups.
    """
    group = neighbours.group(x)
    if isinstance(layer, TemporalConv3d):
        y = layer(x, past, group)
    else:
        y = neighbours.frames(layer(neighbours.clips(x, past, group)), x.shape[0])
    return y, neighbours.state(x, past)


class CausalConv3d(TemporalConv3d):
    """Causal convolution (Eq. 1): a frame sees itself and the two before it. Arguments: see `TemporalConv3d`."""

    slices = ("t-2", "t-1", "current")
    anchor = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.neighbours = Causal(self.neighbours.padding)


class CausalTDC(CausalConv3d):
    """Causal TDC (Eq. 7): `W_t*X_t + W_{t-1}*(X_{t-1} - X_t) + W_{t-2}*(X_{t-2} - X_t)`. Arguments of its plain twin."""

    slices = ("t-2", "t-1", "anchor")
    differences = True

    def kernel(self, before: torch.Tensor, past: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return before, past, anchor - (before + past)


class GroupCausalConv3d(TemporalConv3d):
    """Group causal convolution (Eq. 2): a frame sees its neighbours in its group and the last frame of the group before.

    Args:
        group_size: frames a group. A chunk holds whole groups; a chunk of fewer frames than one group is one short group.
        Others: see `TemporalConv3d`.
    """

    slices = ("past", "current", "future")
    anchor = 1
    neighbours: Group

    def __init__(self, *args, group_size: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.neighbours = Group(self.neighbours.padding, group_size)

    @property
    def group_size(self) -> int:
        """Frames a group."""
        return self.neighbours.size


class GroupCausalTDC(GroupCausalConv3d):
    """Group causal TDC (Eq. 5): `W_a*X_t + W_p*(X_{t-1} - X_t) + W_f*(X_{t+1} - X_t)`. Arguments of its plain twin."""

    slices = ("past", "anchor", "future")
    differences = True

    def kernel(self, past: torch.Tensor, anchor: torch.Tensor, future: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return past, anchor - (past + future), future

    def components(
        self, x: torch.Tensor, past: torch.Tensor | None = None, group: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The terms of Eq. 5 apart (Fig. 5): with the bias, their sum is the operator's result.

        Args:
            x, past: as for `stream`.
            group: as for `forward`; None asks the neighbours.

        Returns:
            `(B, C_out, T, H, W)` by slice: `anchor` is `W_a*X_t`, `past` and `future` are what the differences add.
        """
        clips = self.neighbours.clips(x, past, group or self.neighbours.group(x))
        before, current, after = clips[:, :, :-2], clips[:, :, 1:-1], clips[:, :, 2:]
        inputs = {"past": before - current, "anchor": current, "future": after - current}
        kernels = zip(self.slices, self.weight.split(1, dim=2), strict=True)
        terms = {name: nn.functional.conv3d(inputs[name], kernel, padding=self.padding) for name, kernel in kernels}
        return {name: self.neighbours.frames(term, x.shape[0]) for name, term in terms.items()}


class TemporalInteractionConv3d(TemporalConv3d):
    """Temporal downsampling by a plain convolution over pairs of frames, kernel 2, stride 2 (Sec. 3.2).

    T frames become T / 2; a single frame is its own past and gives one. Arguments: see `TemporalConv3d`.
    """

    slices = ("past", "current")
    anchor = 1
    temporal_stride = 2

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int] = 1, *args, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.neighbours = Pairs(self.neighbours.padding)


class TemporalInteractionTDC(TemporalInteractionConv3d):
    """Temporal interaction TDC (Eq. 6): `W_a*X_a + W_p*(X_p - X_a)`, the later frame of a pair being the anchor."""

    slices = ("past", "anchor")
    differences = True

    def kernel(self, past: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return past, anchor - past
