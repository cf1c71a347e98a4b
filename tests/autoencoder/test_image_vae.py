"""Reading image VAEs from every layout, and the equality of a fresh video VAE with the image VAE it came from."""

import json
import logging
import os
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from image_vaes import FLUX, SD3, SDXL, SMALL, bfl_keys, random_image_vae, to_bfl
from safetensors.torch import save_file

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.image_vae import ImageVAE, inflate, read_image_vae
from vc_vae_diffusers.operators.tdc import TemporalConv3d

TOLERANCE = 1e-4  # SPEC section 3, absolute, float32


def save(vae: AutoencoderKL, folder: Path, config: dict) -> Path:
    """Save as diffusers does, with the configuration as it was published."""
    vae.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0", **config})
    )
    return folder


def clip(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.05, "a comparison of zeros proves nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def assert_keyframes_are_those_of(image_vae: AutoencoderKL, vae: AutoencoderKLVCVAE, frames: int) -> None:
    """SPEC section 3: latents of every r_t-th frame, their reconstructions over whole groups, images as they are."""
    ratio, channels = vae.temporal_compression_ratio, image_vae.config.latent_channels
    video = clip(frames)
    keyframes = [min(k, frames - 1) for k in range(ratio - 1, frames + ratio - 1, ratio)]
    posterior = vae.encode(video).latent_dist
    assert posterior.mean.shape[2] == len(keyframes)
    reconstruction = vae.decode(posterior.mode(), num_frames=frames).sample
    for i, k in enumerate(keyframes):
        image_posterior = image_vae.encode(video[:, :, k]).latent_dist
        equal(posterior.mean[:, :channels, i], image_posterior.mean)
        equal(posterior.logvar[:, :channels, i], image_posterior.logvar)
        assert not posterior.mean[:, channels:].any()
        assert not posterior.logvar[:, channels:].any()
        image = image_vae.decode(image_posterior.mode()).sample
        for t in range(ratio * i, min(ratio * (i + 1), frames)):
            equal(reconstruction[:, :, t], image)
    image = video[:, :, :1]
    expected = image_vae.decode(image_vae.encode(image[:, :, 0]).latent_dist.mode()).sample
    z = vae.encode(image).latent_dist.mode()
    assert z.shape[2] == 1
    for frame in vae.decode(z, num_frames=ratio).sample.unbind(2):
        equal(frame, expected)


# Full published layouts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixteen_channels() -> AutoencoderKL:
    """Flux's and SD3's network in full; they differ in scaling and shift alone."""
    return random_image_vae(FLUX)


def test_the_flux_layout_has_its_published_keys(sixteen_channels):
    state = to_bfl(sixteen_channels)
    assert len(state) == len(sixteen_channels.state_dict()) == 244
    assert sum(tensor.numel() for tensor in state.values()) == 83_819_683
    shared = Path(os.environ.get("VCVAE_SHARED", Path(__file__).parents[3] / "shared"))
    published = shared / "docs" / "flux_ae_keys_bfl.json"
    if not published.exists():
        pytest.skip("the published list of keys is not at hand (VCVAE_SHARED): counted only")
    assert {key: list(tensor.shape) for key, tensor in state.items()} == json.loads(published.read_text())


@pytest.mark.parametrize(
    ("temporal", "latent_channels", "frames"),
    [((False, True, True), 16, 6), ((True, True, True), 32, 9)],
    ids=["4x8x8", "8x8x8"],
)
def test_flux_from_its_own_file(sixteen_channels, tmp_path, temporal, latent_channels, frames):
    save_file(to_bfl(sixteen_channels), tmp_path / "ae.safetensors")
    vae = AutoencoderKLVCVAE.from_image_vae(
        str(tmp_path / "ae.safetensors"), temporal_downsample=temporal, latent_channels=latent_channels
    )
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)
    assert vae.config.latents_mean == [0.1159] * latent_channels
    assert_keyframes_are_those_of(sixteen_channels, vae, frames)


