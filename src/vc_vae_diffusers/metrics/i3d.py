"""The I3D network (Carreira & Zisserman, 2017) with its 400 Kinetics logits, the features of FVD.

Batch norms are folded into the convolutions (at inference they are one affine map), so every unit is a convolution and
a ReLU. Padding is TensorFlow's "SAME", which depends on the length of the input and is uneven for even ones: symmetric
padding, as nn.Conv3d has it, gives other features.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .weights import I3D_KINETICS400, find_weights, read_tensors, verify_file

NUM_CLASSES = 400
INPUT_SIZE = 224
MIN_FRAMES = 9


def _pad_same(x: torch.Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Zero-pad (B, C, T, H, W) so that the output length is ceil(length / stride), the odd zero at the end.

    Zeros serve max pooling too: what is pooled here has passed a ReLU.
    """
    padding = []
    for length, kernel, step in zip(reversed(x.shape[2:]), reversed(kernel_size), reversed(stride), strict=True):
        total = max((-(-length // step) - 1) * step + kernel - length, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


class Unit3D(nn.Conv3d):
    """Convolution with "SAME" padding, then ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(_pad_same(x, self.kernel_size, self.stride)))


class MaxPool3D(nn.MaxPool3d):
    """Max pooling of non-negative values with "SAME" padding."""

    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(_pad_same(x, self.kernel_size, self.stride))


class InceptionBlock(nn.Module):
    """Four branches side by side: 1x1x1; 1x1x1 and 3x3x3, twice; 3x3x3 pooling and 1x1x1.

    Args:
        in_channels: channels of the input.
        channels: output channels of branches 0a, 1a, 1b, 2a, 2b and 3b.
    """

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int]):
        super().__init__()
        out_0a, out_1a, out_1b, out_2a, out_2b, out_3b = channels
        self.branch_0a = Unit3D(in_channels, out_0a, 1)
        self.branch_1a = Unit3D(in_channels, out_1a, 1)
        self.branch_1b = Unit3D(out_1a, out_1b, 3)
        self.branch_2a = Unit3D(in_channels, out_2a, 1)
        self.branch_2b = Unit3D(out_2a, out_2b, 3)
        self.pool_3a = MaxPool3D((3, 3, 3), (1, 1, 1))
        self.branch_3b = Unit3D(in_channels, out_3b, 1)
        self.out_channels = out_0a + out_1b + out_2b + out_3b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch_0a(x),
            self.branch_1b(self.branch_1a(x)),
            self.branch_2b(self.branch_2a(x)),
            self.branch_3b(self.pool_3a(x)),
        ]
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """I3D for RGB clips: (B, 3, T, 224, 224) in [-1, 1], T >= 9, to (B, 400) logits averaged over time."""

    def __init__(self):
        super().__init__()
        self.conv_1a = Unit3D(3, 64, 7, stride=2)
        self.pool_2a = MaxPool3D((1, 3, 3), (1, 2, 2))
        self.conv_2b = Unit3D(64, 64, 1)
        self.conv_2c = Unit3D(64, 192, 3)
        self.pool_3a = MaxPool3D((1, 3, 3), (1, 2, 2))
        self.mixed_3b = InceptionBlock(192, (64, 96, 128, 16, 32, 32))
        self.mixed_3c = InceptionBlock(256, (128, 128, 192, 32, 96, 64))
        self.pool_4a = MaxPool3D((3, 3, 3), (2, 2, 2))
        self.mixed_4b = InceptionBlock(480, (192, 96, 208, 16, 48, 64))
        self.mixed_4c = InceptionBlock(512, (160, 112, 224, 24, 64, 64))
        self.mixed_4d = InceptionBlock(512, (128, 128, 256, 24, 64, 64))
        self.mixed_4e = InceptionBlock(512, (112, 144, 288, 32, 64, 64))
        self.mixed_4f = InceptionBlock(528, (256, 160, 320, 32, 128, 128))
        self.pool_5a = MaxPool3D((2, 2, 2), (2, 2, 2))
        self.mixed_5b = InceptionBlock(832, (256, 160, 320, 32, 128, 128))
        self.mixed_5c = InceptionBlock(832, (384, 192, 384, 48, 128, 128))
        self.pool_6a = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = nn.Conv3d(1024, NUM_CLASSES, 1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of preprocessed clips.

        Args:
            video: (B, 3, T, 224, 224) in [-1, 1].

        Returns:
            (B, 400).

        Raises:
            ValueError: for fewer than 9 frames (nothing is left to average over) or another size.
        """
        _check_input(video)
        x = self.pool_2a(self.conv_1a(video))  # (B, 64, T/2, 56, 56)
        x = self.pool_3a(self.conv_2c(self.conv_2b(x)))  # (B, 192, T/2, 28, 28)
        x = self.pool_4a(self.mixed_3c(self.mixed_3b(x)))  # (B, 480, T/4, 14, 14)
        x = self.mixed_4f(self.mixed_4e(self.mixed_4d(self.mixed_4c(self.mixed_4b(x)))))
        x = self.mixed_5c(self.mixed_5b(self.pool_5a(x)))  # (B, 1024, T/8, 7, 7)
        return self.logits(self.pool_6a(x)).mean(dim=(2, 3, 4))


def _check_input(video: torch.Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (INPUT_SIZE, INPUT_SIZE):
        raise ValueError(
            f"video has shape {tuple(video.shape)}, but I3D reads (B, 3, T, {INPUT_SIZE}, {INPUT_SIZE}); "
            "use metrics.fvd.preprocess"
        )
    if video.shape[2] < MIN_FRAMES:
        raise ValueError(f"video has {video.shape[2]} frames, but I3D needs at least {MIN_FRAMES}; use longer clips for FVD")


def load_i3d(
    path: str | os.PathLike | None = None, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """I3D with its Kinetics-400 weights, frozen and in eval mode.

    Args:
        path: a weight file or folder; without it the places of :func:`vc_vae_diffusers.metrics.weights.find_weights`. Either
            the TorchScript file that the field's scripts use, or its counterpart in safetensors.
        device: where to put it.

    Returns:
        A function from (B, 3, T, 224, 224) in [-1, 1] to (B, 400) float32 logits.

    Raises:
        MissingWeightsError: if neither file is found.
        WeightsChecksumError: if the file is not the expected one.
    """
    found, file = find_weights(I3D_KINETICS400, path)
    if file is I3D_KINETICS400.official:
        return wrap_torchscript(torch.jit.load(str(verify_file(found, file)), map_location=device))
    with torch.device("meta"):
        network = I3D()
    network.load_state_dict(read_tensors(found, file), strict=True, assign=True)
    return network.requires_grad_(False).eval().to(device)


def wrap_torchscript(script: torch.jit.ScriptModule) -> Callable[[torch.Tensor], torch.Tensor]:
    """Call the published TorchScript I3D as :class:`I3D` is called: no rescaling or resizing of its own, raw logits."""
    script = script.eval()

    def logits(video: torch.Tensor) -> torch.Tensor:
        _check_input(video)
        return script(video, rescale=False, resize=False, return_features=True)

    return logits
