"""Configuration and weights that cannot drift apart, and weights that are elsewhere when a way into the model begins."""

import json
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import dispatch_model
from diffusers import AutoencoderKL
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vc_vae_diffusers import apply_tdc, remove_tdc
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

WEIGHTS = "diffusion_pytorch_model.safetensors"


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# The operator of the weights --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("saved", ["tdc", "conv"])
def test_another_operator_is_converted_to(make_vae, make_video, tmp_path, saved):
    vae, video = make_vae(temporal_operator=saved), make_video(8)
    vae.save_pretrained(tmp_path)
    other = {"tdc": "conv", "conv": "tdc"}[saved]
    loaded, info = AutoencoderKLVCVAE.from_pretrained(tmp_path, temporal_operator=other, output_loading_info=True)
    assert info["missing_keys"] == []
    assert loaded.config.temporal_operator == other
    assert not torch.equal(loaded.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    close(loaded(video).sample, vae(video).sample)
    loaded.save_pretrained(tmp_path / "converted")
    close(AutoencoderKLVCVAE.from_pretrained(tmp_path / "converted")(video).sample, vae(video).sample)
    same = AutoencoderKLVCVAE.from_pretrained(tmp_path, temporal_operator=saved)
    assert torch.equal(same.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    with pytest.raises(ValueError, match="device_map has put them in their places"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path, temporal_operator=other, device_map={"": "cpu"})


@torch.no_grad()
def test_a_model_whose_layers_were_replaced_says_so(make_vae, make_video, tmp_path):
    vae, video = make_vae(), make_video(8)
    expected = vae(video).sample
    for change, operator in ((remove_tdc, "conv"), (apply_tdc, "tdc")):
        change(vae)
        assert vae.config.temporal_operator == operator
        vae.save_pretrained(tmp_path / operator)
        loaded = AutoencoderKLVCVAE.from_pretrained(tmp_path / operator)
        assert loaded.config.temporal_operator == operator
        close(loaded(video).sample, expected)
    remove_tdc(vae.encoder)  # of which the configuration knows nothing
    with pytest.raises(ValueError, match="layers are of both temporal operators: call apply_tdc or remove_tdc on the whole"):
        vae.save_pretrained(tmp_path / "mixed")
    remove_tdc(vae.decoder)
    vae.save_pretrained(tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["temporal_operator"] == "conv"


def test_slices_of_other_frames_are_refused(make_vae, tmp_path, caplog):
    make_vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="temporal_causality is 'causal', the weights were trained as 'group'"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path, temporal_causality="causal")
    AutoencoderKLVCVAE.from_pretrained(tmp_path, temporal_causality="group", frame_convention="4k+1")
    assert not caplog.records
    loaded = AutoencoderKLVCVAE.from_pretrained(tmp_path, first_frame="separate")
    assert loaded.groups.alone == 1
    assert "first_frame='separate', but the weights were trained with 'in_sequence'" in caplog.text
    # A new network may have any configuration.
    assert AutoencoderKLVCVAE.from_config(loaded.config, temporal_causality="causal").config.temporal_causality == "causal"


# Changing a model that is built -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_settings_change_with_all_that_follows_from_them(make_vae, caplog):
    vae = make_vae(scaling_factor=0.5, shift_factor=0.1)
    vae.register_to_config(scaling_factor=4.0)
    assert (vae.config.latents_std, vae.config.latents_mean) == ([0.25] * 4, [0.1] * 4)
    vae.register_to_config(shift_factor=None)
    assert vae.config.latents_mean == [0.0] * 4
    assert not caplog.records
    vae.register_to_config(latents_std=[1.0, 2.0, 3.0, 4.0])
    assert vae.config.latents_std == [1.0, 2.0, 3.0, 4.0]
    vae.register_to_config(scaling_factor=2.0)
    assert vae.config.latents_std == [0.5] * 4
    assert "replaces the latents_std by channel" in caplog.text

    z = torch.randn(1, 4, 2, 2, 2)
    vae.register_to_config(frame_convention="4k+1")
    assert vae.decode(z).sample.shape[2] == 5
    vae.register_to_config(frame_convention="4k", first_frame="separate")
    assert vae.decode(z).sample.shape[2] == 5
    assert vae.encode(torch.zeros(1, 3, 6, 16, 16)).latent_dist.mean.shape[2] == 3

    vae.register_to_config(block_out_channels=[8, 8, 16, 16], latent_channels=4)  # what they are
    for change, message in (
        ({"latent_channels": 8}, "latent_channels is 4 and cannot become 8 in a built model"),
        ({"temporal_operator": "conv"}, "temporal_operator is 'tdc' and cannot become 'conv' in a built model"),
        ({"z_dim": 8}, "z_dim is 4 and cannot become 8"),
        ({"scaling_factor": 0}, "scaling_factor is 0, it must be a positive number"),
        ({"frame_convention": "4k+2"}, r"frame_convention is '4k\+2'"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.register_to_config(**change)
    assert vae.config.latents_std == [0.5] * 4


def test_fields_of_a_configuration_are_checked_one_by_one(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in (
        ("layers_per_block", 0, "layers_per_block is 0, it must be an integer of at least 1"),
        ("layers_per_block", 10**9, "layers_per_block is 1000000000, it must be an integer of at least 1 and at most 64"),
        ("in_channels", 10**9, "in_channels is 1000000000, it must be an integer of at least 1 and at most 16384"),
        ("block_out_channels", [8] * 13, "block_out_channels is .*at most 12 stages"),
        ("layers_per_block", 1.0, "layers_per_block is 1.0, it must be an integer"),
        ("in_channels", True, "in_channels is True, it must be an integer"),
        ("latent_channels", None, "latent_channels is None, it must be an integer"),
        ("use_quant_conv", "abc", "use_quant_conv is 'abc', it must be true or false"),
        ("mid_block_add_attention", 1, "mid_block_add_attention is 1, it must be true or false"),
        ("block_out_channels", [], r"block_out_channels is \[\], it must be a list of integers"),
        ("block_out_channels", "8888", "block_out_channels is '8888', it must be a list"),
        ("temporal_downsample", [0, 1, 1], r"temporal_downsample is \[0, 1, 1\], it must be a list of true and false"),
        ("act_fn", "silly", "act_fn is 'silly'.*choose 'silu'"),
        ("temporal_operator", None, "temporal_operator is None, it must be one of"),
        ("scaling_factor", 0.0, "scaling_factor is 0.0, it must be a positive number"),
        ("scaling_factor", None, "scaling_factor is None, it must be a positive number"),
        ("scaling_factor", float("nan"), "scaling_factor is nan, it must be a positive number"),
        ("shift_factor", "0.1", "shift_factor is '0.1', it must be a number, or null"),
        ("latents_std", [0.0] * 4, r"latents_std is \[0.0, 0.0, 0.0, 0.0\], it must be a list of positive numbers"),
        ("latents_std", "text", "latents_std is 'text', it must be a list of positive numbers"),
        ("latents_mean", [None] * 4, "latents_mean is .*None.*, it must be a list of numbers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, name: value}))
        with pytest.raises(ValueError, match=message):
            AutoencoderKLVCVAE.from_pretrained(tmp_path)


# Files ------------------------------------------------------------------------------------------------------------------


def test_incomplete_and_damaged_weights_are_refused(make_vae, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = "encoder.conv_in.weight"

    def written(changed: dict[str, torch.Tensor]) -> Path:
        save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return tmp_path

    with pytest.raises(ValueError, match=f"lacks 1 weights of its configuration .{name}.: the file is incomplete"):
        AutoencoderKLVCVAE.from_pretrained(written({k: v for k, v in state.items() if k != name}))
    for value in (float("nan"), float("inf")):
        broken = state[name].clone()
        broken[0, 0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=f"has NaN or infinite weights .{name}.: the file is damaged, its training"):
            AutoencoderKLVCVAE.from_pretrained(written({**state, name: broken}))
    large = {**state, name: torch.full_like(state[name], 1e5)}
    AutoencoderKLVCVAE.from_pretrained(written(large))
    with pytest.raises(ValueError, match=r"the numbers are too large for torch\.float16; take another checkpoint or dtype"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path, torch_dtype=torch.float16)


def test_pickled_weights_need_to_be_asked_for(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path)
    loaded = AutoencoderKLVCVAE.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(loaded.encoder.conv_in.weight, make_vae().encoder.conv_in.weight)


def test_folders_of_other_models_and_misspelt_arguments(make_vae, tmp_path, caplog):
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**small, **blocks).save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="is of AutoencoderKL, not of AutoencoderKLVCVAE, call from_image_vae"):
        AutoencoderKLVCVAE.from_pretrained(tmp_path / "image")
    make_vae().save_pretrained(tmp_path / "video")
    AutoencoderKLVCVAE.from_pretrained(tmp_path / "video", torch_dtype=torch.float32, local_files_only=True)
    assert not caplog.records
    AutoencoderKLVCVAE.from_pretrained(tmp_path / "video", frame_conventoin="4k+1")
    assert "from_pretrained does not know frame_conventoin (did you mean frame_convention?)" in caplog.text
    with pytest.raises(ValueError, match=r"temporal_downsampel \(did you mean temporal_downsample\?\)"):
        AutoencoderKLVCVAE.from_image_vae(tmp_path / "image", temporal_downsampel=(True,))


# Weights that are elsewhere ---------------------------------------------------------------------------------------------


def sequential(vae: AutoencoderKLVCVAE, folder: Path) -> AutoencoderKLVCVAE:
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.encoder.conv_in.weight.device.type == "meta"
    return vae


def on_disk(vae: AutoencoderKLVCVAE, folder: Path) -> AutoencoderKLVCVAE:
    placed = {"encoder": "cpu", "decoder": "disk"}
    dispatch_model(vae, placed, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    assert vae.decoder.conv_in.weight.device.type == "meta"
    return vae


def group_to_disk(vae: AutoencoderKLVCVAE, folder: Path) -> AutoencoderKLVCVAE:
    cpu = torch.device("cpu")
    apply_group_offloading(
        vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(folder)
    )
    for parameter in vae.parameters():  # what nobody loads spoils the result
        parameter.data.fill_(torch.nan)
    return vae


@torch.no_grad()
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "inflated"])
@pytest.mark.parametrize("elsewhere", [sequential, on_disk, group_to_disk])
def test_one_latent_frame_of_weights_that_are_elsewhere(make_vae, tmp_path, elsewhere, trained):
    vae, frames = make_vae(), []
    if not trained:
        for name, parameter in vae.named_parameters():
            if "temporal_upsampler" in name:
                parameter.copy_(parameter.chunk(2)[0].repeat(2, *[1] * (parameter.ndim - 1)))
    z = torch.randn(2, 4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    vae.decoder.conv_norm_out.register_forward_pre_hook(lambda layer, args: frames.append(args[0].shape[2]))
    expected = vae.decode(z).sample
    assert frames == [4 if trained else 1]
    assert torch.equal(expected[:, :, 0], expected[:, :, 3]) != trained
    elsewhere(vae, tmp_path)
    close(vae.decode(z).sample, expected)
    assert frames == [4 if trained else 1] * 2
    close(vae.decode_chunk(z)[0], expected)
    vae.enable_slicing()
    close(torch.cat(list(vae.decode_stream([z])), dim=2), expected)


@pytest.mark.parametrize("elsewhere", [sequential, on_disk, group_to_disk])
def test_weights_that_are_elsewhere_are_not_saved(make_vae, tmp_path, elsewhere):
    vae = elsewhere(make_vae(), tmp_path)
    with pytest.raises(ValueError, match=r"weights are no tensors with values \(.*conv_in.weight.*before it is offloaded"):
        vae.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def cast(vae: AutoencoderKLVCVAE, folder: Path) -> AutoencoderKLVCVAE:
    vae.enable_layerwise_casting(torch.bfloat16, torch.float32)
    return vae


def watched(vae: AutoencoderKLVCVAE, folder: Path) -> AutoencoderKLVCVAE:
    vae.decoder.conv_out.register_forward_hook(lambda *args: None)
    return vae


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (sequential, "is offloaded: convert first"),
        (on_disk, "the weight of decoder.* is offloaded: convert first"),
        (group_to_disk, r"encoder.conv_in has hooks of diffusers \(group_offloading\).*convert first"),
        (cast, r"encoder.conv_in has hooks of diffusers \(layerwise_casting\).*convert first"),
        (watched, "decoder.conv_out has hooks.*convert first"),
    ],
)
def test_wrapped_models_are_not_converted(make_vae, make_video, tmp_path, wrap, message):
    """The layers in the place of those that hooks know would compute with no weights, or with those of another dtype."""
    vae, video = wrap(make_vae(), tmp_path), make_video(5)
    expected = vae(video).sample
    with pytest.raises(ValueError, match=message):
        remove_tdc(vae)
    assert vae.config.temporal_operator == "tdc"
    assert torch.equal(vae(video).sample, expected)


@pytest.fixture
def mesh(tmp_path):
    """One process, over which FSDP shards nothing away."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("first", ["fuse", "shard"])
def test_a_sharded_model_computes_and_says_what_it_cannot(make_vae, make_video, tmp_path, mesh, first, caplog):
    vae, video = make_vae(), make_video(5)
    expected = vae(video).sample
    if first == "fuse":
        vae.fuse_tdc()
    fully_shard(vae.encoder, mesh=mesh)
    fully_shard(vae.decoder, mesh=mesh)
    vae.fuse_tdc()
    assert "folds no kernels of" in caplog.text
    close(vae(video).sample, expected)
    with pytest.raises(ValueError, match="the weights of encoder are sharded: convert first"):
        remove_tdc(vae)
    vae.encoder.reshard()
    vae.decoder.reshard()
    with pytest.raises(ValueError, match="no tensors with values"):
        vae.save_pretrained(tmp_path / "saved")