@pytest.mark.parametrize(
    ("temporal", "latent_channels", "frames"),
    [((False, True, True), 16, 4), ((True, True, True), 32, 8)],
    ids=["4x8x8", "8x8x8"],
)
def test_sd3_from_its_repository(sixteen_channels, tmp_path, temporal, latent_channels, frames):
    save(sixteen_channels, tmp_path / "vae", SD3)
    config = {"temporal_downsample": temporal, "latent_channels": latent_channels, "temporal_causality": "causal"}
    vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, subfolder="vae", **config)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)
    assert_keyframes_are_those_of(sixteen_channels, vae, frames)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> tuple[AutoencoderKL, Path]:
    image_vae = random_image_vae(SDXL, seed=1)
    assert image_vae.quant_conv is not None
    return image_vae, save(image_vae, tmp_path_factory.mktemp("sdxl"), SDXL)


@pytest.mark.parametrize(
    ("temporal", "latent_channels", "frames"),
    [((False, True, True), 4, 4), ((True, True, True), 8, 8)],
    ids=["4x8x8", "8x8x8"],
)
def test_sdxl_with_its_quant_convs(sdxl, temporal, latent_channels, frames):
    image_vae, folder = sdxl
    vae = AutoencoderKLVCVAE.from_image_vae(str(folder), temporal_downsample=temporal, latent_channels=latent_channels)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.13025, None)
    assert vae.config.latents_mean == [0.0] * latent_channels
    assert vae.config.use_quant_conv
    assert vae.config.use_post_quant_conv
    assert_keyframes_are_those_of(image_vae, vae, frames)


# Every design, on small networks ----------------------------------------------------------------------------------------


DESIGNS = [
    *(((False, True, True), o, c, p) for o in ("tdc", "conv") for c in ("group", "causal") for p in ("replicate", "zeros")),
    *((temporal, "tdc", "group", "replicate") for temporal in ((True, True, True), (True, False, False), (False,) * 3)),
    ((True, True, True), "tdc", "causal", "zeros"),
]


@pytest.mark.parametrize(("temporal", "operator", "causality", "padding"), DESIGNS)
def test_every_design_starts_as_the_image_vae(tmp_path, temporal, operator, causality, padding):
    """With zeros for padding too: nothing but the anchor is in use yet."""
    image_vae = random_image_vae({**FLUX, **SMALL})
    save(image_vae, tmp_path, {**FLUX, **SMALL})
    design = {"temporal_operator": operator, "temporal_causality": causality, "temporal_padding": padding}
    vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, temporal_downsample=temporal, latent_channels=20, **design)
    assert_keyframes_are_those_of(image_vae, vae, frames=2 * vae.temporal_compression_ratio + 1)


@torch.no_grad()
def test_conventions_of_the_first_frame(tmp_path):
    image_vae = random_image_vae({**FLUX, **SMALL})
    save(image_vae, tmp_path, {**FLUX, **SMALL})
    video = clip(9)
    for scheme, keyframes in (
        ({"first_frame": "separate"}, [0, 4, 8]),
        ({"frame_convention": "4k+1"}, [0, 4, 8]),
        ({}, [3, 7, 8]),
    ):
        vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, **scheme)
        latents = vae.encode(video).latent_dist.mode()
        frames = vae.decode(latents, num_frames=9).sample
        expected = [image_vae.encode(video[:, :, k]).latent_dist.mode() for k in keyframes]
        equal(latents, torch.stack(expected, dim=2))
        equal(frames[:, :, 0], image_vae.decode(expected[0]).sample)
        equal(frames[:, :, 8], image_vae.decode(expected[2]).sample)


