"""Every switch on every way into the model: that it is honoured, and that it changes no result that it should not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.distributed import decode_segments, encode_segments
from vc_vae_diffusers.operators.tdc import GroupCausalTDC

FRAMES = 8


def encode_in_chunks(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> torch.Tensor:
    first, cache = vae.encode_chunk(video)
    return torch.cat([first, vae.encode_chunk(video, cache)[0]], dim=2)


def decode_in_chunks(vae: AutoencoderKLVCVAE, z: torch.Tensor) -> torch.Tensor:
    first, cache = vae.decode_chunk(z)
    return torch.cat([first, vae.decode_chunk(z, cache)[0]], dim=2)


def joined(posteriors) -> torch.Tensor:
    return torch.cat([posterior.parameters for posterior in posteriors], dim=2)


# Of a clip of 8 frames, or of its latents.
WAYS: dict[str, tuple[str, Callable]] = {
    "encode": ("encoder", lambda vae, x: vae.encode(x).latent_dist.parameters),
    "encode_chunk": ("encoder", encode_in_chunks),
    "encode_stream": ("encoder", lambda vae, x: joined(vae.encode_stream([x[:, :, :1], x[:, :, 1:]]))),
    "encode_segments": ("encoder", lambda vae, x: encode_segments(vae, x, 2).parameters),
    "decode": ("decoder", lambda vae, z: vae.decode(z).sample),
    "decode_chunk": ("decoder", decode_in_chunks),
    "decode_stream": ("decoder", lambda vae, z: torch.cat(list(vae.decode_stream([z])), dim=2)),
    "decode_segments": ("decoder", lambda vae, z: decode_segments(vae, z, 2)),
    "forward": ("decoder", lambda vae, z: vae(z.new_ones(2, 3, FRAMES, 16, 24) * z.mean()).sample),
}

# How to turn a switch on, and what the network then sees: batch, frames of a chunk (in groups), width in cells.
SWITCHES: dict[str, tuple[Callable, dict[str, int]]] = {
    "none": (lambda vae: None, {"batch": 2, "groups": 1, "width": 3}),
    "slicing": (lambda vae: vae.enable_slicing(), {"batch": 1, "groups": 1, "width": 3}),
    "tiling": (lambda vae: vae.enable_tiling(16, 16), {"batch": 2, "groups": 1, "width": 2}),
    "groups_per_chunk": (lambda vae: setattr(vae, "groups_per_chunk", 2), {"batch": 2, "groups": 2, "width": 3}),
    "fuse_tdc": (lambda vae: vae.fuse_tdc(), {"batch": 2, "groups": 1, "width": 3}),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_way_honours_every_switch(make_vae, make_video, monkeypatch, switch, way):
    vae = make_vae()
    name, run = WAYS[way]
    x = make_video(FRAMES, batch=2)
    if name == "decoder":
        x = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = run(vae, x)

    turn_on, sees = SWITCHES[switch]
    turn_on(vae)
    seen, computed = set(), []
    scale = (8, 4) if name == "encoder" else (1, 1)
    vae.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: seen.add((args[0].shape[0], args[0].shape[2] // scale[1], args[0].shape[4] // scale[0]))
    )
    fold = GroupCausalTDC.plain_kernel
    monkeypatch.setattr(GroupCausalTDC, "plain_kernel", lambda layer: computed.append(layer) or fold(layer))
    actual = run(vae, x)
    assert seen == {(sees["batch"], sees["groups"], sees["width"])}
    assert bool(computed) == (switch != "fuse_tdc")
    if switch == "tiling":
        assert (actual - expected).abs().max() > 1e-4
        together = WAYS[name.removesuffix("r")][1](vae, x) if "chunk" not in way and way != "forward" else actual
        torch.testing.assert_close(actual, together, rtol=0, atol=1e-5 * together.abs().max().item())
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_slicing_can_be_switched_within_a_stream(make_vae, make_video, tiled):
    """A cache is the same with slicing and without."""
    vae, video = make_vae(), make_video(8, batch=3)
    if tiled:
        vae.enable_tiling(16, 16)
    expected = vae.encode(video).latent_dist.parameters
    first, cache = vae.encode_chunk(video[:, :, :4])
    shapes = [tensor.shape for tensor in tree_leaves(cache)]
    vae.enable_slicing()
    sliced_first, sliced_cache = vae.encode_chunk(video[:, :, :4])
    assert [tensor.shape for tensor in tree_leaves(sliced_cache)] == shapes
    second, _ = vae.encode_chunk(video[:, :, 4:], cache)
    vae.disable_slicing()
    other_second, _ = vae.encode_chunk(video[:, :, 4:], sliced_cache)
    for parts in ((first, second), (sliced_first, other_second)):
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_slicing_passes_gradients(make_vae, make_video):
    vae = make_vae().double()
    video = make_video(4, batch=2).double()

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(vae(video).sample.sin().sum(), list(vae.parameters()))

    whole = gradients()
    vae.enable_slicing()
    for sliced, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-9 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def test_a_stream_of_tiles_keeps_one_cache_a_tile(make_vae, live_memory):
    """The cache that a tile had is let go when it has its next one: more tiles must not cost two caches each."""
    vae = make_vae()
    vae.enable_tiling(32, 32, 32, 32)
    peaks, caches = {}, {}
    for width in (64, 256):  # 2 and 8 tiles
        z = torch.randn(1, 4, 3, 4, width // 8, generator=torch.Generator().manual_seed(0))
        _, cache = vae.decode_chunk(z[:, :, :1])
        caches[width] = sum(tensor.untyped_storage().nbytes() for tensor in tree_leaves(cache))
        del cache
        with live_memory([z, *vae.parameters()]) as memory:
            for frames in vae.decode_stream(z.split(1, dim=2)):
                assert frames.isfinite().all()
        peaks[width] = memory.peak
    frames = 3 * 4 * 4 * 3 * 32 * (256 - 64)  # the chunks that grow with the width: blended, yielded, and a spare one
    assert peaks[256] - peaks[64] <= 1.1 * (caches[256] - caches[64]) + frames


@torch.no_grad()
def test_switches_turned_within_a_stream_are_refused(make_vae):
    vae, z = make_vae(), torch.randn(1, 4, 1, 4, 4)
    _, whole = vae.decode_chunk(z)
    vae.enable_tiling(16, 16)
    _, tiled = vae.decode_chunk(z)
    with pytest.raises(ValueError, match="cache is of another frame size or tiling"):
        vae.decode_chunk(z, whole)
    vae.disable_tiling()
    with pytest.raises(ValueError, match="cache is of another frame size or tiling"):
        vae.decode_chunk(z, tiled)


# Values of switches -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_kernels_of_frames_and_clips_take_a_layout_each(make_vae, make_video, layout):
    vae, video = make_vae().eval(), make_video(FRAMES)
    with torch.no_grad():
        expected = vae(video).sample
        assert vae.to(memory_format=layout) is vae
        torch.testing.assert_close(vae(video).sample, expected, rtol=0, atol=1e-5)
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim >= 4 and min(parameter.shape[1:]) > 1]
    assert {kernel.ndim for kernel in kernels} == {4, 5}
    assert not any(kernel.is_contiguous() for kernel in kernels)
    assert vae.to(torch.float64, memory_format=layout).dtype == torch.float64


def test_tile_sizes_are_attributes_as_in_diffusers(make_vae):
    vae, sizes, z = make_vae(), set(), torch.randn(1, 4, 1, 4, 5)
    vae.decoder.register_forward_pre_hook(lambda layer, args: sizes.add(tuple(args[0].shape[3:])))
    vae.enable_tiling(64, 64)
    vae.decode(z)
    assert sizes == {(4, 5)}
    sizes.clear()
    vae.tile_sample_min_height = 16
    vae.tile_sample_min_width = 24
    vae.decode(z)
    assert sizes == {(2, 3)}
    assert (vae.tile_grid.stride_height, vae.tile_grid.stride_width) == (1, 2)
    vae.tile_sample_stride_height = 32
    with pytest.raises(ValueError, match="tile_sample_stride_height is 32, larger than tile_sample_min_height 16"):
        vae.decode(z)
    with pytest.raises(AttributeError, match="tile_overlap_factor is no attribute of this model: tiles are set by"):
        vae.tile_overlap_factor = 0.25


@pytest.mark.parametrize("groups", [0, -1, 1.5, None, True])
def test_groups_per_chunk_must_be_a_number_of_groups(make_vae, groups):
    vae = make_vae()
    with pytest.raises(ValueError, match=f"groups_per_chunk is {groups}, it must be an integer of at least 1"):
        vae.groups_per_chunk = groups
    assert vae.groups_per_chunk == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_constant_picture_stays_constant_in_tiles(make_vae, dtype):
    vae = make_vae()
    vae.enable_tiling(24, 24, 16, 16)

    def constant(z, cache=None, *rest):
        return torch.full((1, 3, 4, z.shape[3] * 8, z.shape[4] * 8), 0.3, dtype=dtype), ((),)

    vae.decoder.forward = constant
    frames = vae.to(dtype).decode(torch.zeros(1, 4, 2, 6, 7, dtype=dtype)).sample
    assert frames.shape == (1, 3, 8, 48, 56)
    assert frames.unique().tolist() == [torch.tensor(0.3, dtype=dtype).item()]


# Inputs -----------------------------------------------------------------------------------------------------------------


def test_inputs_that_are_no_video_say_what_to_pass(make_vae, tmp_path):
    vae = make_vae()
    video = torch.zeros(1, 3, 4, 16, 16)
    for x, message in (
        (
            video.to(torch.uint8),
            r"x is torch.uint8, it must be torch.float32, pixels in \[-1, 1\]: pass x.to\(vae.dtype\) / 127.*VideoProcessor",
        ),
        (video.long(), "x is torch.int64, it must be torch.float32"),
        (video.half(), r"x is torch.float16, the model torch.float32: pass x.to\(vae.dtype\)"),
        (np.zeros((1, 3, 4, 16, 16)), "x is a ndarray, it must be a tensor: pass vc_vae_diffusers.VCVAEVideoProcessor"),
        ([video], "x is a list, it must be a tensor: join frames with torch.stack"),
        (
            "clip.mp4",
            r"x is a str, .*VCVAEVideoProcessor.for_vae\(vae\).preprocess_video\(…\) of it, or stream it",
        ),
        (tmp_path, "it must be a tensor: pass vc_vae_diffusers.VCVAEVideoProcessor"),
        (
            [np.zeros((4, 16, 16, 3), np.uint8)],
            "x is a list, it must be a tensor: pass vc_vae_diffusers.VCVAEVideoProcessor",
        ),
        (None, "x is a NoneType, it must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.encode(x)
    with pytest.raises(ValueError, match=r"z is torch\.bfloat16, the model torch\.float32"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="frames is a str, it must be a tensor"):
        list(vae.encode_stream("clip"))
    with pytest.raises(ValueError, match="latents is a ndarray, it must be a tensor: pass one of shape"):
        list(vae.decode_stream([np.zeros((1, 4, 1, 2, 2))]))


@torch.no_grad()
def test_autocast_takes_other_dtypes(make_vae, make_video):
    with torch.autocast("cpu", torch.bfloat16):
        assert make_vae().encode(make_video(4).bfloat16()).latent_dist.mean.isfinite().all()
