"""2-D convolutions of frames: packed kernels against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from equations import DTYPES, assert_near, frames_like
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers.operators.evaluation.packing import FrameConv, can_pack


def convolution(dtype: torch.dtype, stride: int = 1, size: int = 3) -> FrameConv:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, size, size).to(dtype) / 5
    return FrameConv(weight, torch.randn(6).to(dtype), stride, size // 2 if stride == 1 else 0)


def expected_of(conv: FrameConv, frames: torch.Tensor) -> torch.Tensor:
    x = frames.double().flatten(0, -4).permute(0, 3, 1, 2)
    y = F.conv2d(x, conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
    return y.permute(0, 2, 3, 1).unflatten(0, frames.shape[:-3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "size"), [(1, 3), (2, 3), (1, 1)])
def test_packed_kernels_give_what_plain_ones_give(dtype, stride, size):
    conv, frames = convolution(dtype, stride, size), frames_like(2, 3, 8, 10, 5, dtype=dtype)
    expected = expected_of(conv, frames)
    with torch.no_grad():
        assert_near(conv(frames), expected, dtype)
        conv.pack()
        assert_near(conv(frames), expected, dtype)
        # Views whose frames are not dense, too.
        assert_near(conv(frames.movedim(-1, 1).contiguous().movedim(1, -1)), expected, dtype)
        assert_near(conv(frames[:, 1:]), expected[:, 1:], dtype)
        sliced = frames[..., 1:9, :].contiguous()
        assert_near(conv(frames[..., 1:9, :]), conv(sliced), dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "bias"), [(3, True), (1, True), (1, False)])
def test_adding_in_place(dtype, packed, size, bias):
    conv, frames = convolution(dtype, size=size), frames_like(2, 3, 8, 10, 5, dtype=dtype)
    expected = expected_of(conv, frames)
    if not bias:
        expected, conv.bias = expected - conv.bias.double(), None
    if packed:
        conv.pack()
    start = frames_like(2, 3, 8, 10, 6, dtype=dtype)
    expected = expected + start
    with torch.no_grad():
        y = start.clone()
        assert conv.add_to(y, frames) is y
        assert_near(y, expected, dtype)
        y = start.movedim(-1, 1).contiguous().movedim(1, -1)  # not dense
        assert_near(conv.add_to(y, frames), expected, dtype)
    if not packed:
        y = start.clone().requires_grad_()
        assert conv.add_to(y, frames) is not y  # autograd needs both


def test_what_can_be_packed():
    assert not can_pack(torch.zeros(1, dtype=torch.float64))
    assert not can_pack(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not can_pack(torch.zeros(1))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_pack(torch.zeros(1))
