"""What diffusers and accelerate expect of a VAE: aliases, saving and loading, hooks, offloading, casting."""

import inspect
import json

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import AutoModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn

import vc_vae_diffusers
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# Names that pipelines read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temporal", "channels"), [((False, True, True), 16), ((True, True, True), 32), ((True, False, False), 4)]
)
def test_aliases(make_vae, temporal, channels):
    vae = make_vae(temporal_downsample=temporal, latent_channels=channels, scaling_factor=0.5, shift_factor=0.1)
    ratio = 2 ** sum(temporal)
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio) == (ratio, 8)
    assert vae.temperal_downsample == temporal
    config = vae.config
    assert (config.temporal_compression_ratio, config.spatial_compression_ratio) == (ratio, 8)
    assert (config.scale_factor_temporal, config.scale_factor_spatial) == (ratio, 8)
    assert (config.z_dim, config.latent_channels) == (channels, channels)
    assert config.latents_mean == [0.1] * channels
    assert config.latents_std == [2.0] * channels
    assert (config.scaling_factor, config.shift_factor) == (0.5, 0.1)
    assert config.invert_scale_latents is False
    assert len(config.block_out_channels) == 4


def test_default_configuration_is_flux():
    with torch.device("meta"):
        config = AutoencoderKLVCVAE().config
    assert (config.latent_channels, config.block_out_channels, config.norm_num_groups) == (16, (128, 256, 512, 512), 32)
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    assert config.temporal_downsample == (False, True, True)
    assert (config.use_quant_conv, config.use_post_quant_conv, config.mid_block_add_attention) == (False, False, True)


def test_mean_and_std_without_a_shift_and_with_measured_statistics(make_vae):
    vae = make_vae(shift_factor=None, scaling_factor=4.0)
    assert vae.config.latents_mean == [0.0] * 4
    assert vae.config.latents_std == [0.25] * 4
    measured = make_vae(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=(0.5,) * 4)
    assert measured.config.latents_mean == [1.0, 2.0, 3.0, 4.0]
    assert measured.config.latents_std == [0.5] * 4


def test_a_factor_given_on_loading_replaces_the_saved_statistics(make_vae, tmp_path, caplog):
    make_vae(scaling_factor=0.5, shift_factor=0.1).save_pretrained(tmp_path / "uniform")
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "uniform", scaling_factor=4.0).config
    assert (config.latents_mean, config.latents_std) == ([0.1] * 4, [0.25] * 4)
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "uniform", shift_factor=None).config
    assert (config.latents_mean, config.latents_std) == ([0.0] * 4, [2.0] * 4)
    assert not caplog.records

    mean, std = [1.0, 2.0, 3.0, 4.0], [0.5, 0.6, 0.7, 0.8]
    make_vae(latents_mean=mean, latents_std=std).save_pretrained(tmp_path / "measured")
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "measured").config
    assert (config.latents_mean, config.latents_std) == (mean, std)
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "measured", scaling_factor=4.0, latents_std=std).config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (4.0, mean, std)
    assert not caplog.records
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "measured", scaling_factor=4.0).config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (4.0, mean, [0.25] * 4)
    (record,) = caplog.records
    assert record.getMessage().startswith("scaling_factor=4.0 replaces the latents_std by channel")


def test_signatures_and_flags(make_vae):
    vae = make_vae()
    assert isinstance(vae, AutoencoderMixin)
    assert "num_frames" not in inspect.signature(vae.forward).parameters  # Latte would pass it on to decode
    assert list(inspect.signature(vae.encode).parameters) == ["x", "return_dict"]
    assert list(inspect.signature(vae.decode).parameters)[:2] == ["z", "return_dict"]
    assert AutoencoderKLVCVAE._supports_gradient_checkpointing
    assert AutoencoderKLVCVAE._skip_layerwise_casting_patterns == ("norm",)
    assert not list(vae.buffers(recurse=False))
    vae.enable_gradient_checkpointing()
    assert vae.encoder.gradient_checkpointing
    assert vae.decoder.gradient_checkpointing
    assert vae.is_gradient_checkpointing
    vae.disable_gradient_checkpointing()
    assert not vae.decoder.gradient_checkpointing
    named = {type(m).__name__ for m in vae.modules()}
    assert set(AutoencoderKLVCVAE._no_split_modules) <= named
    children = {name for name, _ in make_vae(use_quant_conv=True, use_post_quant_conv=True).named_children()}
    assert set(AutoencoderKLVCVAE._group_offload_block_modules) == children


@torch.no_grad()
def test_outputs_are_diffusers_own(make_vae, make_video):
    vae, video = make_vae(), make_video(5)
    encoded = vae.encode(video)
    assert isinstance(encoded, AutoencoderKLOutput)
    as_tuple = vae.encode(video, return_dict=False)
    assert type(as_tuple) is tuple
    z = as_tuple[0].mode()
    close(z, encoded.latent_dist.mode())
    assert isinstance(vae.decode(z), DecoderOutput)
    decoded = vae.decode(z, return_dict=False)
    assert type(decoded) is tuple
    close(decoded[0], vae.decode(z).sample)
    close(vae._encode(video), encoded.latent_dist.parameters)


