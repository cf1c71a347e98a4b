"""Every adapter against a direct call of the class it wraps: frame counts, sizes, ranges, latents."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.evaluation.baselines import wrap_model
from vc_vae_diffusers.evaluation.loading import PUBLISHED, ModelSpec, load_model
from vc_vae_diffusers.evaluation.reconstructor import FrameRule, Original, Reconstructor
from vc_vae_diffusers.metrics.weights import tensor_digest

KL_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def _vcvae(**config) -> AutoencoderKLVCVAE:
    tiny = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKLVCVAE(**{**tiny, **config})


def _allegro() -> diffusers.AutoencoderKLAllegro:
    return diffusers.AutoencoderKLAllegro(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=320
    )


@dataclass
class Case:
    """A tiny model, and what its adapter must say of it. `exact` is a length its class takes as it is."""

    build: Callable[[], torch.nn.Module]
    rule: FrameRule
    separate_first: bool
    temporal: int
    spatial: int
    channels: int
    exact: int = 9
    size: int = 32


CAUSAL_4 = FrameRule(1, 4, image=True)
CAUSAL_8 = FrameRule(1, 8, image=True)
IMAGE = FrameRule(1, 1, image=True)
CASES = {
    "wan": Case(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        CAUSAL_4,
        True,
        4,
        8,
        16,
    ),
    "wan-2.2": Case(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
        ),
        CAUSAL_4,
        True,
        4,
        16,
        16,
    ),
    "qwen-image": Case(
        lambda: diffusers.AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        CAUSAL_4,
        True,
        4,
        8,
        16,
    ),
    "hunyuan": Case(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4
        ),
        CAUSAL_4,
        True,
        4,
        8,
        4,
    ),
    "hunyuan-1.5": Case(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1),
        CAUSAL_4,
        True,
        4,
        16,
        4,
    ),
    "cogvideox": Case(
        lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
        ),
        CAUSAL_8,
        True,
        4,
        8,
        4,
    ),
    "ltx": Case(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
        CAUSAL_8,
        True,
        8,
        32,
        8,
    ),
    "ltx-2": Case(
        lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            temporal_compression_ratio=8,
            spatial_compression_ratio=32,
        ),
        CAUSAL_8,
        True,
        8,
        32,
        8,
        size=64,
    ),
    "mochi": Case(
        lambda: diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
            latent_channels=4,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        FrameRule(1, 6, image=True),
        True,
        6,
        8,
        4,
        exact=7,
    ),
    "cosmos": Case(
        lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 4,
            decode_block_out_channels=(8,) * 4,
            num_layers=1,
            resolution=32,
            attention_resolutions=(8,),
        ),
        CAUSAL_8,
        True,
        8,
        8,
        4,
    ),
    "easyanimate": Case(
        lambda: diffusers.AutoencoderKLMagvit(
            block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4
        ),
        CAUSAL_4,
        True,
        4,
        8,
        4,
    ),
    "kvae": Case(
        lambda: diffusers.AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4),
        CAUSAL_4,
        True,
        4,
        8,
        4,
    ),
    "minimax": Case(
        lambda: diffusers.AutoencoderKLMiniMaxH3(
            latent_channels=4,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
            block_out_channels=(8,) * 6,
            layers_per_block=1,
            norm_num_groups=4,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
        ),
        FrameRule(22, 17),
        False,
        4,
        16,
        4,
        exact=22,
    ),
    "svd": Case(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
        ),
        IMAGE,
        False,
        1,
        2,
        4,
        exact=3,
    ),
    "image": Case(lambda: diffusers.AutoencoderKL(latent_channels=4, **KL_BLOCKS), IMAGE, False, 1, 2, 4, exact=3),
    "flux2": Case(lambda: diffusers.AutoencoderKLFlux2(latent_channels=4, **KL_BLOCKS), IMAGE, False, 1, 2, 4, exact=3),
    "asymmetric": Case(
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 8),
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        IMAGE,
        False,
        1,
        2,
        4,
        exact=3,
    ),
    "hunyuan-image": Case(
        lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
        ),
        IMAGE,
        False,
        1,
        2,
        4,
        exact=3,
    ),
    "dc": Case(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        IMAGE,
        False,
        1,
        2,
        4,
        exact=3,
    ),
    "taesd": Case(
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        IMAGE,
        False,
        1,
        2,
        4,
        exact=3,
    ),
    "vq": Case(
        lambda: diffusers.VQModel(latent_channels=4, num_vq_embeddings=16, **KL_BLOCKS), IMAGE, False, 1, 2, 4, exact=3
    ),
}


def _video(num_frames: int, height: int, width: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, 3, num_frames, height, width or height), generator=generator) * 2 - 1


@torch.no_grad()
def _direct(name: str, vae: torch.nn.Module, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction) by the class's own calls, for a video it accepts as it is."""
    if name == "minimax":
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1, 1)
        latents = vae.encode(((video + 1) / 2 - mean) / std).latent_dist.mode()
        return latents, (vae.decode(latents).sample * std + mean) * 2 - 1
    if name == "svd":
        latents = vae.encode(video[0].transpose(0, 1)).latent_dist.mode()
        sample = vae.decode(latents, num_frames=video.shape[2]).sample
        return latents.transpose(0, 1)[None], sample.transpose(0, 1)[None]
    if video.shape[2] == 3:
        encoded = [vae.encode(video[:, :, t], return_dict=False)[0] for t in range(3)]
        latents = [z if isinstance(z, torch.Tensor) else z.mode() for z in encoded]
        frames = [vae.decode(z).sample for z in latents]
        return torch.stack(latents, dim=2), torch.stack(frames, dim=2)
    latents = vae.encode(video).latent_dist.mode()
    return latents, vae.decode(latents).sample


