"""The network of VC-VAE: blocks, encoder and decoder (Fig. 2).

Module names are those of diffusers' `AutoencoderKL`, so that image weights inflate by name (Sec. 3.2). Every module maps
`(x, cache)` to `(y, cache)`, where x is a chunk of whole groups `(B, C, T, H, W)` and the cache holds the last frames that
each temporal layer saw: whole clips, chunks and streams go one way. Norm, activation, attention and spatial resampling work
frame by frame, for with statistics over time neither causality nor chunked processing would hold.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import Attention
from torch import nn

from ..operators.frame_conv import FrameConv2d, PointConv2d, UpsampledConv2d, upsample
from ..operators.frames import interleave, per_frame
from ..operators.neighbours import Pairs
from ..operators.norm import FrameNorm
from ..operators.tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalConv3d,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
    stream,
)

# The state of a stream: a tensor a temporal layer, nested as the modules are, in a list where there are tiles; None before
# the first chunk. What modules return is made of tuples.
Cache = tuple | deque | list | torch.Tensor | None


def given_away(cache: Cache) -> Cache:
    """A cache that nobody else keeps, as queues: each state is forgotten when the layer that takes it has made the next."""
    return deque(map(given_away, cache)) if isinstance(cache, tuple) else cache


def kept(cache: Cache) -> Cache:
    """A cache that stays as it is when a chunk takes it."""
    if isinstance(cache, list):
        return [kept(tile) for tile in cache]
    return tuple(map(kept, cache)) if isinstance(cache, deque) else cache


def states_of(cache: Cache, count: int) -> deque:
    """The states in a cache, to be taken one by one; a cache that was given away loses them."""
    return cache if isinstance(cache, deque) else deque(cache or (None,) * count)


@dataclass(frozen=True)
class TemporalDesign:
    """Which temporal operators the network is made of (Table 4): see the configuration of `AutoencoderKLVCVAE`."""

    operator: str = "tdc"
    causality: str = "group"
    padding: str = "replicate"

    def conv(self, in_channels: int, out_channels: int, group_size: int) -> TemporalConv3d:
        """A 3x3x3 temporal operator for frames that come in groups of `group_size`."""
        if self.causality == "group":
            layer = GroupCausalTDC if self.operator == "tdc" else GroupCausalConv3d
            return layer(in_channels, out_channels, group_size=group_size, temporal_padding=self.padding)
        causal = CausalTDC if self.operator == "tdc" else CausalConv3d
        return causal(in_channels, out_channels, temporal_padding=self.padding)

    def downsample(self, channels: int) -> TemporalInteractionConv3d:
        """The temporal interaction, which halves the number of frames."""
        layer_class = TemporalInteractionTDC if self.operator == "tdc" else TemporalInteractionConv3d
        layer = layer_class(channels, channels, temporal_padding=self.padding)
        with torch.no_grad():  # Eq. 3: the later frame of a pair is selected as it is
            layer.weight.zero_()[:, :, layer.anchor, 0, 0] = torch.eye(channels, device=layer.weight.device)
            nn.init.zeros_(cast(torch.Tensor, layer.bias))
        return layer


def is_watched(*modules: nn.Module) -> bool:
    """Whether a hook of the user sees what goes through modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(nn.modules.module._global_forward_hooks) or any(getattr(m, kind) for m in modules for kind in kinds)


def can_overwrite(*modules: nn.Module) -> bool:
    """Whether the outputs of modules may be overwritten: neither autograd nor a hook of the user keeps them."""
    return not torch.is_grad_enabled() and not is_watched(*modules)


def normalised(x: torch.Tensor, norm: FrameNorm, activation: nn.Module) -> torch.Tensor:
    """Norm and activation, frame by frame; both at once if nobody sees what is between them."""
    if not isinstance(norm, FrameNorm):  # another one that was put in its place
        return activation(per_frame(norm, x))
    if isinstance(activation, nn.SiLU) and not is_watched(norm, activation):
        return norm(x, silu=True)
    return activation(norm(x))


