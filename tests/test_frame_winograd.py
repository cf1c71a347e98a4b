"""Winograd over space and time equals the convolution it stands for, whatever the blocks, and is taken where it pays."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers import frame_winograd, winograd
from vc_vae_diffusers.frame_conv import onednn_serves
from vc_vae_diffusers.tdc import GroupCausalConv3d, GroupCausalTDC


def case(frames: int, after: str, count: int, height: int, width: int):
    """A kernel, a clip with a frame before and one after, and the algorithm for its `frames` frames."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 6, 3, 3, 3, dtype=torch.float64, generator=generator)
    clip = torch.randn(count, frames + 2, height, width, 6, dtype=torch.float64, generator=generator)
    if after == "replicate":
        clip[:, -1] = clip[:, -2]
    elif after == "zeros":
        clip[:, -1] = 0
    algorithm = winograd.PAIR if frames == 2 else winograd.four_frames(after)
    return kernel, clip, algorithm


def check(kernel: torch.Tensor, clip: torch.Tensor, algorithm: winograd.Algorithm) -> None:
    bias = torch.arange(5.0, dtype=torch.float64)
    expected = F.conv3d(clip.movedim(-1, 1), kernel, bias, padding=(0, 1, 1)).movedim(1, -1)
    matrices = frame_winograd.transform_kernel(kernel, algorithm)
    frames = clip.unbind(1)[: len(algorithm.frames[0])]
    y = frame_winograd.convolve(matrices, algorithm, frames, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    without_bias = frame_winograd.convolve(matrices, algorithm, frames, None)
    torch.testing.assert_close(without_bias + bias, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("frames", "after"), [(2, "replicate"), (4, "replicate"), (4, "zeros"), (4, "given")])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10)])
def test_equals_the_convolution(frames, after, height, width):
    check(*case(frames, after, 3, height, width))


@pytest.mark.parametrize("block_bytes", [1, 10_000, 40_000])
@pytest.mark.parametrize("frames", [2, 4])
def test_blocks_change_nothing(monkeypatch, block_bytes, frames):
    monkeypatch.setattr(frame_winograd, "BLOCK_BYTES", block_bytes)
    check(*case(frames, "replicate", 3, 10, 8))


@pytest.mark.parametrize(("count", "height", "width", "pixels"), [(1, 90, 160, 5_000), (7, 6, 4, 60), (2, 2, 2, 1)])
def test_blocks_cover_every_row_once(monkeypatch, count, height, width, pixels):
    monkeypatch.setattr(frame_winograd, "BLOCK_BYTES", pixels)
    seen = torch.zeros(count, height, dtype=torch.long)
    blocks = list(frame_winograd._blocks(count, height, width, 1))
    for clip, rows in blocks:
        seen[clip, rows] += 1
        assert rows.start % 2 == rows.stop % 2 == 0
        assert seen[clip, rows].numel() * width <= max(pixels, 2 * width)
    assert (seen == 1).all()
    assert len(blocks) > 1 or pixels >= count * height * width


def test_workspace_keeps_its_memory_and_threads_have_their_own():
    workspace, like = frame_winograd.Workspace(), torch.empty(0, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = workspace.tensor("step", like, 3, 4)
    assert first.shape == (3, 4)
    assert first.dtype == torch.bfloat16
    assert workspace.tensor("step", torch.empty(0), 2, 3).data_ptr() == first.data_ptr()
    assert workspace.tensor("another", like, 3, 4).data_ptr() != first.data_ptr()
    workspace.tensor("step", like, 3, 4).fill_(1)  # outside of inference mode too
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(workspace.tensor, "step", like, 3, 4).result().data_ptr() != first.data_ptr()


def test_workspace_holds_no_tensor_without_data():
    workspace = frame_winograd.Workspace()
    with FakeTensorMode():
        workspace.tensor("step", torch.empty(1), 3)
    assert not workspace.buffers


def test_threads_at_once_do_not_disturb_each_other():
    """One workspace for all would mix their blocks."""
    cases = [case(4, "replicate", 3, 24, 16), case(2, "replicate", 5, 24, 16)] * 4
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda parts: check(*parts), cases * 4))


def layer_of(group: int, layer_class: type = GroupCausalTDC, **options) -> GroupCausalConv3d:
    torch.manual_seed(0)
    layer = layer_class(8, 12, group_size=group, **options).requires_grad_(False)
    layer.weight.normal_(0, 0.1)
    return layer


@pytest.mark.skipif(not onednn_serves(torch.empty(0)), reason="taken on x86 processors alone, where it was measured")
class TestLayers:
    @pytest.fixture(autouse=True)
    def few_channels(self, monkeypatch):
        monkeypatch.setattr(frame_winograd, "MIN_CHANNELS", 8)

    @torch.no_grad()
    @pytest.mark.parametrize("layer_class", [GroupCausalTDC, GroupCausalConv3d])
    @pytest.mark.parametrize(("group", "padding"), [(2, "replicate"), (4, "replicate"), (4, "zeros"), (8, "replicate")])
    def test_equal_the_direct_evaluation(self, monkeypatch, layer_class, group, padding):
        layer = layer_of(group, layer_class, temporal_padding=padding)
        x, past = torch.randn(2, 8, 3 * group, 6, 4), torch.randn(2, 8, 1, 6, 4)
        expected = layer.double().convolve_directly(x.double(), past.double(), group)
        layer.float().fuse()
        assert any(form.endswith("_in_space") for form in layer.fused)
        calls = []
        convolve = frame_winograd.convolve
        monkeypatch.setattr(frame_winograd, "convolve", lambda *args: calls.append(args) or convolve(*args))
        y, cache = layer(x, past)
        assert len(calls) == 1
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(cache, x[:, :, -1:], rtol=0, atol=0)

    def test_odd_sizes_and_gradients_take_another_way(self, monkeypatch):
        layer = layer_of(4)
        layer.fuse()
        monkeypatch.setattr(frame_winograd, "convolve", None)
        x = torch.randn(1, 8, 4, 5, 6)
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], layer.convolve_directly(x, x[:, :, :1], 4), rtol=0, atol=2e-5)
        layer.requires_grad_()
        layer(torch.randn(1, 8, 4, 6, 6))[0].sum().backward()
        assert layer.weight.grad.abs().sum() > 0

    def test_kernels_of_few_channels_are_not_fused_so(self, monkeypatch):
        monkeypatch.setattr(frame_winograd, "MIN_CHANNELS", 9)
        layer = layer_of(4)
        layer.fuse()
        assert set(layer.fused) == {"winograd", "static"}

    @torch.no_grad()
    def test_accuracy_in_half_precision(self):
        """Not so good as without space, and no worse for a trained model: docs/performance.md."""
        errors = {}
        for group in (2, 4):
            layer = layer_of(group)
            x, past = torch.randn(1, 8, group, 16, 16), torch.randn(1, 8, 1, 16, 16)
            expected = layer.double().convolve_directly(x.double(), past.double(), group)
            layer.bfloat16().fuse()
            assert layer.has_fused(f"{layer.form(x, group)}_in_space")
            y = layer(x.bfloat16(), past.bfloat16())[0]
            errors[group] = ((y - expected).std() / expected.std()).item()
        assert errors[2] < 0.015
        assert errors[4] < 0.025
