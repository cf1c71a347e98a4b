"""The convolution limit: the time of a model's convolutions alone, evaluated directly, with nothing between them.

A model can only be faster than this by doing less arithmetic than its definition says, as temporal Winograd does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.blocks import MidBlock, ResnetBlock
from vc_vae_diffusers.operators.tdc import GroupCausalConv3d, TemporalConv3d

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Convolution:
    """One call: shapes with batch and channels, strides of the input in memory, and the weight as the model has it."""

    input_shape: tuple[int, ...]
    input_strides: tuple[int, ...]
    weight: torch.Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        output = 1
        extents = zip(self.input_shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        for size, kernel, stride, padding, dilation in extents:
            output *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return 2 * self.input_shape[0] * output * self.weight.numel()

    def run(self, x: torch.Tensor) -> None:
        convolve = F.conv3d if len(self.input_shape) == 5 else F.conv2d
        convolve(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class ConvolutionLimit:
    """Convolutions ready to be run one after the other.

    Args:
        calls: in their order. Inputs of equal shape and layout share one random tensor.
    """

    def __init__(self, calls: list[Convolution]):
        self.calls = calls
        self.flops = sum(call.flops for call in calls)
        self._inputs: dict[tuple, torch.Tensor] = {}
        for call in calls:
            key = (call.input_shape, call.input_strides)
            if key not in self._inputs:
                x = torch.empty_strided(*key, dtype=call.weight.dtype, device=call.weight.device)
                self._inputs[key] = x.normal_()

    def run(self) -> None:
        """Run all of them once."""
        for call in self.calls:
            call.run(self._inputs[call.input_shape, call.input_strides])


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[Convolution] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, _, groups = args
            if transposed:
                raise ValueError("the model has a transposed convolution, which the convolution limit does not know")
            shape, strides = tuple(x.shape), x.stride()
            self.calls.append(Convolution(shape, strides, weight, tuple(stride), tuple(padding), tuple(dilation), groups))
        return func(*args, **(kwargs or {}))


def record_convolutions(vae: ModelMixin, operation: str, x: torch.Tensor) -> list[Convolution]:
    """The convolutions that a peer makes, with the very weights and layouts."""
    with torch.no_grad(), _Recorder() as recorder:
        if operation == "encode":
            vae.encode(x)
        else:
            vae.decode(x)
    return recorder.calls


def direct_convolutions(vae: AutoencoderKLVCVAE, operation: str, x: torch.Tensor) -> list[Convolution]:
    """The convolutions of a VC-VAE's definition, whatever way it takes to evaluate them.

    A group of `g` frames takes three taps for `g - 1` of them and two for its last one, whose future is missing; the
    convolution after nearest-neighbour upsampling works at the larger size. Chunks are those of the model.

    Args:
        x: the clip or the latents that the operation is called with, of whole groups.

    Raises:
        ValueError: for `first_frame="separate"`, or frames that are no whole groups.
    """
    if vae.config.first_frame != "in_sequence":
        raise ValueError("first_frame is 'separate': the convolution limit is counted for 'in_sequence'")
    group = vae.temporal_compression_ratio if operation == "encode" else 1
    if x.shape[2] % group != 0:
        raise ValueError(f"x has {x.shape[2]} frames, not whole groups of {group}: pass a multiple")
    calls: list[Convolution] = []
    weights: dict[tuple[int, int], torch.Tensor] = {}
    for start in range(0, x.shape[2], group * vae.groups_per_chunk):
        frames = min(group * vae.groups_per_chunk, x.shape[2] - start)
        walk = _Walk(x.shape[0], frames, *x.shape[3:], calls, weights)
        if operation == "encode":
            walk.encoder(vae)
        else:
            walk.decoder(vae)
    return calls


@dataclass
class _Walk:
    """Follows a chunk of `frames` through the network and notes the convolutions on its way."""

    batch: int
    frames: int
    height: int
    width: int
    calls: list[Convolution]
    weights: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def encoder(self, vae: AutoencoderKLVCVAE) -> None:
        network = vae.encoder
        self.temporal(network.conv_in)
        for block in network.down_blocks:
            for resnet in block.resnets:
                self.resnet(resnet)
            if block.downsamplers is not None:
                kernel = self.kernel(block.downsamplers[0].conv)
                self.add(kernel, 1, (self.height + 1, self.width + 1), 2, 0)
                self.height, self.width = self.height // 2, self.width // 2
            if block.temporal_downsampler is not None:
                kernel = self.kernel(block.temporal_downsampler, 2)
                self.add(kernel, self.frames, (self.height, self.width), 1, 0, time_stride=2)
                self.frames //= 2
        self.middle(network.mid_block)
        self.temporal(network.conv_out)
        if vae.quant_conv is not None:
            self.per_frame(vae.quant_conv)

    def decoder(self, vae: AutoencoderKLVCVAE) -> None:
        network = vae.decoder
        if vae.post_quant_conv is not None:
            self.per_frame(vae.post_quant_conv)
        self.temporal(network.conv_in)
        self.middle(network.mid_block)
        for block in network.up_blocks:
            for resnet in block.resnets:
                self.resnet(resnet)
            if block.upsamplers is not None:
                self.height, self.width = 2 * self.height, 2 * self.width
                self.per_frame(block.upsamplers[0].conv)
            if block.temporal_upsampler is not None:
                self.per_frame(block.temporal_upsampler.conv)
                self.frames *= 2
        self.temporal(network.conv_out)

    def middle(self, block: MidBlock) -> None:
        for resnet in block.resnets:
            self.resnet(resnet)

    def resnet(self, block: ResnetBlock) -> None:
        self.temporal(block.conv1)
        self.temporal(block.conv2)
        if block.conv_shortcut is not None:
            self.per_frame(block.conv_shortcut)

    def per_frame(self, conv: nn.Module) -> None:
        self.add(self.kernel(conv), 1, (self.height, self.width), 1, conv.kernel_size[-1] // 2)

    def temporal(self, layer: TemporalConv3d) -> None:
        size, padding = (self.height, self.width), layer.kernel_size[1] // 2
        if not isinstance(layer, GroupCausalConv3d):
            self.add(self.kernel(layer, 3), self.frames + 2, size, 1, padding)
            return
        group = min(layer.group_size, self.frames)
        if group > 1:
            self.add(self.kernel(layer, 3), group + 1, size, 1, padding, windows=self.frames // group)
            self.add(self.kernel(layer, 2), 2, size, 1, padding, windows=self.frames // group)
        else:
            self.add(self.kernel(layer, 2), self.frames + 1, size, 1, padding)

    def kernel(self, layer: nn.Module, taps: int = 1) -> torch.Tensor:
        """A kernel of a layer's size, 2-D for one tap: its values do not matter, but every layer has its own."""
        key = (id(layer), taps)
        if key not in self.weights:
            weight = layer.weight[:, :, :taps] if taps > 1 else layer.weight
            weight = weight[:, :, 0] if taps == 1 and weight.ndim == 5 else weight
            weight = weight.clone(memory_format=torch.contiguous_format)
            self.weights[key] = weight.contiguous(memory_format=_LAYOUTS[weight.ndim])
        return self.weights[key]

    def add(
        self,
        weight: torch.Tensor,
        frames: int,
        size: tuple[int, int],
        stride: int,
        padding: int,
        *,
        windows: int = 1,
        time_stride: int = 1,
    ) -> None:
        """Note a convolution in the channels-last layout; 4-D weights work frame by frame on the chunk."""
        if weight.ndim == 4:
            shape = (self.batch * self.frames, weight.shape[1], *size)
            strides, paddings = (stride, stride), (padding, padding)
        else:
            shape = (self.batch * windows, weight.shape[1], frames, *size)
            strides, paddings = (time_stride, stride, stride), (0, padding, padding)
        memory = torch.empty(shape, device="meta").contiguous(memory_format=_LAYOUTS[weight.ndim]).stride()
        self.calls.append(Convolution(shape, memory, weight, strides, paddings, (1,) * len(strides), 1))