# Saving and loading -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [{}, {"temporal_downsample": (True, True, True), "frame_convention": "4k+1", "use_quant_conv": True}], ids=str
)
def test_round_trip(make_vae, make_video, tmp_path, config):
    vae, video = make_vae(**config), make_video(5)
    vae.fuse_tdc()
    vae.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "AutoencoderKLVCVAE"
    assert saved["temporal_downsample"] == list(vae.temperal_downsample)
    loaded, info = AutoencoderKLVCVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    assert not loaded.training
    assert loaded.temporal_compression_ratio == vae.temporal_compression_ratio
    close(loaded(video).sample, vae(video).sample)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_variants_shards_dtypes_and_subfolders(make_vae, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae", max_shard_size="40KB", variant="fp16")
    shards = sorted(p.name for p in (tmp_path / "vae").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(".fp16-" in name for name in shards)
    loaded = AutoencoderKLVCVAE.from_pretrained(tmp_path, subfolder="vae", variant="fp16", torch_dtype=torch.float16)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half()), name
    slow = AutoencoderKLVCVAE.from_pretrained(tmp_path, subfolder="vae", variant="fp16", low_cpu_mem_usage=False)
    assert torch.equal(slow.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path, subfolder="vae")


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"encoder": "cpu", "decoder": "cpu"}], ids=str)
def test_device_map(make_vae, make_video, tmp_path, device_map):
    vae, video = make_vae(), make_video(5)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLVCVAE.from_pretrained(tmp_path, device_map=device_map)
    close(loaded(video).sample, vae(video).sample)
    moments, _ = loaded.encode_chunk(video[:, :, :4])
    close(moments, vae.encode(video).latent_dist.parameters[:, :, :1])


def test_auto_model_finds_the_class_by_its_library(make_vae, tmp_path):
    """`model_index.json` names the module; diffusers then looks for the class and for ModelMixin in it."""
    assert AutoencoderKLVCVAE.__module__ == "vc_vae_diffusers"
    assert vc_vae_diffusers.ModelMixin in AutoencoderKLVCVAE.__mro__
    make_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["vc_vae_diffusers", "AutoencoderKLVCVAE"]}))
    assert type(AutoModel.from_pretrained(str(tmp_path), subfolder="vae")) is AutoencoderKLVCVAE


# Hooks and offloading ---------------------------------------------------------------------------------------------------


class CountingOffload(CpuOffload):
    """The hook of `enable_model_cpu_offload`, on the CPU: what it would move, it counts."""

    def __init__(self):
        super().__init__(execution_device=torch.device("cpu"))
        self.moves = 0

    def init_hook(self, module):
        return module

    def pre_forward(self, module, *args, **kwargs):
        self.moves += 1
        return args, kwargs


@torch.no_grad()
def test_model_offload_hooks_fire_for_every_way_in(make_vae, make_video):
    vae, hook, video = make_vae(), CountingOffload(), make_video(8)
    z = vae.encode(video).latent_dist.mode()
    add_hook_to_module(vae, hook)
    ways = {
        "encode": lambda: vae.encode(video),
        "decode": lambda: vae.decode(z),
        "encode_chunk": lambda: vae.encode_chunk(video),
        "decode_chunk": lambda: vae.decode_chunk(z),
        "encode_stream": lambda: list(vae.encode_stream([video])),
        "decode_stream": lambda: list(vae.decode_stream([z])),
        "tiling_error": lambda: vae.tiling_error(video),
        "forward": lambda: vae(video),
    }
    for name, way in ways.items():
        hook.moves = 0
        way()
        assert hook.moves >= 1, f"{name} leaves an offloaded model where it is"
    hook.moves = 0
    list(vae.decode_stream([z[:, :, :1], z[:, :, 1:]]))
    assert hook.moves == 2  # for every chunk: another model may have taken its place in between


@torch.no_grad()
def test_sequential_offload(make_vae, make_video):
    vae, video = make_vae(use_quant_conv=True, use_post_quant_conv=True), make_video(9)
    expected = vae(video).sample
    z = vae.encode(video).latent_dist.parameters
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.encoder.conv_in.weight.device.type == "meta"
    close(vae(video).sample, expected)
    close(torch.cat([p.parameters for p in vae.encode_stream(video.split(2, dim=2))], dim=2), z)
    close(torch.cat(list(vae.decode_stream([z[:, :4]], num_frames=9)), dim=2), expected)
    vae.enable_tiling(16, 16, 8, 8)
    assert vae(video).sample.isfinite().all()
    assert vae.encoder.conv_in.weight.device.type == "meta"


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_through_encode_and_decode(make_vae, make_video, tmp_path, offload_type):
    """With the weights on disk and NaN in their place, a group that nobody loads spoils the result."""
    vae, video = make_vae(use_quant_conv=True, use_post_quant_conv=True), make_video(9)
    expected, z = vae(video).sample, vae.encode(video).latent_dist.parameters
    groups = {} if offload_type == "leaf_level" else {"num_blocks_per_group": 1}
    apply_group_offloading(
        vae,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        offload_to_disk_path=str(tmp_path),
        **groups,
    )
    assert list(tmp_path.glob("*.safetensors"))

    def poison():
        for parameter in vae.parameters():
            parameter.data.fill_(torch.nan)

    poison()
    close(vae.encode(video).latent_dist.parameters, z)
    poison()
    close(vae.decode(z[:, :4], num_frames=9).sample, expected)
    poison()
    close(torch.cat([p.parameters for p in vae.encode_stream(video.split(5, dim=2))], dim=2), z)
    poison()
    first, cache = vae.decode_chunk(z[:, :4, :1])
    poison()
    second, _ = vae.decode_chunk(z[:, :4, 1:], cache)
    close(torch.cat([first, second], dim=2)[:, :, :9], expected)


def test_every_temporal_layer_is_a_unit_of_casting_and_offloading(make_vae):
    """diffusers casts and offloads convolutions and linear layers, and leaves parameters elsewhere alone."""
    units = (nn.Conv2d, nn.Conv3d, nn.Linear)
    vae = make_vae()
    held = {id(p) for m in vae.modules() if isinstance(m, (*units, nn.GroupNorm)) for p in m.parameters(recurse=False)}
    assert {id(p) for p in vae.parameters()} == held
