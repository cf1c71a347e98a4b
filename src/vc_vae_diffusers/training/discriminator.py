"""The 3-D patch discriminator of Stage II (Sec. 4.1: "an adversarial loss from a 3D discriminator").

Not in the paper: its architecture. This is PatchGAN (Isola et al., 2017) with 3-D convolutions.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class PatchDiscriminator3D(ModelMixin, ConfigMixin):
    """Says of every space-time patch of a clip whether it is real: a map of logits, high for real.

    Convolutions of kernel (3, 4, 4), each followed by a LeakyReLU. The first halves height and width, the next
    ``num_layers - 1`` halve the frames too, two more keep the rate. Frames are padded, so that any T >= 1 passes.

    Normalisation is GroupNorm, per clip: batch normalisation has no statistics of its own at batch 1, ties the clips of
    a batch (real and reconstructed ones) together and differs between processes; spectral normalisation writes its power
    iteration into buffers in every forward, so that resuming and gradient accumulation would change results.

    Args:
        in_channels: channels of the video.
        base_channels: width of the first layer; it doubles in every layer, up to eight times.
        num_layers: how many layers halve height and width.
        norm_num_groups: groups of the normalisation; must divide twice ``base_channels``.

    Raises:
        ValueError: for widths that the groups do not divide, or fewer than one layer.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_num_groups: int = 8) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, but at least one layer must halve the size; use 1 or more")
        if (2 * base_channels) % norm_num_groups:
            raise ValueError(
                f"base_channels is {base_channels}, but norm_num_groups={norm_num_groups} must divide twice that; "
                "change one of them"
            )
        widths = [base_channels * min(2**index, 8) for index in range(num_layers + 1)]
        self.conv_in = nn.Conv3d(in_channels, widths[0], (3, 4, 4), stride=(1, 2, 2), padding=1)
        self.blocks = nn.ModuleList(
            PatchBlock(widths[index - 1], widths[index], 2 if index < num_layers else 1, norm_num_groups)
            for index in range(1, num_layers + 1)
        )
        self.conv_out = nn.Conv3d(widths[-1], 1, (3, 4, 4), padding=1)
        self.activation = nn.LeakyReLU(0.2)
        self.apply(_init_weights)
        # PatchGAN's 0.02 suits 2-D kernels: here it would give logits of 2, beyond the hinge's margin. Near zero, and
        # for every width alike, the discriminator is undecided and both sides of the hinge have a gradient.
        nn.init.normal_(self.conv_out.weight, 0.0, 0.2 / self.conv_out.weight[0].numel() ** 0.5)

    @property
    def min_size(self) -> int:
        """The smallest height and width, in pixels, for which a patch remains."""
        return 3 * 2**self.config.num_layers

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Score the patches of a batch of clips; clips do not influence each other.

        Args:
            video: (B, C, T, H, W) in [-1, 1], any T >= 1.

        Returns:
            Logits (B, 1, t, h, w), for the default three layers t = ceil(T / 4), h = H // 8 - 2, w = W // 8 - 2.

        Raises:
            ValueError: for another number of dimensions, or clips smaller than :attr:`min_size`.
        """
        if video.ndim != 5:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, but the discriminator reads (B, C, T, H, W); "
                "add the missing dimensions"
            )
        if min(video.shape[-2:]) < self.min_size:
            raise ValueError(
                f"video has {video.shape[-2]}x{video.shape[-1]} pixels, but num_layers={self.config.num_layers} needs "
                f"at least {self.min_size}x{self.min_size}; use larger clips or fewer layers"
            )
        x = self.activation(self.conv_in(video))  # (B, C, T, H/2, W/2)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class PatchBlock(nn.Module):
    """Convolution, GroupNorm, LeakyReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 2 halves frames (rounded up), height and width; 1 keeps the frames and trims one pixel off the others.
        norm_num_groups: groups of the normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_num_groups: int):
        super().__init__()
        # No bias: the normalisation has one.
        self.conv = nn.Conv3d(in_channels, out_channels, (3, 4, 4), stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(norm_num_groups, out_channels)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))


def pad_time_explicitly(module: nn.Module) -> None:
    """Make every `Conv3d` of ``module`` pad time by an operation of its own; values and state-dict keys stay.

    Not in the paper: a way round oneDNN (torch 2.15, AVX-512 BF16 processors), whose bfloat16 weight gradient reads
    memory that nothing wrote where a kernel never fits between its temporal padding: 3 taps and padding 1 on 2 frames.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d) and not isinstance(convolution.padding, str) and convolution.padding[0]:
            frames, *space = convolution.padding
            convolution.padding = (0, *space)
            convolution.register_forward_pre_hook(lambda _, args, n=frames: (_zero_frames(args[0], n),))


def _zero_frames(x: torch.Tensor, count: int) -> torch.Tensor:
    zeros = x.new_zeros(*x.shape[:2], count, *x.shape[3:])
    return torch.cat([zeros, x, zeros], dim=2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