@torch.no_grad()
@pytest.mark.parametrize("name", ["quant", "plain"])
def test_new_latent_channels_do_nothing_yet(tmp_path, name):
    config = {**(SDXL if name == "quant" else FLUX), **SMALL}
    save(random_image_vae(config), tmp_path, config)
    old = config["latent_channels"]
    vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, latent_channels=2 * old)
    z = torch.randn(1, 2 * old, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    other = z.clone()
    other[:, old:] = 0
    equal(vae.decode(z).sample, vae.decode(other).sample)
    posterior = vae.encode(clip(8)).latent_dist
    assert not posterior.mean[:, old:].any()
    assert (posterior.std[:, old:] == 1).all()


def test_gradients_reach_what_is_new(tmp_path):
    """Neither zero slices nor zero channels are a dead end: one step of training moves every one of them."""
    config = {**SDXL, **SMALL}
    save(random_image_vae(config), tmp_path, config)
    vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, latent_channels=8, temporal_downsample=(True, True, True)).train()
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3)
    for _ in range(2):  # the encoder's new channels wait for the decoder's to be used
        optimizer.zero_grad()
        vae(clip(16), sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample.square().mean().backward()
        optimizer.step()
    for name, parameter in vae.named_parameters():
        if "to_k.bias" not in name:  # softmax does not see it
            assert parameter.grad.abs().max() > 0, name
    for name, layer in vae.named_modules():
        if isinstance(layer, TemporalConv3d):
            moved = layer.weight.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
            at_latent_rate = layer.kernel_size[0] == 3 and layer.group_size == 1
            assert moved.tolist() == ([True, True, False] if at_latent_rate else [True] * len(moved)), name
    assert vae.encoder.conv_out.weight.grad[4:8].abs().max() > 0
    assert vae.decoder.conv_in.weight.grad[:, 4:].abs().max() > 0


# Reading ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> AutoencoderKL:
    return random_image_vae({**FLUX, **SMALL})


def assert_read(image_vae: ImageVAE, expected: AutoencoderKL) -> None:
    state = expected.state_dict()
    assert image_vae.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(image_vae.state[name], tensor), name
    rebuilt = image_vae.build()
    x = clip(1)[:, :, 0]
    with torch.no_grad():
        equal(rebuilt(x).sample, expected(x).sample)


def test_bfl_keys_of_a_prefix_of_a_whole_checkpoint(small, tmp_path):
    for prefix in ("", "first_stage_model.", "vae."):
        state = {f"{prefix}{key}": tensor for key, tensor in to_bfl(small).items()}
        if prefix:
            state["model.diffusion_model.joint_blocks.0.weight"] = torch.zeros(3)
        path = tmp_path / f"{prefix or 'plain.'}safetensors"
        save_file(state, path)
        image_vae = read_image_vae(path)
        assert_read(image_vae, small)
        assert len(image_vae.assumptions) == 1
        family = (
            "1.5305 and shift_factor 0.0609 of Stable Diffusion 3" if prefix else "0.3611 and shift_factor 0.1159 of FLUX.1"
        )
        assert f"scaling_factor {family}" in image_vae.assumptions[0]
        assert image_vae.config["block_out_channels"] == [32, 32, 64, 64]
        assert image_vae.config["layers_per_block"] == 1
        assert image_vae.source == str(path)


def test_a_bfl_file_with_quant_convs(tmp_path):
    vae = random_image_vae({**SDXL, **SMALL})
    save_file(to_bfl(vae), tmp_path / "sd.safetensors")
    image_vae = read_image_vae(tmp_path / "sd.safetensors")
    assert image_vae.config["use_quant_conv"]
    assert image_vae.config["scaling_factor"] == 0.18215
    assert image_vae.config["shift_factor"] is None
    assert "Stable Diffusion 1.x" in image_vae.assumptions[0]
    assert_read(image_vae, vae)


@pytest.mark.parametrize(
    ("config", "neighbour", "metadata", "name", "factor"),
    [
        (FLUX, "model.diffusion_model.double_blocks.0.weight", None, "all", 0.3611),
        (SD3, "model.diffusion_model.joint_blocks.0.weight", None, "all", 1.5305),
        (SDXL, "conditioner.embedders.0.weight", None, "all", 0.13025),
        (SDXL, "cond_stage_model.weight", None, "sdxl", 0.18215),  # what is in a file counts more than its name
        (SDXL, None, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, "vae", 0.13025),
        (SD3, None, {"modelspec.architecture": "stable-diffusion-v3-medium"}, "vae", 1.5305),
        (SDXL, None, None, "sdxl_vae", 0.13025),
        (SDXL, None, None, "vae-ft-mse-840000", 0.18215),
        (SD3, None, None, "sd3_vae", 1.5305),
        (FLUX, None, None, "unknown", 0.3611),
        (SDXL, None, None, "unknown", 0.18215),
    ],
)
def test_files_tell_what_they_belong_to(tmp_path, config, neighbour, metadata, name, factor):
    """The VAEs of Stable Diffusion 1 and XL have one shape, those of FLUX.1 and Stable Diffusion 3 another."""
    vae = random_image_vae({**config, **SMALL})
    state = {f"first_stage_model.{key}": tensor for key, tensor in to_bfl(vae).items()}
    if neighbour is not None:
        state[neighbour] = torch.zeros(1)
    save_file(state, tmp_path / f"{name}.safetensors", metadata=metadata)
    image_vae = read_image_vae(tmp_path / f"{name}.safetensors")
    assert_read(image_vae, vae)
    assert image_vae.config["scaling_factor"] == factor
    (assumption,) = image_vae.assumptions
    assert f"scaling_factor {factor}" in assumption
    assert ("pass scaling_factor and shift_factor, or --scaling-factor" in assumption) == (name == "unknown")


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bfl", [True, False], ids=["bfl", "diffusers"])
def test_what_training_leaves_is_not_read(tmp_path, bfl, wrapper):
    vae = random_image_vae({**SDXL, **SMALL})
    state = to_bfl(vae) if bfl else vae.state_dict()
    left = {
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.logvar": torch.ones(()),
        "model_ema.decay": torch.ones(()),
    }
    state = {f"{wrapper}{key}": tensor.clone() for key, tensor in (state | left).items()}
    save_file(state, tmp_path / "trained.safetensors")
    assert_read(read_image_vae(tmp_path / "trained.safetensors"), vae)
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "trained.ckpt")
    assert_read(read_image_vae(tmp_path / "trained.ckpt", use_safetensors=False), vae)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards(small, tmp_path, safe):
    small.save_pretrained(tmp_path, max_shard_size="200KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("*.safetensors" if safe else "*.bin"))) > 2
    options = {} if safe else {"use_safetensors": False}
    assert_read(read_image_vae(tmp_path, **options), small)
    if not safe:
        with pytest.raises(OSError, match="or, in Python, use_safetensors=False to read its pickled weights"):
            read_image_vae(tmp_path)
    shard = sorted(tmp_path.glob("*-00002-*"))[0]
    shard.unlink()
    with pytest.raises(OSError, match=f"lacks {shard.name}, which .*index.json names"):
        read_image_vae(tmp_path, **options)


def test_pickled_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was run",))

    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.ckpt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        read_image_vae(tmp_path / "harmful.ckpt", use_safetensors=False)
    assert not (tmp_path / "was run").exists()


def test_an_image_vae_without_a_scale_needs_one(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL, "scaling_factor": None})
    with pytest.raises(ValueError, match="scaling_factor is None, it must be a positive number"):
        AutoencoderKLVCVAE.from_image_vae(tmp_path)
    assert AutoencoderKLVCVAE.from_image_vae(tmp_path, scaling_factor=0.5).config.latents_std == [2.0] * 16


