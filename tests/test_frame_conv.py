"""2-D convolutions of frames: packed kernels against PyTorch's, when fused ones serve, upsampling with its convolution."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers.frame_conv import FrameConv, FrameConv2d, UpsampledConv2d, can_pack

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}


def frames_like(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= ROUNDING[dtype] * expected.double().abs().max()


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


LAYERS = {
    "plain": lambda: FrameConv2d(5, 6, 3, padding=1),
    "stride 2": lambda: FrameConv2d(5, 6, 3, stride=2),
    "upsampled": lambda: UpsampledConv2d(5, 5, 3, padding=1),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().eval()


def test_fused_layers_serve_while_they_can(layer):
    frames = frames_like(2, 3, 8, 10, 5)
    expected = layer(frames).detach()
    layer.fuse()
    with torch.no_grad():
        layer.weight.zero_()
        assert_near(layer(frames), expected, torch.float32)  # of the kernels that were fused
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(frames).float().std() < 0.5 * expected.std()  # packed kernels do not know autocast: computed anew
    x = frames.clone().requires_grad_()
    y = layer(x)  # nor gradients, not even of the frames alone
    assert not torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.to(torch.bfloat16),
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.unfuse(),
    ],
    ids=["load", "cast", "copy", "pickle", "unfuse"],
)
def test_what_changes_weights_drops_fused_kernels(layer, change):
    layer.fuse()
    assert layer.fused_tensors()
    changed = change(layer)
    assert not (changed if isinstance(changed, FrameConv2d) else layer).fused


def test_a_weight_that_a_hook_moved_is_not_what_was_fused(layer):
    layer.fuse()
    assert layer.fused_serve() != torch.is_grad_enabled()
    with torch.no_grad():
        assert layer.fused_serve()
        layer.weight = torch.nn.Parameter(layer.weight.to("meta"))  # as hooks that offload weights do
        assert not layer.fused_serve()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 10)], ids=str)
def test_upsampling_is_nearest_neighbour_and_convolution(dtype, size, fused):
    torch.manual_seed(0)
    layer, frames = UpsampledConv2d(16, 16, 3, padding=1).to(dtype), frames_like(2, 3, *size, 16, dtype=dtype)
    larger = frames.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = expected_of(FrameConv(layer.weight, layer.bias, padding=1), larger)
    if fused:
        layer.fuse()
    with torch.no_grad():
        assert_near(layer(frames), expected, dtype)


def test_gradients_of_upsampling():
    torch.manual_seed(0)
    layer = UpsampledConv2d(3, 3, 3, padding=1).double()
    frames = frames_like(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    expected = expected_of(
        FrameConv(layer.weight, layer.bias, padding=1), frames.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    )
    tensors, seed = (frames, layer.weight, layer.bias), torch.randn_like(expected)
    actual = torch.autograd.grad(layer(frames), tensors, seed)
    for mine, theirs in zip(actual, torch.autograd.grad(expected, tensors, seed), strict=True):
        torch.testing.assert_close(mine, theirs)
