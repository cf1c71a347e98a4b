"""Spatial tiles: that they are used, that they blend to the whole, that they stream, and what geometry is refused."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.tiling import BlendedFrameBuffer, TileGrid
from vc_vae_diffusers.operators.tdc import TemporalConv3d

TILE, STRIDE = (32, 24), (24, 16)  # height, width in pixels


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest expected value, 1e-10 in float64."""
    assert actual.shape == expected.shape
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item()
    assert scale > 1e-3, "a comparison of zeros proves nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def watch_sizes(vae: AutoencoderKLVCVAE) -> dict[str, list[tuple[int, int]]]:
    """Lists that fill with the height and width of what the encoder and the decoder are given."""
    sizes = {"encoder": [], "decoder": []}
    for name, seen in sizes.items():
        network = vae.get_submodule(name)
        network.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(tuple(args[0].shape[3:])))
    return sizes


def make_local(vae: AutoencoderKLVCVAE) -> AutoencoderKLVCVAE:
    """Take away what sees across the frame: norms, attention, and all but the central tap of every spatial kernel."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
        if isinstance(module, (nn.Conv2d, TemporalConv3d)) and module.kernel_size[-1] == 3:
            with torch.no_grad():
                centre = module.weight[..., 1, 1].clone()
                module.weight.zero_()[..., 1, 1] = centre * 3
    vae.encoder.mid_block.attentions = nn.ModuleList()
    vae.decoder.mid_block.attentions = nn.ModuleList()
    return vae


# Tiles in use -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_frames_larger_than_a_tile_are_cut(make_vae, make_video):
    vae, video = make_vae(), make_video(5, height=56, width=40)
    sizes = watch_sizes(vae)
    whole = vae(video).sample
    assert set(sizes["encoder"]) == {(56, 40)}
    assert set(sizes["decoder"]) == {(7, 5)}
    for seen in sizes.values():
        seen.clear()
    vae.enable_tiling(*TILE, *STRIDE)
    z = vae.encode(video).latent_dist.mode()
    tiled = vae.decode(z, num_frames=5).sample
    assert set(sizes["encoder"]) == {TILE}
    assert set(sizes["decoder"]) == {(4, 3)}
    assert len(sizes["encoder"]) == len(sizes["decoder"]) == 2 * 2 * 2  # rows, columns, chunks
    assert tiled.shape == whole.shape
    difference = (tiled - whole).abs().max() / whole.abs().max()
    assert 1e-4 < difference < 1
    for seen in sizes.values():
        seen.clear()
    vae.disable_tiling()
    close(vae(video).sample, whole)
    assert set(sizes["encoder"]) == {(56, 40)}


@torch.no_grad()
def test_a_frame_that_fits_one_tile_is_not_cut(make_vae, make_video):
    vae, video = make_vae(), make_video(5, height=32, width=24)
    expected, sizes = vae(video).sample, watch_sizes(vae)
    vae.enable_tiling(*TILE, *STRIDE)
    assert torch.equal(vae(video).sample, expected)
    assert set(sizes["encoder"]) == {(32, 24)}
    vae.encode(make_video(4, height=32, width=32))  # one axis fits, the other does not
    assert sizes["encoder"][-1] == (32, 24)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "size"),
    [({}, (56, 40)), ({"first_frame": "separate"}, (48, 32)), ({"frame_convention": "4k+1"}, (40, 24))],
    ids=str,
)
def test_a_network_that_sees_one_cell_is_equal_tiled_and_whole(make_vae, make_video, scheme, size):
    """Then tiles differ from the whole by their geometry and blending alone, which must be none at any pixel."""
    vae = make_local(make_vae(use_quant_conv=True, use_post_quant_conv=True, **scheme)).double()
    video = make_video(6, *size, batch=2).double()
    whole = vae(video).sample
    z = vae.encode(video).latent_dist.parameters
    sizes = watch_sizes(vae)
    vae.enable_tiling(*TILE, *STRIDE)
    close(vae.encode(video).latent_dist.parameters, z)
    close(vae(video).sample, whole)
    assert set(sizes["encoder"]) == {(32, 24)}
    error = vae.tiling_error(video)
    assert error["latent_max"] < 1e-6
    assert error["sample_psnr"] > 120


@torch.no_grad()
def test_tiles_equal_the_whole_beyond_the_reach_of_their_borders(make_vae, make_video):
    """Without norms and attention the receptive field is finite: where one tile alone counts, far from its border."""
    config = {"block_out_channels": (8, 8), "temporal_downsample": (True,), "mid_block_add_attention": False}
    vae = make_vae(**config).double()
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    video = make_video(2, height=128, width=16).double()
    whole = vae.encode(video).latent_dist.parameters
    vae.enable_tiling(80, 16, 48, 16)  # tiles 0-80 and 48-128, in cells 0-40 and 24-64
    tiled = vae.encode(video).latent_dist.parameters
    wrong = (tiled - whole).abs().amax(dim=(0, 1, 2, 4)) > 1e-12
    assert wrong[24:40].any()  # where they overlap
    assert not wrong[:24].any()  # the receptive field reaches less than the 16 cells of the overlap
    assert not wrong[40:].any()


@torch.no_grad()
@pytest.mark.parametrize("scheme", [{}, {"first_frame": "separate"}, {"temporal_causality": "causal"}], ids=str)
def test_streams_of_tiles_equal_the_tiled_clip(make_vae, make_video, scheme):
    vae, video = make_vae(**scheme), make_video(13, height=40, width=40)
    vae.enable_tiling(*TILE, *STRIDE)
    sizes = watch_sizes(vae)
    z = vae.encode(video).latent_dist.parameters
    stream = torch.cat([p.parameters for p in vae.encode_stream(video.split([2, 7, 4], dim=2))], dim=2)
    close(stream, z)
    frames = vae.decode(z[:, :4], num_frames=13).sample
    close(torch.cat(list(vae.decode_stream(z[:, :4].split(1, dim=2), num_frames=13)), dim=2), frames)
    alone = 1 if "first_frame" in scheme else 0
    first, cache = vae.encode_chunk(video[:, :, : 4 + alone])
    second, _ = vae.encode_chunk(video[:, :, 4 + alone : 12 + alone], cache)
    close(torch.cat([first, second], dim=2), z[:, :, : 3 + alone])
    first, cache = vae.decode_chunk(z[:, :4, :2])
    second, _ = vae.decode_chunk(z[:, :4, 2:], cache)
    close(torch.cat([first, second], dim=2)[:, :, :13], frames)
    assert set(sizes["encoder"]) == {(32, 24)}
    assert set(sizes["decoder"]) == {(4, 3)}


def test_gradients_pass_through_tiles(make_vae, make_video):
    vae = make_local(make_vae()).double()
    video = make_video(4, height=40, width=40).double()

    def gradient():
        x = video.clone().requires_grad_()
        return torch.autograd.grad(vae(x).sample.sin().sum(), (x, *vae.parameters()), allow_unused=True)

    whole = gradient()
    vae.enable_tiling(*TILE, *STRIDE)
    sizes = watch_sizes(vae)
    for tiled, expected in zip(gradient(), whole, strict=True):
        if expected.shape[-2:] == (
            3,
            3,
        ):  # of the other taps, those at the border of a tile see zeros and not their neighbour
            tiled, expected = tiled[..., 1, 1], expected[..., 1, 1]
        torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-10 * max(1.0, expected.abs().max().item()))
    assert set(sizes["encoder"]) == {(32, 24)}


@torch.no_grad()
def test_tiling_error_is_the_difference_of_tiled_and_whole(make_vae, make_video):
    vae, video = make_vae(), make_video(7, height=56, width=40)
    whole = vae.encode(video).latent_dist.mode()
    frames = vae.decode(whole).sample
    vae.enable_tiling(*TILE, *STRIDE)
    error = vae.tiling_error(video)
    tiled = vae.encode(video).latent_dist.mode()
    relative = (tiled - whole) / whole.std()
    difference = vae.decode(whole).sample - frames
    assert error["latent_max"] == pytest.approx(relative.abs().max().item(), rel=1e-4)
    assert error["latent_rms"] == pytest.approx(relative.square().mean().sqrt().item(), rel=1e-4)
    assert error["sample_max"] == pytest.approx(difference.abs().max().item(), rel=1e-4)
    assert error["sample_psnr"] == pytest.approx(10 * math.log10(4 / difference.square().mean().item()), rel=1e-4)
    assert error["latent_max"] > 1e-3
    vae.enable_tiling(64, 64)
    assert vae.tiling_error(video) == {"latent_max": 0, "latent_rms": 0, "sample_max": 0, "sample_psnr": math.inf}


@torch.no_grad()
def test_memory_does_not_grow_with_the_number_of_tiles(make_vae, make_video, live_memory):
    vae = make_vae()
    vae.enable_tiling(*TILE, *STRIDE)
    peaks = {"encode": [], "decode": []}
    for size in (48, 80):
        video = make_video(8, height=size, width=size)
        z = torch.randn(1, 4, 2, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
        for name, function, known in (("encode", vae._encode, video), ("decode", vae._decode, z)):
            with live_memory([known, *vae.parameters()]) as memory:
                result = function(known)
            peaks[name].append(memory.peak - result.untyped_storage().nbytes())
    for few, many in peaks.values():
        assert many <= 1.02 * few


# Geometry ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "tile", "stride"),
    [(10, 4, 3), (10, 4, 2), (10, 4, 1), (9, 4, 4), (5, 4, 4), (5, 4, 3), (4, 4, 3), (3, 4, 3), (17, 8, 3), (64, 64, 48)],
)
@pytest.mark.parametrize("scale", [1, 8])
def test_tiles_cover_everything_and_their_weights_sum_to_one(length, tile, stride, scale):
    grid = TileGrid(tile, 2, stride, 2)
    total, tiles = torch.zeros(length * scale, 5 * scale, dtype=torch.float64), list(grid.tiles(length, 5, scale))
    for part in tiles:
        assert part.rows.stop - part.rows.start == min(tile, length)
        assert 0 <= part.rows.start < part.rows.stop <= length
        assert (part.row_weights > 0).all()
        rows = slice(part.rows.start * scale, part.rows.stop * scale)
        columns = slice(part.columns.start * scale, part.columns.stop * scale)
        total[rows, columns] += part.row_weights[:, None] * part.column_weights
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    rows = sorted({part.rows.start for part in tiles})
    assert rows[0] == 0
    assert all(b - a <= stride for a, b in pairwise(rows))
    assert grid.count(length, 5) == len(tiles)


def test_blending_is_linear_across_an_overlap():
    first, second = (tile.row_weights for tile in TileGrid(6, 4, 4, 4).tiles(10, 4, 1))
    torch.testing.assert_close(first, torch.tensor([1, 1, 1, 1, 0.75, 0.25], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([0.25, 0.75, 1, 1, 1, 1], dtype=torch.float64))


def test_blended_parts_are_a_weighted_mean():
    grid, clip = TileGrid(4, 4, 3, 2), torch.randn(1, 2, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(clip.flatten(0, 1), scale_factor=2).unflatten(0, (1, 2))
    buffer = BlendedFrameBuffer(5, 7, 6, scale=2)
    for tile in grid.tiles(7, 6, 2):
        buffer.start(tile)
        part = fine[..., 2 * tile.rows.start : 2 * tile.rows.stop, 2 * tile.columns.start : 2 * tile.columns.stop]
        buffer.append(part[:, :, :2])
        buffer.append(part[:, :, 2:])
    torch.testing.assert_close(buffer.buffer, fine, rtol=0, atol=1e-6)


def test_default_geometry(make_vae):
    vae = make_vae()
    vae.enable_tiling()
    assert vae.use_tiling
    assert vae.tile_grid == TileGrid(64, 64, 48, 48)
    vae.enable_tiling(tile_sample_min_height=256, tile_sample_stride_width=256)
    assert vae.tile_grid == TileGrid(32, 64, 24, 32)
    vae.enable_tiling(8, 8)
    assert vae.tile_grid == TileGrid(1, 1, 1, 1)
    two_stages = make_vae(block_out_channels=(8, 8), temporal_downsample=(True,))
    two_stages.enable_tiling()
    assert two_stages.tile_grid == TileGrid(256, 256, 192, 192)


def test_geometry_errors_name_argument_value_and_remedy(make_vae):
    vae = make_vae()
    for geometry, message in (
        ({"tile_sample_min_height": 100}, "tile_sample_min_height is 100.*multiple of the spatial compression 8: pass 96"),
        ({"tile_sample_min_width": 4}, "tile_sample_min_width is 4.*pass 8"),
        ({"tile_sample_min_width": 0}, "tile_sample_min_width is 0.*pass 8"),
        ({"tile_sample_min_height": -64}, "tile_sample_min_height is -64.*pass 8"),
        ({"tile_sample_stride_height": 0}, "tile_sample_stride_height is 0.*pass 8"),
        ({"tile_sample_stride_width": 12}, "tile_sample_stride_width is 12"),
        ({"tile_sample_min_height": 256.0}, "tile_sample_min_height is 256.0, it must be an integer.*pass 256"),
        ({"tile_sample_min_width": 64, "tile_sample_stride_width": 72}, "tile_sample_stride_width is 72, larger than.*64"),
        ({"tile_sample_stride_height": 520}, "tile_sample_stride_height is 520, larger than tile_sample_min_height 512"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.enable_tiling(**geometry)
    assert not vae.use_tiling  # nothing was enabled by a geometry that was refused