def _wrapped(name: str) -> tuple[Reconstructor, torch.nn.Module]:
    torch.manual_seed(0)
    vae = CASES[name].build().eval()
    return wrap_model(vae), vae


@pytest.mark.parametrize("name", CASES)
def test_adapter_is_the_class_it_wraps(name):
    case = CASES[name]
    model, vae = _wrapped(name)
    assert model.frame_rule == case.rule
    assert model.separate_first is case.separate_first
    assert (model.temporal_compression, model.spatial_compression) == (case.temporal, case.spatial)
    assert model.latent_channels == case.channels
    video = _video(case.exact, case.size)
    latents, sample = _direct(name, vae, video)
    ours = model.reconstruct(video)
    assert model.latent_shape == tuple(latents.shape)
    assert model.latent_shape[1] == case.channels
    assert model.latent_shape[3:] == (case.size // case.spatial,) * 2
    if case.separate_first:
        assert model.latent_shape[2] == 1 + (case.exact - 1) // case.temporal
    assert sample.shape == video.shape
    assert (ours - sample.clamp(-1, 1)).abs().max() < 1e-5
    assert sample.std() > 1e-3  # a network that answers nothing would pass all of the above


@pytest.mark.parametrize("name", CASES)
def test_any_length_and_size_comes_back(name):
    case = CASES[name]
    model, _ = _wrapped(name)
    height, width = case.size + 5, case.size + 2
    for num_frames in (1, 4) if case.exact < 20 else (4,):
        video = _video(num_frames, height, width)
        ours = model.reconstruct(video)
        assert ours.shape == video.shape
        # Padding by repetition, spelled out.
        longer = case.rule.padded(num_frames)
        padded = torch.cat([video] + [video[:, :, -1:]] * (longer - num_frames), dim=2)
        rows, columns = -height % case.spatial, -width % case.spatial
        padded = torch.cat([padded] + [padded[..., -1:, :]] * rows, dim=3)
        padded = torch.cat([padded] + [padded[..., -1:]] * columns, dim=4)
        expected = model.reconstruct(padded)[:, :, :num_frames, :height, :width]
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_saved_models_load_by_folder(name, tmp_path):
    case = CASES[name]
    model, vae = _wrapped(name)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_model(ModelSpec("x", str(tmp_path / "pipeline")))
    assert type(loaded) is type(model)
    assert tensor_digest(loaded.module.state_dict()) == tensor_digest(vae.state_dict())
    video = _video(min(case.exact, 9), case.size)
    assert torch.equal(loaded.reconstruct(video), model.reconstruct(video))


def test_frame_rules():
    assert [CAUSAL_4.padded(n) for n in (1, 2, 5, 6, 16, 17)] == [1, 5, 5, 9, 17, 17]
    assert [CAUSAL_8.padded(n) for n in (1, 5, 9, 10)] == [1, 9, 9, 17]
    assert [FrameRule(22, 17).padded(n) for n in (1, 22, 23)] == [22, 22, 39]
    assert [FrameRule(16, 16).padded(n) for n in (4, 16, 17)] == [16, 16, 32]
    assert [FrameRule(24, 16).padded(n) for n in (1, 24, 25)] == [24, 24, 40]


@pytest.mark.parametrize(
    ("config", "separate_first", "rule"),
    [
        ({"z_channels": 4}, True, CAUSAL_4),
        ({"z_channels": 6, "double_z": False, "regularizer": "fsq"}, True, CAUSAL_4),
        ({"z_channels": 4, "is_causal": False}, False, FrameRule(16, 16)),
    ],
)
def test_vidtok_pads_as_its_forward_does(config, separate_first, rule):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderVidTok(ch=8, ch_mult=[1, 1, 1, 1], num_res_blocks=1, **config).eval()
    model = wrap_model(vae)
    assert model.separate_first is separate_first
    assert model.frame_rule == rule
    assert (model.temporal_compression, model.spatial_compression) == (4, 8)
    for num_frames in (6, 9) if separate_first else (16,):
        video = _video(num_frames, 32)
        with torch.no_grad():
            expected = vae(video, sample_posterior=False).sample
        assert expected.shape == video.shape
        assert (model.reconstruct(video) - expected.clamp(-1, 1)).abs().max() < 1e-5
        assert model.latent_shape[2] == (rule.padded(num_frames) - separate_first) // 4 + separate_first
    assert model.reconstruct(_video(1, 36)).shape == (1, 3, 1, 36, 36)


def test_allegro_frames_smaller_than_its_tile_are_not_lost():
    torch.manual_seed(0)
    vae = _allegro().eval()
    model = wrap_model(vae)
    assert (model.frame_rule, model.separate_first) == (FrameRule(24, 16), False)
    video = _video(24, 32)
    ours = model.reconstruct(video)
    assert model.latent_shape == (1, 4, 6, 4, 4)
    with torch.no_grad():  # one tile: the plain network
        moments = vae.encoder(video).transpose(1, 2)
        moments = vae.quant_conv(moments[0]).transpose(0, 1)[None]
        z = vae.post_quant_conv(moments.chunk(2, dim=1)[0].transpose(1, 2)[0]).transpose(0, 1)[None]
        expected = vae.decoder(z)
    assert (ours - expected.clamp(-1, 1)).abs().max() < 1e-5
    assert expected.std() > 1e-3
    assert model.reconstruct(_video(3, 32)).shape == (1, 3, 3, 32, 32)


@torch.no_grad()
def test_hunyuan_video_codes_the_protocols_17_frames_in_one_piece():
    video = _video(17, 32)
    torch.manual_seed(0)
    vae = CASES["hunyuan"].build().eval()
    tiled = vae.decode(vae.encode(video).latent_dist.mode()).sample
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    whole = vae.decode(vae.encode(video).latent_dist.mode()).sample
    vae.use_framewise_encoding = vae.use_framewise_decoding = True
    adapter = wrap_model(vae)
    ours = adapter.reconstruct(video)
    torch.testing.assert_close(ours, whole.clamp(-1, 1), rtol=0, atol=1e-6)
    assert (tiled.clamp(-1, 1) - ours).abs().max() > 1e-2  # what diffusers does by default is another video
    assert adapter.settings == {"temporal_tiles": [64, 48]}


def test_ltx_decoders_that_denoise_run_at_timestep_zero():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        timestep_conditioning=True,
    ).eval()
    model, video = wrap_model(vae), _video(9, 32)
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()
        at_zero, later = (vae.decode(z, torch.tensor([t])).sample for t in (0.0, 0.5))
    ours = model.reconstruct(video)
    assert (ours - at_zero.clamp(-1, 1)).abs().max() < 1e-5
    assert (ours - later.clamp(-1, 1)).abs().max() > 1e-4


