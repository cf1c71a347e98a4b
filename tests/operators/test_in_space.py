"""Winograd over space and time equals the convolution it stands for, whatever the blocks, and is taken where it pays."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers.operators.evaluation import Direct, FourFrames, Pairwise, Static, in_space
from vc_vae_diffusers.operators.evaluation.in_space import InSpace
from vc_vae_diffusers.operators.evaluation.packing import onednn_serves
from vc_vae_diffusers.operators.evaluation.pairs import PAIR
from vc_vae_diffusers.operators.evaluation.tiles import Algorithm
from vc_vae_diffusers.operators.evaluation.winograd import four_frames
from vc_vae_diffusers.operators.tdc import GroupCausalConv3d, GroupCausalTDC


def case(frames: int, after: str, count: int, height: int, width: int):
    """A kernel, a clip with a frame before and one after, and the algorithm for its `frames` frames."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 6, 3, 3, 3, dtype=torch.float64, generator=generator)
    clip = torch.randn(count, frames + 2, height, width, 6, dtype=torch.float64, generator=generator)
    if after == "replicate":
        clip[:, -1] = clip[:, -2]
    elif after == "zeros":
        clip[:, -1] = 0
    algorithm = PAIR if frames == 2 else four_frames(after, FourFrames.points())
    return kernel, clip, algorithm


def check(kernel: torch.Tensor, clip: torch.Tensor, algorithm: Algorithm) -> None:
    bias = torch.arange(5.0, dtype=torch.float64)
    expected = F.conv3d(clip.movedim(-1, 1), kernel, bias, padding=(0, 1, 1)).movedim(1, -1)
    matrices = in_space.transform_kernel(kernel, algorithm)
    frames = clip.unbind(1)[: len(algorithm.frames[0])]
    y = in_space.convolve(matrices, algorithm, frames, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    without_bias = in_space.convolve(matrices, algorithm, frames, None)
    torch.testing.assert_close(without_bias + bias, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("frames", "after"), [(2, "replicate"), (4, "replicate"), (4, "zeros"), (4, "given")])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10)])
def test_equals_the_convolution(frames, after, height, width):
    check(*case(frames, after, 3, height, width))


@pytest.mark.parametrize("block_bytes", [1, 10_000, 40_000])
@pytest.mark.parametrize("frames", [2, 4])
def test_blocks_change_nothing(monkeypatch, block_bytes, frames):
    monkeypatch.setattr(in_space, "BLOCK_BYTES", block_bytes)
    check(*case(frames, "replicate", 3, 10, 8))


@pytest.mark.parametrize(("count", "height", "width", "pixels"), [(1, 90, 160, 5_000), (7, 6, 4, 60), (2, 2, 2, 1)])
def test_blocks_cover_every_row_once(monkeypatch, count, height, width, pixels):
    monkeypatch.setattr(in_space, "BLOCK_BYTES", pixels)
    seen = torch.zeros(count, height, dtype=torch.long)
    blocks = list(in_space._blocks(count, height, width, 1))
    for clip, rows in blocks:
        seen[clip, rows] += 1
        assert rows.start % 2 == rows.stop % 2 == 0
        assert seen[clip, rows].numel() * width <= max(pixels, 2 * width)
    assert (seen == 1).all()
    assert len(blocks) > 1 or pixels >= count * height * width


def test_workspace_keeps_its_memory_and_threads_have_their_own():
    workspace, like = in_space.Workspace(), torch.empty(0, dtype=torch.bfloat16)
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
    workspace = in_space.Workspace()
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


def way_of(group: int) -> InSpace:
    return InSpace(Pairwise() if group == 2 else FourFrames())


@pytest.fixture
def pays(monkeypatch):
    """As on processors where it was measured to, and for few channels."""
    monkeypatch.setattr(in_space, "pays", lambda weight: True)


@torch.no_grad()
@pytest.mark.parametrize("layer_class", [GroupCausalTDC, GroupCausalConv3d])
@pytest.mark.parametrize(("group", "padding"), [(2, "replicate"), (4, "replicate"), (4, "zeros"), (8, "replicate")])
def test_layers_equal_the_definition(pays, monkeypatch, layer_class, group, padding):
    layer = layer_of(group, layer_class, temporal_padding=padding)
    x, past = torch.randn(2, 8, 3 * group, 6, 4), torch.randn(2, 8, 1, 6, 4)
    expected = Direct()(layer.double(), x.double(), past.double(), group)
    layer.float().fuse()
    assert way_of(group) in layer.fused
    calls = []
    convolve = in_space.convolve
    monkeypatch.setattr(in_space, "convolve", lambda *args: calls.append(args) or convolve(*args))
    y, cache = layer.stream(x, past)
    assert len(calls) == 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(cache, x[:, :, -1:], rtol=0, atol=0)


def test_odd_sizes_and_gradients_take_another_way(pays, monkeypatch):
    layer = layer_of(4)
    layer.fuse()
    monkeypatch.setattr(in_space, "convolve", None)
    x = torch.randn(1, 8, 4, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer.stream(x)[0], Direct()(layer, x, None, 4), rtol=0, atol=2e-5)
    layer.requires_grad_()
    layer.stream(torch.randn(1, 8, 4, 6, 6))[0].sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_kernels_of_few_channels_are_not_fused_so():
    layer = layer_of(4)
    layer.fuse()
    assert set(layer.fused) == {FourFrames(), Static()}
    assert not in_space.pays(torch.empty(128, 127, 3, 3, 3))
    assert not in_space.pays(torch.empty(128, 128, 3, 1, 1))
    assert in_space.pays(torch.empty(128, 128, 3, 3, 3)) == onednn_serves(torch.empty(0))


@torch.no_grad()
@pytest.mark.parametrize(("group", "most"), [(2, 0.015), (4, 0.025)])
def test_accuracy_in_half_precision(pays, group, most):
    """Not so good as without space, and no worse for a trained model: docs/performance.md."""
    layer = layer_of(group)
    x, past = torch.randn(1, 8, group, 16, 16), torch.randn(1, 8, 1, 16, 16)
    expected = Direct()(layer.double(), x.double(), past.double(), group)
    layer.bfloat16()
    y = way_of(group)(layer, x.bfloat16(), past.bfloat16(), group)
    assert 0.001 < ((y - expected).std() / expected.std()).item() < most