def test_diffusers_files_and_folders(small, tmp_path):
    folder = save(small, tmp_path / "repository" / "vae", {**SD3, **SMALL})
    weights = folder / "diffusion_pytorch_model.safetensors"
    for source, subfolder in ((folder, None), (folder.parent, None), (folder.parent, "vae"), (weights, None)):
        image_vae = read_image_vae(source, subfolder=subfolder)
        assert_read(image_vae, small)
        assert image_vae.assumptions == []
        assert image_vae.config["scaling_factor"] == 1.5305
        assert not any(key.startswith("_") for key in image_vae.config)
    alone = tmp_path / "elsewhere.safetensors"
    save_file(small.state_dict(), alone)
    image_vae = read_image_vae(alone)
    assert_read(image_vae, small)
    assert len(image_vae.assumptions) == 1


def test_variants(small, tmp_path):
    folder = tmp_path / "vae"
    small.save_pretrained(folder)
    random_image_vae({**FLUX, **SMALL}, seed=5).half().save_pretrained(folder, variant="fp16")
    full, half = read_image_vae(folder), read_image_vae(folder, variant="fp16")
    assert full.state["encoder.conv_in.weight"].dtype == torch.float32
    assert half.state["encoder.conv_in.weight"].dtype == torch.float16
    with pytest.raises(OSError, match=r"but no diffusion_pytorch_model.bf16.safetensors: pass variant"):
        read_image_vae(folder, variant="bf16")


