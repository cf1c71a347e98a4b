"""2-D layers against PyTorch's, and upsampling with its convolution against one after the other."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from equations import DTYPES, assert_near, frames_like
from torch import nn

from vc_vae_diffusers.operators.evaluation import UPSAMPLING
from vc_vae_diffusers.operators.frame_conv import FrameConv2d, UpsampledConv2d, upsample


def literally(layer: nn.Conv2d, frames: torch.Tensor) -> torch.Tensor:
    """Every pixel twice along both axes, then the convolution."""
    larger = frames.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(larger, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 10)], ids=str)
@pytest.mark.parametrize("ways", [UPSAMPLING, UPSAMPLING[-1:]], ids=["default", "definition"])
def test_upsampling_is_nearest_neighbour_and_convolution(dtype, size, fused, ways):
    torch.manual_seed(0)
    layer, frames = UpsampledConv2d(16, 16, 3, padding=1).to(dtype), frames_like(3, 16, *size, dtype=dtype)
    layer.ways = ways
    expected = literally(layer.double(), frames.double())
    layer.to(dtype)
    if fused:
        layer.fuse()
    with torch.no_grad():
        assert_near(layer(frames, upsampled=True), expected, dtype)
        assert_near(upsample(layer, frames), expected, dtype)


@pytest.mark.parametrize("way", UPSAMPLING)
def test_gradients_of_upsampling(way):
    torch.manual_seed(0)
    layer = UpsampledConv2d(3, 3, 3, padding=1).double()
    layer.ways = (dataclasses.replace(way, always=True) if hasattr(way, "always") else way,)  # on CPUs as well
    frames = frames_like(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    tensors, seed = (frames, layer.weight, layer.bias), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    actual = torch.autograd.grad(layer(frames, upsampled=True), tensors, seed)
    for mine, theirs in zip(actual, torch.autograd.grad(literally(layer, frames), tensors, seed), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_layers_have_the_contract_of_their_parent():
    torch.manual_seed(0)
    x = frames_like(2, 5, 8, 6)
    for layer in (FrameConv2d(5, 6, 3, padding=1), FrameConv2d(5, 6, 3, stride=2), UpsampledConv2d(5, 6, 3, padding=1)):
        plain = nn.Conv2d(5, 6, 3, layer.stride, layer.padding)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), plain(x))
        if isinstance(layer, UpsampledConv2d):
            torch.testing.assert_close(upsample(layer, x), upsample(plain, x))
