"""The model on whole clips: frame counts, groups and causality, images, first-frame schemes, gradients, errors."""

import copy
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.blocks import TemporalUpsample
from vc_vae_diffusers.operators.frame_conv import KernelLayer
from vc_vae_diffusers.operators.tdc import GroupCausalConv3d, TemporalConv3d

SCHEMES = [
    {"frame_convention": "4k"},
    {"frame_convention": "4k+1"},
    {"first_frame": "separate"},
]
DESIGNS = [
    {"temporal_operator": operator, "temporal_causality": causality, "temporal_padding": padding}
    for operator in ("tdc", "conv")
    for causality in ("group", "causal")
    for padding in ("replicate", "zeros")
]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest expected value, 1e-10 in float64."""
    assert actual.shape == expected.shape
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item()
    assert scale > 1e-3, "a comparison of zeros proves nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def latents_of(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> torch.Tensor:
    return vae.encode(video).latent_dist.mode()


# Size -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporal_downsample", [(False, True, True), (True, True, True)])
def test_parameters_are_those_of_the_image_vae_inflated(temporal_downsample):
    latent_channels = 16 if sum(temporal_downsample) == 2 else 32
    flux = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": latent_channels}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        image_vae = AutoencoderKL(**flux, **blocks, use_quant_conv=False, use_post_quant_conv=False)
        vae = AutoencoderKLVCVAE(temporal_downsample=temporal_downsample, latent_channels=latent_channels)
    expected = 0
    for name, parameter in image_vae.named_parameters():
        spatial = "shortcut" in name or "sampler" in name
        inflated = parameter.ndim == 4 and parameter.shape[-1] == 3 and not spatial
        expected += parameter.numel() * (3 if inflated else 1)
    for stage, channels in enumerate((128, 256, 512)):
        expected += (2 * channels**2 + channels) * temporal_downsample[stage]
    for stage, channels in enumerate((512, 512, 256)):
        expected += (2 * channels**2 + 2 * channels) * temporal_downsample[2 - stage]
    assert sum(p.numel() for p in vae.parameters()) == expected
    if latent_channels == 16:
        assert sum(p.numel() for p in image_vae.parameters()) == 83_819_683
        assert expected == 231_374_243
    assert vae.spatial_compression_ratio == 8
    assert vae.temporal_compression_ratio == 2 ** sum(temporal_downsample)


@torch.no_grad()
@pytest.mark.parametrize("causality", ["group", "causal"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("ratio", [4, 8])
def test_as_many_frames_out_as_in(make_vae, make_video, ratio, scheme, causality):
    vae = make_vae(temporal_downsample=(ratio == 8, True, True), temporal_causality=causality, **scheme)
    assert vae.temporal_compression_ratio == ratio
    for frames in range(1, 10):
        video = make_video(frames, batch=2)
        z = latents_of(vae, video)
        count = 1 + math.ceil((frames - 1) / ratio) if "first_frame" in scheme else math.ceil(frames / ratio)
        assert z.shape == (2, 4, count, 2, 3)
        decoded = vae.decode(z, num_frames=frames).sample
        assert decoded.shape == video.shape
        close(vae(video).sample, decoded)
        everything = vae.decode(z).sample
        uncropped = count * ratio if scheme.get("frame_convention") == "4k" else (count - 1) * ratio + 1
        assert everything.shape[2] == uncropped
        if scheme.get("frame_convention") == "4k+1":
            assert (uncropped - 1) % ratio == 0
        else:
            assert torch.equal(everything[:, :, :frames], decoded)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "temporal"),
    [((8,), ()), ((8, 8), (True,)), ((8, 8, 8, 8), (False, False, False)), ((8, 8, 16, 16), (True, False, True))],
)
def test_any_combination_of_temporal_stages(make_vae, make_video, channels, temporal):
    vae = make_vae(block_out_channels=channels, temporal_downsample=temporal)
    video = make_video(2 * vae.temporal_compression_ratio)
    z = latents_of(vae, video)
    assert z.shape == (1, 4, 2, 16 // vae.spatial_compression_ratio, 24 // vae.spatial_compression_ratio)
    assert vae.decode(z).sample.shape == video.shape


@torch.no_grad()
def test_one_latent_pixel(make_vae, make_video):
    vae = make_vae()
    video = make_video(4, height=8, width=8)
    assert latents_of(vae, video).shape == (1, 4, 1, 1, 1)
    assert vae(video).sample.isfinite().all()


# Groups and causality ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temporal_downsample", [(False, True, True), (True, True, True), (True, False, False)])
def test_a_layer_sees_the_frames_of_one_latent_as_its_group(make_vae, make_video, temporal_downsample):
    vae, seen = make_vae(temporal_downsample=temporal_downsample), []
    for layer in vae.modules():
        if isinstance(layer, GroupCausalConv3d):
            layer.register_forward_pre_hook(lambda layer, args: seen.append((args[0].shape[2], layer.group_size)))
    vae(make_video(vae.temporal_compression_ratio))
    assert {frames for frames, _ in seen} == {2**k for k in range(sum(temporal_downsample) + 1)}
    assert all(frames == group for frames, group in seen)
    assert len(seen) == sum(isinstance(m, GroupCausalConv3d) for m in vae.modules())


@pytest.mark.parametrize("grad", [False, True], ids=["in chunks", "in one chunk"])
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("scheme", [{}, {"first_frame": "separate"}], ids=str)
def test_nothing_depends_on_later_groups_and_everything_on_earlier_ones(make_vae, make_video, design, scheme, grad):
    vae = make_vae(**design, **scheme)
    alone = 1 if scheme else 0
    video = make_video(12 + alone)
    with torch.set_grad_enabled(grad):
        z, frames = latents_of(vae, video), vae(video).sample
        for group in range(3):
            changed = video.clone()
            changed[:, :, alone + 4 * group + 3] *= -1  # the last frame of the group
            z_changed, frames_changed = latents_of(vae, changed), vae(changed).sample
            before, after = alone + group, alone + 4 * group
            if before > 0:
                close(z_changed[:, :, :before], z[:, :, :before])
                close(frames_changed[:, :, :after], frames[:, :, :after])
            for t in range(before, z.shape[2]):
                assert (z_changed[:, :, t] - z[:, :, t]).abs().max() > 1e-3 * z.abs().max()
            for t in range(after, frames.shape[2]):
                assert (frames_changed[:, :, t] - frames[:, :, t]).abs().max() > 1e-5 * frames.abs().max()


@torch.no_grad()
def test_a_group_sees_its_future_where_a_causal_layer_does_not(make_vae, make_video):
    """Frame 0 of a group is encoded with its later frames under group causality alone (Sec. 3.1)."""
    video = make_video(4)
    changed = video.clone()
    changed[:, :, 3] *= -1
    differences = {}
    for causality in ("group", "causal"):
        encoder = make_vae(temporal_causality=causality).encoder
        block = encoder.down_blocks[0].resnets[0]
        features = [block(encoder.conv_in.stream(v)[0])[0] for v in (video, changed)]
        differences[causality] = (features[0] - features[1]).abs().amax(dim=(0, 1, 3, 4))
    assert (differences["causal"][:3] == 0).all()
    assert differences["causal"][3] > 0.1
    assert (differences["group"] > 1e-3).tolist() == [True, True, True, True]


# Images -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("ratio", [4, 8])
def test_an_image_is_the_clip_that_repeats_it(make_vae, make_video, design, ratio):
    vae = make_vae(temporal_downsample=(ratio == 8, True, True), **design).double()
    image = make_video(1, batch=2).double()
    z = latents_of(vae, image)
    assert z.shape[2] == 1
    close(z, latents_of(vae, image.expand(-1, -1, ratio, -1, -1)))
    close(z, latents_of(vae, image.expand(-1, -1, ratio - 1, -1, -1)))
    if design["temporal_padding"] == "replicate":  # a clip that goes on stays static
        close(z.expand(-1, -1, 3, -1, -1), latents_of(vae, image.expand(-1, -1, 3 * ratio, -1, -1)))
    close(vae(image).sample, vae.decode(z).sample[:, :, :1])


@torch.no_grad()
def test_an_image_is_encoded_from_one_frame(make_vae, make_video):
    vae, seen = make_vae(), []
    vae.encoder.conv_in.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[2]))
    vae.encode(make_video(1))
    assert seen == [1]


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("ratio", [4, 8])
def test_an_image_is_decoded_to_one_frame_until_motion_is_trained(make_vae, design, ratio, tiled):
    vae = make_vae(temporal_downsample=(ratio == 8, True, True), **design).double()
    upsamplers = [module for module in vae.modules() if isinstance(module, TemporalUpsample)]
    z, seen = torch.randn(1, 4, 1, 4, 4, dtype=torch.float64), []
    if tiled:
        vae.enable_tiling(16, 16, 8, 8)
    vae.decoder.conv_out.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[2]))
    with torch.no_grad():
        vae.decode(z)
        assert set(seen) == {ratio}
        for i, upsampler in enumerate(upsamplers):
            for parameter in upsampler.conv.parameters():
                parameter.copy_(parameter.chunk(2)[0].repeat(2, *[1] * (parameter.ndim - 1)))
            seen.clear()
            frames = vae.decode(z).sample
            last = i == len(upsamplers) - 1
            assert set(seen) == {1 if last and design["temporal_padding"] == "replicate" else ratio}
            close(frames[:, :, : ratio - 1], vae.decode(z, num_frames=ratio - 1).sample)
            frames.mul_(1)  # is memory of its own
            with torch.enable_grad():  # the way of training: every frame, so that each half has its gradient
                close(frames, vae.decode(z).sample.detach())


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_a_separate_first_frame_is_an_image(make_vae, make_video, design):
    vae, video = make_vae(first_frame="separate", **design).double(), make_video(9).double()
    z, image_z = latents_of(vae, video), latents_of(vae, video[:, :, :1])
    assert z.shape[2] == 3
    close(z[:, :, :1], image_z)
    close(vae.decode(z).sample[:, :, :1], vae.decode(image_z).sample)
    in_sequence = make_vae(**design).double()
    if design["temporal_padding"] == "replicate":
        close(latents_of(in_sequence, video[:, :, :1]), image_z)  # the same network, another cut


@torch.no_grad()
@pytest.mark.parametrize("ratio", [4, 8])
@pytest.mark.parametrize("causality", ["group", "causal"])
def test_4k_plus_1_repeats_the_first_frame(make_vae, make_video, causality, ratio):
    config = {"temporal_downsample": (ratio == 8, True, True), "temporal_causality": causality}
    vae, plain = make_vae(frame_convention="4k+1", **config).double(), make_vae(**config).double()
    for frames in (ratio + 1, ratio + 3, 2 * ratio, 2 * ratio + 1):
        video = make_video(frames).double()
        padded = torch.cat([video[:, :, :1].expand(-1, -1, -frames % ratio, -1, -1), video], dim=2)
        z = latents_of(vae, video)
        close(z, latents_of(plain, padded))
        if (frames - 1) % ratio == 0:
            close(z[:, :, :1], latents_of(plain, video[:, :, :1]))
            assert torch.equal(vae.decode(z).sample, vae.decode(z, num_frames=frames).sample)
        close(vae.decode(z, num_frames=frames).sample, plain.decode(z).sample[:, :, -frames:])


# Batches ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slicing_runs_one_clip_at_a_time(make_vae, make_video):
    vae, video, batches = make_vae(), make_video(5, batch=3), []
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda layer, args: batches.append(args[0].shape[0]))
    z = latents_of(vae, video)
    frames = vae.decode(z, num_frames=5).sample
    assert set(batches) == {3}
    batches.clear()
    vae.enable_slicing()
    close(latents_of(vae, video), z)
    close(vae.decode(z, num_frames=5).sample, frames)
    assert set(batches) == {1}
    assert len(batches) == 12
    batches.clear()
    vae.disable_slicing()
    vae.encode(video)
    assert set(batches) == {3}


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix(make_vae, make_video):
    vae, video = make_vae().double(), make_video(8, batch=3).double()
    whole = vae(video).sample
    for i in range(3):
        close(vae(video[i : i + 1]).sample, whole[i : i + 1])


@torch.no_grad()
def test_memory_layout_of_the_input_does_not_matter(make_vae, make_video):
    vae, video = make_vae(), make_video(8, batch=2)
    expected = vae(video).sample
    frames_first = video.transpose(1, 2).contiguous().transpose(1, 2)
    flipped = video.flip(-1).contiguous().flip(-1)
    scattered = torch.stack([video, video], dim=-1)[..., 1]
    for same in (frames_first, flipped, scattered, video.contiguous(memory_format=torch.channels_last_3d)):
        close(vae(same).sample, expected)
    close(vae(video[:1].expand(2, -1, -1, -1, -1)).sample, vae(video[:1]).sample.expand(2, -1, -1, -1, -1))


@torch.no_grad()
def test_samples_follow_the_generator(make_vae, make_video):
    vae, video = make_vae(), make_video(5)

    def sample(seed):
        return vae(video, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(sample(1), sample(1))
    assert (sample(1) - sample(2)).abs().max() > 1e-3
    out = vae(video, sample_posterior=True, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(out.latent_dist.mean.shape, generator=torch.Generator().manual_seed(1))
    close(vae.decode(out.latent_dist.mean + out.latent_dist.std * noise, num_frames=5).sample, out.sample)
    reconstruction, posterior = vae(video, return_dict=False)
    close(reconstruction, vae.decode(posterior.mode(), num_frames=5).sample)


# Gradients --------------------------------------------------------------------------------------------------------------


def gradients(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> dict[str, torch.Tensor]:
    vae.zero_grad()
    out = vae(video, sample_posterior=True, generator=torch.Generator().manual_seed(0))
    loss = (out.sample - video).abs().mean() + 0.1 * out.latent_dist.mean.square().mean() + out.latent_dist.logvar.mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters()}


@pytest.mark.parametrize(
    "config", [{}, {"temporal_causality": "causal"}, {"first_frame": "separate"}, {"frame_convention": "4k+1"}], ids=str
)
def test_gradient_checkpointing_with_caches_keeps_the_gradients(make_vae, make_video, config):
    vae, video, calls = make_vae(**config).double().train(), make_video(10).double(), []
    vae.decoder.up_blocks[0].register_forward_pre_hook(lambda layer, args: calls.append(args[0].shape[2]))
    expected = gradients(vae, video)
    assert all(g.abs().max() > 0 for g in expected.values())
    assert calls == ([1, 3] if "first_frame" in config else [3])  # latent frames: all at once, or the first one by itself
    calls.clear()
    vae.enable_gradient_checkpointing()
    actual = gradients(vae, video)
    assert calls == [1] * 2 * (4 if "first_frame" in config else 3)  # chunk by chunk, and again in the backward pass
    for name, gradient in expected.items():
        if name.endswith("to_k.bias"):  # softmax does not see it: its gradient is rounding alone
            assert gradient.abs().max() < 1e-12
            continue
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_gradients_pass_through_caches(make_vae, make_video, design):
    """The gradients of chunks with caches are those of the clip, into the weights and into the video."""
    vae = make_vae(**design).double()
    video = make_video(12).double()

    def run(chunked):
        x = video.clone().requires_grad_()
        if not chunked:
            moments = vae.encode(x).latent_dist.parameters
            frames = vae.decode(moments[:, :4]).sample
        else:
            parts, cache, pieces, decoder_cache = [], None, [], None
            for chunk in x.split([4, 8], dim=2):
                moments, cache = vae.encode_chunk(chunk, cache)
                parts.append(moments)
            for part in torch.cat(parts, dim=2)[:, :4].split([2, 1], dim=2):
                frames, decoder_cache = vae.decode_chunk(part, decoder_cache)
                pieces.append(frames)
            frames = torch.cat(pieces, dim=2)
        return torch.autograd.grad(frames.sin().sum(), (x, *vae.encoder.parameters(), *vae.decoder.parameters()))

    for whole, chunked in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-9 * max(whole.abs().max().item(), 1.0))


def test_a_frozen_model_works_in_chunks_without_no_grad(make_vae, make_video):
    vae, sizes = make_vae(), []
    vae.encoder.register_forward_pre_hook(lambda layer, args: sizes.append(args[0].shape[2]))
    video = make_video(12)
    vae.encode(video)
    vae.requires_grad_(False)
    vae.encode(video)
    vae.encode(video.requires_grad_())
    vae.groups_per_chunk = 2
    vae.encode(video.detach())
    assert sizes == [12, 4, 4, 4, 12, 8, 4]


def test_padding_has_a_deterministic_backward(make_vae, make_video, live_memory):
    """Replication padding has none on CUDA: missing frames must come from slices and concatenation."""
    vae = make_vae().train()
    with live_memory() as operations:
        gradients(vae, make_video(6))
    assert "convolution.default" in operations.names
    assert not {name for name in operations.names if "replication_pad" in name or "reflection_pad" in name}


# Folding, copying -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_fuse_tdc_changes_no_result_and_no_key(make_vae, make_video, design):
    vae, video = make_vae(**design), make_video(9)
    expected, keys = vae(video).sample, list(vae.state_dict())
    vae.fuse_tdc()
    layers = [m for m in vae.modules() if isinstance(m, KernelLayer)]
    assert any(isinstance(layer, TemporalConv3d) for layer in layers)
    assert all(layer.fused for layer in layers)
    close(vae(video).sample, expected)
    close(vae(video[:, :, :1]).sample, make_vae(**design)(video[:, :, :1]).sample)
    assert list(vae.state_dict()) == keys
    close(copy.deepcopy(vae)(video).sample, expected)
    vae.unfuse_tdc()
    assert not any(layer.fused for layer in layers)
    vae.fuse_tdc()
    vae.train()
    assert not any(layer.fused for layer in layers)


@torch.no_grad()
def test_loading_into_a_fused_model_takes_effect(make_vae, make_video):
    vae, other, video = make_vae(), make_vae(seed=1), make_video(5)
    vae.fuse_tdc()
    assert (vae(video).sample - other(video).sample).abs().max() > 0.1
    vae.load_state_dict(other.state_dict())
    close(vae(video).sample, other(video).sample)


# Configuration and errors -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_configuration_from_json(make_vae, make_video):
    vae = make_vae(temporal_downsample=(True, False, True), frame_convention="4k+1", shift_factor=None, scaling_factor=2.0)
    config = json.loads(vae.to_json_string())
    assert config["temporal_downsample"] == [True, False, True]
    twin = AutoencoderKLVCVAE.from_config(config).eval()
    twin.load_state_dict(vae.state_dict())
    saved = {name: value for name, value in json.loads(twin.to_json_string()).items() if not name.startswith("_")}
    assert saved == {name: config[name] for name in saved}
    assert len(saved) == 27
    assert twin.temperal_downsample == (True, False, True)
    video = make_video(5)
    assert torch.equal(twin(video).sample, vae(video).sample)


def test_configuration_errors_name_argument_value_and_remedy():
    for config, message in (
        ({"temporal_operator": "tcd"}, r"temporal_operator is 'tcd', it must be one of \('tdc', 'conv'\)"),
        ({"temporal_causality": "none"}, "temporal_causality is 'none'"),
        ({"temporal_padding": "reflect"}, "temporal_padding is 'reflect'"),
        ({"first_frame": "alone"}, "first_frame is 'alone'"),
        ({"frame_convention": "1+4k"}, r"frame_convention is '1\+4k'"),
        ({"temporal_downsample": (True, True)}, r"temporal_downsample is \(True, True\).*one flag for each of the 3"),
        ({"norm_num_groups": 48}, "block_out_channels has 128, not a multiple of norm_num_groups 48"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values.*each of the 16 latent channels"),
        ({"latents_std": [1.0] * 4}, "latents_std has 4 values"),
    ):
        with pytest.raises(ValueError, match=message), torch.device("meta"):
            AutoencoderKLVCVAE(**config)


def test_shape_errors_name_argument_value_and_remedy(make_vae):
    vae = make_vae()
    for shape, message in (
        ((1, 3, 16, 16), r"x has shape \(1, 3, 16, 16\).*\.unsqueeze\(2\)"),
        ((1, 8, 3, 16, 16), r"x has shape .* 8 channels, the model takes 3: the order is \(batch, channels, frames"),
        ((1, 3, 0, 16, 16), "x has no frames"),
        ((0, 3, 4, 16, 16), "x has no clips"),
        ((1, 3, 4, 20, 16), "x has height 20, not a positive multiple of the spatial compression 8: pad to 24 and crop"),
        ((1, 3, 4, 16, 9), "x has width 9.*pad to 16"),
        ((1, 3, 4, 16, 0), "x has width 0.*pad to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"z has shape .* 3 channels, the model takes 4"):
        vae.decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"z has shape \(1, 4, 2, 2\)"):
        vae.decode(torch.zeros(1, 4, 2, 2))
    for num_frames in (0, -1, 9, 10**9):
        with pytest.raises(ValueError, match=f"num_frames is {num_frames}, the latents are of a clip of 1 to 8 frames"):
            vae.decode(torch.zeros(1, 4, 2, 2, 2), num_frames=num_frames)


def test_4k_plus_1_takes_only_the_number_of_frames_that_was_encoded(make_vae):
    """How often the first frame was repeated follows from it: 5 of 9 frames would be other frames than the first 5."""
    vae = make_vae(frame_convention="4k+1")
    for num_frames in (5, 8, 13):
        with pytest.raises(ValueError, match=f"num_frames is {num_frames}, the latents are of a clip of 9 to 12 frames"):
            vae.decode(torch.zeros(1, 4, 3, 2, 2), num_frames=num_frames)


def test_layers_that_stay_2d(make_vae):
    """Spatial resampling, shortcuts and attention are applied frame by frame (Sec. 3.2)."""
    vae = make_vae(block_out_channels=(8, 16, 16, 16))
    flat = {name for name, m in vae.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "temporal_" not in name}
    assert len([n for n in flat if n.endswith("samplers.0.conv")]) == 6
    assert len([n for n in flat if "attentions.0" in n]) == 8
    assert len([n for n in flat if n.endswith("conv_shortcut")]) == 2
    assert len(flat) == 16
    downs = [m for n, m in vae.named_modules() if n.endswith("temporal_downsampler")]
    assert [m.kernel_size for m in downs] == [(2, 1, 1)] * 2
    assert [m.stride[0] for m in downs] == [2, 2]
    ups = [p for n, p in vae.named_parameters() if n.endswith("temporal_upsampler.conv.weight")]
    assert [p.numel() for p in ups] == [2 * 16 * 16] * 2