def test_bfl_file_at_the_root_of_a_folder(small, tmp_path):
    save_file(to_bfl(small), tmp_path / "ae.safetensors")
    assert_read(read_image_vae(tmp_path), small)


def test_old_attention_names_and_shapes(small, tmp_path):
    """diffusers before 0.18 wrote query, key, value, proj_attn; some files keep 1x1 convolutions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in small.state_dict().items():
        for new, name in old.items():
            if f".attentions.0.{new}." in key:
                key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
                tensor = tensor[:, :, None, None].contiguous() if tensor.ndim == 2 else tensor
        state[key] = tensor
    save(small, tmp_path, {**FLUX, **SMALL})
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_read(read_image_vae(tmp_path), small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_are_read_as_they_are(small, tmp_path, dtype):
    state = {key: tensor.to(dtype) for key, tensor in to_bfl(small).items()}
    save_file(state, tmp_path / "ae.safetensors")
    vae = AutoencoderKLVCVAE.from_image_vae(tmp_path)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    rounded = AutoencoderKL.from_config({**FLUX, **SMALL}).eval()
    rounded.load_state_dict({key: tensor.to(dtype).float() for key, tensor in small.state_dict().items()})
    assert_keyframes_are_those_of(rounded, vae, frames=4)


def test_keys_an_older_configuration_does_not_name_have_the_defaults_of_autoencoder_kl(tmp_path):
    config = {k: v for k, v in SDXL.items() if k not in ("scaling_factor", "norm_num_groups", "act_fn")}
    image_vae = random_image_vae({**config, **SMALL})
    save(image_vae, tmp_path, {**config, **SMALL})
    shared = read_image_vae(tmp_path).video_config()
    assert shared["scaling_factor"] == 0.18215
    assert shared["shift_factor"] is None
    assert (shared["use_quant_conv"], shared["use_post_quant_conv"], shared["mid_block_add_attention"]) == (True, True, True)
    assert (shared["norm_num_groups"], shared["act_fn"]) == (32, "silu")
    assert_keyframes_are_those_of(image_vae, AutoencoderKLVCVAE.from_image_vae(tmp_path), frames=4)


def test_without_mid_block_attention(tmp_path):
    config = {**FLUX, **SMALL, "mid_block_add_attention": False}
    image_vae = random_image_vae(config)
    save_file(image_vae.state_dict(), tmp_path / "vae.safetensors")
    vae = AutoencoderKLVCVAE.from_image_vae(str(tmp_path / "vae.safetensors"))
    assert not vae.config.mid_block_add_attention
    assert_keyframes_are_those_of(image_vae, vae, frames=4)


def test_what_was_assumed_is_logged_and_can_be_replaced(small, tmp_path, caplog):
    save_file(to_bfl(small), tmp_path / "ae.safetensors")
    with caplog.at_level(logging.WARNING, logger="vc_vae_diffusers"):
        vae = AutoencoderKLVCVAE.from_image_vae(tmp_path, scaling_factor=1.5305, shift_factor=0.0609)
    assert "scaling_factor 0.3611" in caplog.text
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)
    assert vae.config.latents_std == [1 / 1.5305] * 16


def test_statistics_of_an_image_vae_are_not_dropped_in_silence(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16})
    assert "latents_mean and latents_std are left out" in read_image_vae(tmp_path).assumptions[0]


# Errors -----------------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_named(small, tmp_path):
    state = small.state_dict()
    del state["encoder.mid_block.resnets.1.conv2.weight"]
    state["encoder.surprise.weight"] = torch.zeros(1)
    state["decoder.conv_norm_out.weight"] = torch.zeros(7)
    save(small, tmp_path, {**FLUX, **SMALL})
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"missing keys: encoder.mid_block.resnets.1.conv2.weight") as error:
        read_image_vae(tmp_path)
    assert "unexpected keys: encoder.surprise.weight" in str(error.value)
    assert "wrong shapes: decoder.conv_norm_out.weight" in str(error.value)
    save_file(state, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"missing keys: encoder.mid_block.resnets.1.conv2.weight"):
        read_image_vae(tmp_path / "alone.safetensors")


@pytest.mark.parametrize("key", ["decoder.conv_in.weight", "encoder.down.1.block.0.conv1.weight", "decoder.conv_out.weight"])
def test_a_missing_key_that_tells_the_architecture_is_named_too(small, tmp_path, key):
    state = to_bfl(small)
    del state[key]
    save_file(state, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=f"missing keys: {bfl_keys(1, (32, 32, 64, 64))[key]}"):
        read_image_vae(tmp_path)


def test_files_that_are_no_image_vae(small, tmp_path):
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not an image VAE in diffusers' or BFL's layout: its keys start with \['layer"):
        read_image_vae(tmp_path / "other.safetensors")
    torch.save(to_bfl(small), tmp_path / "ae.ckpt")
    with pytest.raises(ValueError, match=r"only safetensors files are read.*weights_only=True"):
        read_image_vae(tmp_path / "ae.ckpt")
    save_file(to_bfl(small), tmp_path / "ae.safetensors")
    whole = (tmp_path / "ae.safetensors").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        (tmp_path / "broken.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken.safetensors cannot be read as safetensors.*fetch it again"):
            read_image_vae(tmp_path / "broken.safetensors")


def test_configurations_that_are_no_image_vae(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL, "_class_name": "AutoencoderKLHunyuanVideo"})
    with pytest.raises(ValueError, match=r"config.json is of AutoencoderKLHunyuanVideo, only an AutoencoderKL can be"):
        read_image_vae(tmp_path)
    odd = random_image_vae({**FLUX, **SMALL, "latent_channels": 6})
    save_file(odd.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"has 6 latent channels and comes without a configuration.*pass the folder"):
        read_image_vae(tmp_path / "odd.safetensors")


def test_sources_that_do_not_exist(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"empty holds no image VAE: looked for config.json.*ae.safetensors; pass subfolder"):
        read_image_vae(tmp_path / "empty")
    with pytest.raises(OSError, match=r"missing.safetensors is neither a file or folder that exists nor a hub id"):
        read_image_vae(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("source", ["nope.safetensors", "folder/nope.safetensors", "../nope", "./nope", "nope", "a/b/c"])
def test_what_can_be_no_hub_id_is_not_asked_for(monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(OSError, match="is neither a file or folder that exists nor a hub id"):
        AutoencoderKLVCVAE.from_image_vae(source)


@pytest.mark.parametrize(("status", "remedy"), [(403, "pass a token that may read it"), (500, "try again later")])
def test_an_answer_of_the_hub_is_told_from_none(monkeypatch, status, remedy):
    def download(repo_id, filename, **options):
        refused = HfHubHTTPError(f"{status}", response=response(status))
        raise LocalEntryNotFoundError("not in the cache") from refused

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match=rf"some/repo: the hub answered {status} for config.json: {remedy}"):
        read_image_vae("some/repo")


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("HEAD", "https://hub.invalid/config.json"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("403", response=response(403)), r"some/repo is gated: accept its licence.*token=…, --token"),
        (RepositoryNotFoundError("404", response=response(404)), r"some/repo is not a local path, and not a hub repository"),
        (LocalEntryNotFoundError("offline"), r"the hub cannot be reached, and config.json, vae/config.json, ae.safetensors"),
        (RemoteEntryNotFoundError("404", response=response(404)), r"some/repo holds no image VAE: looked for config.json"),
    ],
    ids=["gated", "unknown", "offline", "without a VAE"],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match=message):
        AutoencoderKLVCVAE.from_image_vae("some/repo", token="secret", revision="main", variant="fp16")
    assert asked[0] == ("some/repo", "config.json", {"token": "secret", "revision": "main"})
    if isinstance(error, LocalEntryNotFoundError):
        assert all(options["local_files_only"] for _, _, options in asked[1:])  # one wait for the network is enough


def test_from_a_hub_cache_without_network(small, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="the hub cannot be reached"):
        read_image_vae("some/repo", cache_dir=tmp_path)
    repository = tmp_path / "models--some--repo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save(small, repository / "snapshots" / ("0" * 40) / "vae", {**SD3, **SMALL})
    image_vae = read_image_vae("some/repo", cache_dir=tmp_path, local_files_only=True)
    assert_read(image_vae, small)
    assert image_vae.source == "some/repo"


def test_a_misspelt_setting_is_refused(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL})
    message = (
        r"config has temporal_operater \(did you mean temporal_operator\?\), torch_dtype, which AutoencoderKLVCVAE does"
    )
    with pytest.raises(ValueError, match=message):
        AutoencoderKLVCVAE.from_image_vae(tmp_path, temporal_operater="conv", torch_dtype=torch.float16)


# Inflation --------------------------------------------------------------------------------------------------------------


def test_the_report_names_every_parameter_once(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL})
    image_vae = read_image_vae(tmp_path)
    vae = AutoencoderKLVCVAE(**{**image_vae.video_config(), "latent_channels": 32})
    report = inflate(vae, image_vae)
    names = [*report.copied, *report.inflated, *report.created]
    assert sorted(names) == sorted(name for name, _ in vae.named_parameters())
    layers = {name for name, m in vae.named_modules() if isinstance(m, TemporalConv3d) and "sampler" not in name}
    assert set(report.inflated) == {f"{name}.weight" for name in layers}
    assert {name.split(".")[-3 if "upsampler" in name else -2] for name in report.created} == {
        "temporal_downsampler",
        "temporal_upsampler",
    }
    assert sorted(report.widened) == ["decoder.conv_in.weight", "encoder.conv_out.bias", "encoder.conv_out.weight"]
    for name in layers:
        layer = vae.get_submodule(name)
        anchor = layer.weight[:, :, layer.anchor]
        assert anchor.abs().sum() > 0
        assert layer.weight.count_nonzero() == anchor.count_nonzero()


def test_an_image_vae_that_does_not_fit_is_refused(small, tmp_path):
    save(small, tmp_path, {**FLUX, **SMALL})
    image_vae = read_image_vae(tmp_path)
    config = image_vae.video_config()
    with pytest.raises(ValueError, match=r"has no place for \['decoder.mid_block.attentions"):
        inflate(AutoencoderKLVCVAE(**{**config, "mid_block_add_attention": False}), image_vae)
    with pytest.raises(
        ValueError, match=r"encoder.down_blocks.2.resnets.0.norm2.weight has shape \(64,\)|conv1.weight has shape"
    ):
        inflate(AutoencoderKLVCVAE(**{**config, "block_out_channels": (32, 32, 32, 64)}), image_vae)
    with pytest.raises(ValueError, match=r"encoder.conv_out.weight has shape .* in the image VAE and"):
        inflate(AutoencoderKLVCVAE(**{**config, "latent_channels": 8}), image_vae)