def test_output_is_clamped_and_float32():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=4, **KL_BLOCKS).to(torch.bfloat16).eval()
    vae.decoder.conv_out.bias.data += 3.0
    ours = wrap_model(vae).reconstruct(_video(2, 16))
    assert ours.dtype == torch.float32
    assert ours.max() == 1.0


def test_sampled_posteriors_follow_the_generator():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=4, **KL_BLOCKS).eval()
    model, video = wrap_model(vae, posterior="sample"), _video(2, 16)
    first, again, other = (model.reconstruct(video, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    assert (first - wrap_model(vae).reconstruct(video)).abs().max() > 1e-3


# VC-VAE ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "separate_first"),
    [({}, False), ({"first_frame": "separate"}, True), ({"frame_convention": "4k+1"}, False)],
)
def test_vcvae_streams_what_it_reconstructs_whole(config, separate_first):
    torch.manual_seed(0)
    vae = _vcvae(**config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model, video = wrap_model(vae), _video(11, 36, 40)
    assert model.streams
    assert model.separate_first is separate_first
    assert (model.temporal_compression, model.spatial_compression, model.latent_channels) == (4, 8, 4)
    whole = model.reconstruct(video)
    assert whole.shape == video.shape
    chunks = list(model.reconstruct_stream(video.split([3, 1, 7], dim=2), num_frames=11))
    assert len(chunks) > 1
    streamed = torch.cat(chunks, dim=2)
    assert streamed.shape[2] >= 11  # the surplus of the last group is the caller's to cut
    assert (streamed[:, :, :11] - whole).abs().max() < 1e-5
    assert model.seconds.encode > 0
    assert model.seconds.decode > 0


def test_vcvae_4k_plus_1_stream_needs_its_length():
    model = wrap_model(_vcvae(frame_convention="4k+1").eval())
    with pytest.raises(ValueError, match="needs the length of a stream"):
        next(model.reconstruct_stream([_video(4, 32)]))


def test_untrained_vcvae_of_an_image_vae_broadcasts_keyframes(tmp_path):
    torch.manual_seed(0)
    image_vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    image_vae.save_pretrained(tmp_path / "image_vae")
    video = _video(8, 32)
    untrained = load_model(ModelSpec.parse(f"untrained=inflate:{tmp_path / 'image_vae'}"))
    frames = load_model(ModelSpec.parse(f"2d={tmp_path / 'image_vae'}")).reconstruct(video)
    expected = frames[:, :, [3, 3, 3, 3, 7, 7, 7, 7]]
    assert (untrained.reconstruct(video) - expected).abs().max() < 1e-4


# Names and users' files ------------------------------------------------------------------------------------------------


def test_original_is_the_source():
    video = _video(3, 17, 19)
    assert torch.equal(Original().reconstruct(video), video)


def test_model_names(tmp_path):
    assert ModelSpec.parse("wan2.1") == ModelSpec("wan2.1", "wan2.1")
    assert ModelSpec.parse("Ours=some/where") == ModelSpec("Ours", "some/where")
    assert ModelSpec.parse(str(tmp_path)) == ModelSpec(tmp_path.name, str(tmp_path))
    assert set(PUBLISHED) == {"cogvideox", "wan2.1", "hunyuanvideo", "ltx", "mochi", "cosmos", "flux", "sd3.5"}
    with pytest.raises(ValueError, match=r"convert it and give the folder: vidtok=FOLDER"):
        load_model(ModelSpec.parse("vidtok"))
    with pytest.raises(ValueError, match="neither a folder here, nor a hub id"):
        load_model(ModelSpec.parse("./nowhere"))
    with pytest.raises(ValueError, match="give both parts"):
        ModelSpec.parse("=x")


def test_unknown_class_says_what_to_do():
    with pytest.raises(ValueError, match=r"AutoencoderOobleck.*docs/evaluation\.md"):
        wrap_model(diffusers.AutoencoderOobleck(encoder_hidden_size=8, decoder_channels=8, downsampling_ratios=[2]))


ADAPTER = """
    import torch

    class Halves(torch.nn.Module):
        frame_rule = (1, 4)
        separate_first = True
        temporal_compression = 4
        spatial_compression = 2
        latent_channels = 3

        def __init__(self, scale):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))

        def encode(self, video):
            assert (video.shape[2] - 1) % 4 == 0 and video.shape[3] % 2 == 0
            return video[:, :, ::4, ::2, ::2] * self.scale

        def decode(self, latents):
            video = latents.repeat_interleave(2, 3).repeat_interleave(2, 4).repeat_interleave(4, 2)
            return video[:, :, 3:] / self.scale

    def load(checkpoint, *, device, dtype):
        return Halves(float(checkpoint)).to(device, dtype)
"""


def test_a_users_file_is_a_model(tmp_path):
    path = tmp_path / "halves.py"
    path.write_text(textwrap.dedent(ADAPTER))
    model = load_model(ModelSpec.parse(f"halves={path}:2.0"))
    assert model.module.scale == 2.0
    assert (model.frame_rule, model.separate_first, model.latent_channels) == (CAUSAL_4, True, 3)
    video = _video(6, 15)
    ours = model.reconstruct(video)
    assert ours.shape == video.shape
    assert torch.equal(ours[:, :, 1:5, 0, 0], video[:, :, 4:5, 0, 0].expand(-1, -1, 4))
    assert model.latent_shape == (1, 3, 3, 8, 8)
    path.write_text(textwrap.dedent(ADAPTER).replace("separate_first = True", ""))
    with pytest.raises(ValueError, match="without separate_first"):
        load_model(ModelSpec.parse(f"halves={path}:2.0"))
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"no function load"):
        load_model(ModelSpec.parse(f"halves={path}"))
    with pytest.raises(ValueError, match="no such file"):
        load_model(ModelSpec.parse(f"halves={tmp_path / 'missing.py'}"))


def test_digest_sees_one_changed_bit():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=4, **KL_BLOCKS).to(torch.bfloat16)
    before = tensor_digest(vae.state_dict())
    assert before == tensor_digest(vae.state_dict())
    vae.decoder.conv_out.bias.data[0] += 0.01
    assert tensor_digest(vae.state_dict()) != before
