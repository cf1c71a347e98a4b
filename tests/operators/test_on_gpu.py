"""Ways for GPUs, made to run on CPUs; Triton's kernels by its interpreter; and that nothing waits for the GPU.

Nothing here needs a GPU. `FakeTensorMode` knows CUDA tensors without one, as far as shapes, devices and copies go.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from equations import COMBINED, PADDINGS, assert_near, build, clip, frames_like
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers.operators.evaluation import (
    TEMPORAL,
    BiasLast,
    Combined,
    Direct,
    FourFrames,
    LastOfGroup,
    Pairwise,
    Static,
    TapsAsInputs,
    TapsAsOutputs,
    Transposed,
    choose,
    gpu_ops,
    on_gpu,
)
from vc_vae_diffusers.operators.frame_conv import FrameConv2d, PointConv2d, UpsampledConv2d, upsample
from vc_vae_diffusers.operators.norm import FrameNorm
from vc_vae_diffusers.operators.tdc import CausalTDC, GroupCausalConv3d, GroupCausalTDC, TemporalInteractionTDC

HAS_TRITON = find_spec("triton") is not None


@pytest.mark.parametrize("block_bytes", [1, 4000, 2**28])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("layer_class", "settings", "in_time"),
    [
        (GroupCausalTDC, {"group_size": 1}, LastOfGroup()),
        (GroupCausalTDC, {"group_size": 2}, Pairwise()),
        (GroupCausalTDC, {"group_size": 4}, FourFrames()),
        (GroupCausalTDC, {"group_size": 8}, FourFrames()),
        (GroupCausalConv3d, {"group_size": 4, "bias": False}, FourFrames()),
        (GroupCausalTDC, {"group_size": 4, "kernel_size": 1}, FourFrames()),
        (TemporalInteractionTDC, {}, LastOfGroup()),
        (TemporalInteractionTDC, {"kernel_size": 3}, LastOfGroup()),
    ],
)
def test_blocks_of_any_size_give_the_definition(monkeypatch, layer_class, settings, in_time, padding, block_bytes):
    monkeypatch.setattr(on_gpu, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(1)
    layer = layer_class(3, 4, temporal_padding=padding, dtype=torch.float64, **settings)
    nn.init.normal_(layer.weight)
    way, x = Combined(in_time, always=True), clip(16, height=7, width=4)
    past, group = layer.neighbours.before(x, None), layer.neighbours.group(x)
    with torch.no_grad():
        if padding == "zeros" and isinstance(in_time, Pairwise):
            assert not way.serves(layer, x, past, group)  # its identity needs the last frame in the place of the next
            return
        assert way.serves(layer, x, past, group)
        torch.testing.assert_close(way(layer, x, past, group), Direct()(layer, x, past, group), rtol=0, atol=1e-11)
    assert not way.serves(layer, x, past, group)  # its operators know no gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    torch.manual_seed(0)
    layer, x = GroupCausalTDC(32, 32, group_size=4).to(dtype), frames_like(1, 32, 4, 8, 8, dtype=dtype)
    nn.init.normal_(layer.weight, std=(3 * 9 * 32) ** -0.5)
    with torch.no_grad():
        expected = Direct()(layer.double(), x.double(), None, 4)
        assert_near(COMBINED[2](layer.to(dtype), x, None, 4), expected, dtype)


def test_frames_of_other_layouts_and_batches():
    layer = build(GroupCausalTDC, group_size=4)
    x = clip(8, batch=3, height=6, width=4)
    with torch.no_grad():
        for frames in (
            x,
            x.contiguous(memory_format=torch.channels_last_3d),
            x.transpose(3, 4).contiguous().transpose(3, 4),
        ):
            actual = COMBINED[2](layer, frames, frames[:, :, :1], 4)
            torch.testing.assert_close(actual, Direct()(layer, x, x[:, :, :1], 4), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "frames", "group", "way"),
    [
        (lambda: GroupCausalTDC(64, 64, group_size=4), 4, 4, Combined(FourFrames())),
        (lambda: GroupCausalTDC(64, 64, group_size=4), 2, 2, Combined(Pairwise())),
        (lambda: GroupCausalTDC(64, 64, group_size=1), 2, 1, Combined(LastOfGroup())),
        (lambda: GroupCausalTDC(3, 64, group_size=4), 4, 4, TapsAsInputs()),
        (lambda: GroupCausalTDC(64, 3, group_size=4), 4, 4, TapsAsOutputs()),
        (lambda: CausalTDC(64, 3), 4, 1, TapsAsOutputs()),
        (lambda: CausalTDC(64, 64), 4, 1, Direct()),
        (lambda: TemporalInteractionTDC(64, 64), 4, 2, Combined(LastOfGroup())),
    ],
)
@pytest.mark.skipif(not HAS_TRITON, reason="the kernels are Triton's")
def test_the_way_that_is_chosen_on_a_gpu(layer, frames, group, way):
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        layer = layer()
        x = torch.empty(1, layer.in_channels, frames, 16, 16)
        past = torch.empty(1, layer.in_channels, 1, 16, 16)
        assert layer.ways is TEMPORAL
        assert choose(layer, x, past, group) == way
        assert choose(layer, x[:, :, :1], None, 1) == Static()
        with torch.enable_grad():
            assert not isinstance(choose(layer, x, past, group), Combined)
    with torch.no_grad():
        assert not isinstance(choose(layer, torch.empty(1, layer.in_channels, frames, 16, 16), past, group), type(way)) or (
            way == Direct()
        )


# 2-D layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)], ids=str)
def test_upsampling_as_a_transposed_convolution(size):
    torch.manual_seed(0)
    layer, x = UpsampledConv2d(3, 4, 3, padding=1).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    layer.ways = (Transposed(always=True),)
    torch.testing.assert_close(upsample(layer, x), expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(upsample(layer, x), expected, rtol=0, atol=1e-11)
    inputs = (x.requires_grad_(), layer.weight, layer.bias)
    seed = torch.randn_like(expected)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    for mine, theirs in zip(
        torch.autograd.grad(upsample(layer, x), inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_bias_that_is_added_last():
    torch.manual_seed(0)
    layer, x = FrameConv2d(3, 4, 3, stride=2).double(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    layer.ways = (BiasLast(always=True),)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, stride=2), rtol=0, atol=1e-11)
        layer.bias = None
        assert not BiasLast(always=True).serves(layer, x)


def test_a_convolution_of_one_pixel_is_a_matrix_product_elsewhere():
    layer = PointConv2d(3, 4, 1)
    with FakeTensorMode(), torch.device("cuda"):
        assert PointConv2d(3, 4, 1)(torch.empty(2, 3, 5, 6)).shape == (2, 4, 5, 6)
    x = torch.randn(2, 3, 5, 6)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1), expected)


# Norms ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 5, 6), (2, 8, 3, 5, 6)], ids=str)
def test_norms_are_of_frames(shape, silu):
    torch.manual_seed(0)
    norm, x = FrameNorm(4, 8, eps=1e-6), torch.randn(shape) * 3 + 1
    nn.init.normal_(norm.weight)
    frames = x if x.ndim < 5 else x.movedim(2, 1).flatten(0, 1)
    expected = F.group_norm(frames, 4, norm.weight, norm.bias, 1e-6)
    expected = F.silu(expected) if silu else expected
    expected = expected if x.ndim < 5 else expected.unflatten(0, (2, 3)).movedim(1, 2)
    torch.testing.assert_close(norm(x, silu), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x, silu), expected)
    assert isinstance(norm, nn.GroupNorm)


def test_gradients_of_norm_and_silu_without_what_is_between_them():
    torch.manual_seed(0)
    norm, x = FrameNorm(4, 8, eps=1e-6).double(), torch.randn(2, 8, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    seed = torch.randn_like(x)
    inputs = (x, norm.weight, norm.bias)
    expected = torch.autograd.grad(F.silu(norm(x)), inputs, seed)
    for mine, theirs in zip(torch.autograd.grad(norm(x, silu=True), inputs, seed), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    norm.weight.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(norm(x, silu=True), x, seed)[0], expected[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_norm_keeps_for_the_gradient(dtype):
    norm, x, kept = FrameNorm(4, 8), torch.randn(2, 8, 5, 6).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu"):
        y = norm(x, silu=True)
    assert y.dtype == dtype  # not float32 under autocast
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]
    y.float().sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_frames_with_gaps(last):
    """PyTorch 2.11 refuses them in the operator that is called here, and gradients of another layout in its backward."""
    norm, whole = FrameNorm(4, 8).double(), torch.randn(2, 8, 5, 12, dtype=torch.float64)
    whole = whole.contiguous(memory_format=torch.channels_last) if last else whole
    results = []
    for function in (lambda x: norm(x, silu=True), lambda x: F.silu(F.group_norm(x, 4, norm.weight, norm.bias, norm.eps))):
        x = whole.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(x[..., ::2])
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape))
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_which_norms_are_one_operator():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x = torch.empty(2, 64, 5, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        assert gpu_ops.norm_serves(x, 32) == HAS_TRITON
        assert not gpu_ops.norm_serves(x.contiguous(), 32)
        assert not gpu_ops.norm_serves(torch.empty(2, 96, 5, 6).contiguous(memory_format=torch.channels_last), 32)
        y = FrameNorm(32, 64)(x, silu=True)  # in float32, as layerwise casting leaves norms
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())
        with torch.enable_grad():
            assert not gpu_ops.norm_serves(x, 32)
            assert FrameNorm(32, 64)(x, silu=True).dtype == x.dtype
    assert not gpu_ops.norm_serves(torch.empty(2, 64, 5, 6).contiguous(memory_format=torch.channels_last), 32)


# The kernels ------------------------------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from vc_vae_diffusers.operators.evaluation import gpu_ops, triton_kernels
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
    for channels, groups, size in ((64, 32, (7, 9)), (128, 32, (9, 50)), (8, 4, (1, 1))):
        x = (torch.randn(3, channels, *size) * 2 + 30).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels)
        for silu in (False, True):
            expected = gpu_ops.norm_silu(x.double(), weight, bias, groups, 1e-6, silu)
            actual = triton_kernels.norm_silu(x, weight, bias, groups, 1e-6, silu)
            assert actual.dtype == dtype and actual.stride() == x.stride()
            assert (actual - expected).abs().max() < 4 * tolerance, (actual - expected).abs().max()
    matrix = torch.randn(4, 6)
    matrix[0, 1], matrix[1, 2] = 0, 1
    parts = [torch.randn(3, 2, 5, 7, 8)[:, k % 2].to(dtype) for k in range(6)]  # frames apart from each other
    for bias in (None, torch.randn(8)):
        apart = torch.empty(3, 4, 9, 7, 8, dtype=dtype)[:, :, 2:7].transpose(0, 1)
        for y in (torch.empty(4, 3, 5, 7, 8, dtype=dtype), apart):
            expected = torch.empty(4, 3, 5, 7, 8, dtype=torch.float64)
            gpu_ops.combine(expected, [part.double() for part in parts], matrix.tolist(), bias)
            triton_kernels.combine(y, parts, matrix.flatten().tolist(), bias)
            assert (y - expected).abs().max() < tolerance * expected.abs().max()
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton comes with PyTorch for Linux")
def test_kernels_by_tritons_interpreter():
    """In a process of its own: kernels are interpreted, or not, from their definition on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_gpu_on_which_triton_fails_is_left_to_pytorch(monkeypatch, caplog):
    """On a CPU in the place of a GPU: the kernels are tried once, and what is wrong with them is told."""
    works, agree = gpu_ops._works.__wrapped__, gpu_ops._agree
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu_ops, "_agree", lambda device: agree("cpu"))
    monkeypatch.setattr(gpu_ops, "_combine", gpu_ops._combine_plainly)
    monkeypatch.setattr(gpu_ops, "_norm_silu", gpu_ops._norm_silu_plainly)
    assert works(0)
    assert not caplog.records
    monkeypatch.setattr(gpu_ops, "_combine", lambda y, *others: y.zero_())
    assert not works(0)
    assert "Triton does not work on cuda:0 (its results are wrong)" in caplog.text

    def fails(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_ops, "_norm_silu", fails)
    assert not works(0)
    assert "RuntimeError: no compiler" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not works(0)