class ResnetBlock(nn.Module):
    """`AutoencoderKL`'s residual block with temporal operators for its two 3x3 convolutions (Fig. 2b)."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, act_fn: str, design: TemporalDesign, group_size: int
    ):
        super().__init__()
        self.norm1 = FrameNorm(groups, in_channels, eps=1e-6)
        self.conv1 = design.conv(in_channels, out_channels, group_size)
        self.norm2 = FrameNorm(groups, out_channels, eps=1e-6)
        self.conv2 = design.conv(out_channels, out_channels, group_size)
        self.neighbours = self.conv1.neighbours  # here, for LoRA and others put layers in the place of the operators
        self.nonlinearity = get_activation(act_fn)
        self.conv_shortcut = PointConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        states = states_of(cache, 2)
        h = normalised(x, self.norm1, self.nonlinearity)
        h, cache1 = stream(self.conv1, self.neighbours, h, states.popleft())
        h = normalised(h, self.norm2, self.nonlinearity)
        h, cache2 = stream(self.conv2, self.neighbours, h, states.popleft())
        if self.conv_shortcut is not None:
            x = per_frame(self.conv_shortcut, x)
        return (h.add_(x) if can_overwrite(self.conv2) else x + h), (cache1, cache2)


class SpatialDownsample(nn.Module):
    """Halve H and W of every frame: 3x3 convolution, stride 2, padded right and below."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return per_frame(self.conv, F.pad(x.movedim(1, -1), (0, 0, 0, 1, 0, 1)).movedim(-1, 1))


class SpatialUpsample(nn.Module):
    """Double H and W of every frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return per_frame(lambda frames: upsample(self.conv, frames), x)


class TwoFramesConv(PointConv2d):
    """A 1x1 convolution C -> 2C that makes two frames of one."""

    bias: nn.Parameter

    def forward(self, x: torch.Tensor, equal_once: bool = False) -> torch.Tensor:
        """Map `(N, C, H, W)` to `(N, 2C, H, W)`; with `equal_once` to `(N, C, H, W)` if both halves are equal."""
        if equal_once and all(torch.equal(*parameter.chunk(2)) for parameter in self.parameters()):
            return F.conv2d(x, self.weight[: self.in_channels], self.bias[: self.in_channels])
        return super().forward(x)


class TemporalUpsample(nn.Module):
    """Double the number of frames: a convolution C -> 2C and a pixel shuffle in time.

    Args:
        channels: of the frames.
        group_size: how many of them a group has before.
    """

    def __init__(self, channels: int, group_size: int):
        super().__init__()
        self.conv = TwoFramesConv(channels, 2 * channels, 1)
        with torch.no_grad():  # Eq. 4: both frames are the one they come from
            self.conv.weight.flatten(1).copy_(torch.eye(channels, device=self.conv.weight.device).repeat(2, 1))
            self.conv.bias.zero_()
        self.group_size = group_size

    def forward(self, x: torch.Tensor, first_frame_alone: bool = False, still: bool = False) -> torch.Tensor:
        """Map `(B, C, T, H, W)` to `(B, C, 2T, H, W)`; with `first_frame_alone`, one frame to its later half, one frame.

        With `still`, a single frame stands for its whole group, all of whose frames are equal. It stays one frame if both
        halves are equal as well, as they are until motion is trained.
        """
        single = still and x.shape[2] == 1 and isinstance(self.conv, TwoFramesConv)  # not what quantisation puts there
        y = per_frame(functools.partial(self.conv, equal_once=True) if single else self.conv, x)
        if y.shape[1] == x.shape[1]:
            return y
        halves = y.chunk(2, dim=1)
        if first_frame_alone:
            return halves[1]
        return interleave(halves * (self.group_size // x.shape[2] if still else 1))


class DownBlock(nn.Module):
    """A stage of the encoder: residual blocks, then spatial and temporal downsampling."""

    def __init__(self, resnets: list[ResnetBlock], spatial: SpatialDownsample | None, temporal: TemporalConv3d | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([spatial]) if spatial is not None else None
        self.temporal_downsampler, self.pairs = temporal, Pairs() if temporal is None else temporal.neighbours

    def forward(self, x: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        x, cache = run_in_order(self.resnets, x, cache)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
        if self.temporal_downsampler is not None:
            x, _ = stream(self.temporal_downsampler, self.pairs, x)
        return x, cache


class UpBlock(nn.Module):
    """A stage of the decoder: residual blocks, then spatial and temporal upsampling."""

    def __init__(self, resnets: list[ResnetBlock], spatial: SpatialUpsample | None, temporal: TemporalUpsample | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([spatial]) if spatial is not None else None
        self.temporal_upsampler = temporal

    def forward(
        self, x: torch.Tensor, cache: Cache = None, first_frame_alone: bool = False, still: bool = False
    ) -> tuple[torch.Tensor, Cache]:
        x, cache = run_in_order(self.resnets, x, cache)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x)
        if self.temporal_upsampler is not None:
            x = self.temporal_upsampler(x, first_frame_alone, still)
        return x, cache


class MidBlock(nn.Module):
    """Two residual blocks with self-attention within each frame between them."""

    def __init__(self, channels: int, groups: int, act_fn: str, attention: bool, design: TemporalDesign):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, act_fn, design, 1) for _ in range(2)])
        self.attentions = nn.ModuleList()
        if attention:
            self.attentions.append(
                Attention(
                    channels,
                    heads=1,
                    dim_head=channels,
                    norm_num_groups=groups,
                    eps=1e-6,
                    residual_connection=True,
                    bias=True,
                    upcast_softmax=True,
                    _from_deprecated_attn_block=True,
                )
            )

    def forward(self, x: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        states = states_of(cache, 2)
        x, first = self.resnets[0](x, states.popleft())
        for attention in self.attentions:
            x = per_frame(attention, x)
        x, second = self.resnets[1](x, states.popleft())
        return x, (first, second)


def run_in_order(layers: Iterable[nn.Module], x: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
    """Thread x through layers that each keep their own state."""
    layers = list(layers)
    states, following = states_of(cache, len(layers)), []
    for layer in layers:
        x, state = layer(x, states.popleft())
        following.append(state)
    return x, tuple(following)


class Encoder(nn.Module):
    """Frames to moments (Fig. 2d, left): `(B, 3, r_t*n, H, W)` to `(B, 2*latent_channels, n, H/r_s, W/r_s)`."""

    _gradient_checkpointing_func: Callable  # set by `enable_gradient_checkpointing`

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
        temporal_downsample: tuple[bool, ...],
        design: TemporalDesign,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        group_size = 2 ** sum(temporal_downsample)
        channels = block_out_channels[0]
        self.conv_in = design.conv(in_channels, channels, group_size)
        self.neighbours_in = self.conv_in.neighbours
        self.down_blocks = nn.ModuleList()
        for stage, out_channels in enumerate(block_out_channels):
            inputs = [channels] + [out_channels] * (layers_per_block - 1)
            resnets = [ResnetBlock(c, out_channels, norm_num_groups, act_fn, design, group_size) for c in inputs]
            last = stage == len(block_out_channels) - 1
            temporal = not last and temporal_downsample[stage]
            self.down_blocks.append(
                DownBlock(
                    resnets,
                    None if last else SpatialDownsample(out_channels),
                    design.downsample(out_channels) if temporal else None,
                )
            )
            group_size = group_size // 2 if temporal else group_size
            channels = out_channels
        self.mid_block = MidBlock(channels, norm_num_groups, act_fn, mid_block_add_attention, design)
        self.conv_norm_out = FrameNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_act = get_activation(act_fn)
        self.conv_out = design.conv(channels, 2 * latent_channels, 1)
        self.neighbours_out = self.conv_out.neighbours

    def forward(self, x: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        states = states_of(cache, len(self.down_blocks) + 3)
        x, first = stream(self.conv_in, self.neighbours_in, x, states.popleft())
        stages = []
        for block in (*self.down_blocks, self.mid_block):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, state = self._gradient_checkpointing_func(block, x, states.popleft())
            else:
                x, state = block(x, states.popleft())
            stages.append(state)
        x = normalised(x, self.conv_norm_out, self.conv_act)
        x, last = stream(self.conv_out, self.neighbours_out, x, states.popleft())
        return x, (first, *stages, last)


class Decoder(nn.Module):
    """Latents to frames (Fig. 2d, right): `(B, latent_channels, n, h, w)` to `(B, 3, r_t*n, r_s*h, r_s*w)`."""

    _gradient_checkpointing_func: Callable  # set by `enable_gradient_checkpointing`

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
        temporal_upsample: tuple[bool, ...],
        design: TemporalDesign,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        group_size = 1
        channels = block_out_channels[-1]
        self.conv_in = design.conv(latent_channels, channels, group_size)
        self.neighbours_in = self.conv_in.neighbours
        self.mid_block = MidBlock(channels, norm_num_groups, act_fn, mid_block_add_attention, design)
        self.up_blocks = nn.ModuleList()
        for stage, stage_channels in enumerate(reversed(block_out_channels)):
            inputs = [channels] + [stage_channels] * layers_per_block
            resnets = [ResnetBlock(c, stage_channels, norm_num_groups, act_fn, design, group_size) for c in inputs]
            last = stage == len(block_out_channels) - 1
            temporal = not last and temporal_upsample[stage]
            self.up_blocks.append(
                UpBlock(
                    resnets,
                    None if last else SpatialUpsample(stage_channels),
                    TemporalUpsample(stage_channels, group_size) if temporal else None,
                )
            )
            group_size = 2 * group_size if temporal else group_size
            channels = stage_channels
        self.conv_norm_out = FrameNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_act = get_activation(act_fn)
        self.conv_out = design.conv(channels, out_channels, group_size)
        self.neighbours_out = self.conv_out.neighbours
        self.group_size = group_size
        self.keeps_still = design.padding == "replicate"  # without differences, all frames stay equal

    def forward(
        self, z: torch.Tensor, cache: Cache = None, first_frame_alone: bool = False, still: bool = False
    ) -> tuple[torch.Tensor, Cache]:
        """Decode a chunk; `first_frame_alone` (Table 6's separate first frame) maps its one latent frame to one frame.

        With `still`, z is a clip of one latent frame, and one frame stands for its group as long as all are equal: on CPUs,
        where a look at the weights stops nothing.
        """
        still = still and self.keeps_still and z.device.type == "cpu"
        still = still and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        states = states_of(cache, len(self.up_blocks) + 3)
        checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        x, first = stream(self.conv_in, self.neighbours_in, z, states.popleft())
        if checkpointed:
            x, middle = self._gradient_checkpointing_func(self.mid_block, x, states.popleft())
        else:
            x, middle = self.mid_block(x, states.popleft())
        stages = []
        for block in self.up_blocks:
            if checkpointed:
                x, state = self._gradient_checkpointing_func(block, x, states.popleft(), first_frame_alone)
            else:
                x, state = block(x, states.popleft(), first_frame_alone, still)
            stages.append(state)
        x = normalised(x, self.conv_norm_out, self.conv_act)
        x, last = stream(self.conv_out, self.neighbours_out, x, states.popleft())
        if still and x.shape[2] == 1:
            x = x.expand(-1, -1, self.group_size, -1, -1)
        return x, (first, middle, *stages, last)
