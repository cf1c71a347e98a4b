"""Any diffusers video VAE in the trainer: the lengths that it returns, frames in their place, a fine-tune that learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo, AutoencoderKLWan
from vae_runs import STAGE_1, log_of
from video_files import encode

from vc_vae_diffusers.training import any_vae
from vc_vae_diffusers.training.data import validation_clip
from vc_vae_diffusers.training.validation import psnr


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def hunyuan() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def cogvideox() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip


def ltx() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> Path:
    """Two videos of five small frames, smooth moving colours: few steps learn something about them."""
    folder = tmp_path_factory.mktemp("waves")
    y, x = np.mgrid[0:32, 0:32]
    for k in range(2):
        time = np.arange(5)[:, None, None]
        colours = [127 + 100 * np.sin(0.05 * x + 0.04 * y * (c - 1) + 0.2 * time + k + 2 * c) for c in range(3)]
        encode(folder / f"{k}.mp4", np.stack(colours, axis=-1).astype(np.uint8), rate=24)
    return folder


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_a_short_fine_tune_lowers_the_loss_of_another_vae(arguments, run, waves, tmp_path, make):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "vae")
    more = ["--data", str(waves), "--steps", "30", "--learning_rate", "3e-3", "--ema_decay", "0.5", "--flip", "false"]
    more += ["--buckets", "size=32 frames=5 fps=24 batch=2", "--checkpoint_every", "30", "--lr_scheduler", "constant"]
    run(arguments(tmp_path / "out", *STAGE_1, *more, "--model", str(tmp_path / "vae")))
    losses = [row["l1"] for row in log_of(tmp_path / "out") if "l1" in row]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    clip = validation_clip(str(waves / "1.mp4"), 5, 32)[None]
    decibels = []
    for folder in (tmp_path / "vae", tmp_path / "out" / "vae"):
        vae = type(make()).from_pretrained(folder)
        with torch.no_grad():
            decibels.append(psnr(any_vae.TrainableVAE(vae, [5])(clip, None)[0], clip).mean().item())
    assert decibels[1] > decibels[0] + 4
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "vae", tmp_path / "out" / "vae")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (wan, {1: 1, 8: 9, 9: 9, 16: 17}),
        (hunyuan, {1: 1, 8: 9, 18: 21}),
        (cogvideox, {1: 1, 8: 8, 9: 9, 16: 16}),
        (ltx, {1: 1, 8: 9, 16: 17}),
    ],
)
def test_lengths_fit_every_vae_and_frames_stay_in_place(make, lengths):
    torch.manual_seed(0)
    vae = make().eval()
    wrapped = any_vae.TrainableVAE(vae, list(lengths))
    assert {frames: wrapped.padded_frames[frames] for frames in lengths} == lengths
    # An image comes repeated over such a clip, whether a bucket holds clips of that length or not.
    assert all(wrapped.padded_frames[padded] == padded for padded in lengths.values())
    for frames, padded in lengths.items():
        clip = torch.rand(2, 3, frames, 64, 64) * 2 - 1
        with torch.no_grad():
            reconstruction, mean, logvar = wrapped(clip, None)
            whole = vae.decode(vae.encode(any_vae.pad_frames(clip, padded)).latent_dist.mode()).sample
            noisy = wrapped(clip, [3, 4])[0]
            swapped = wrapped(clip.flip(0), [4, 3])[0]
        assert reconstruction.shape == clip.shape
        assert torch.equal(reconstruction, whole[:, :, :frames])
        assert mean.shape == logvar.shape
        assert mean.dtype == torch.float32
        assert (noisy - swapped.flip(0)).abs().max() < 1e-4
        assert not torch.equal(noisy, reconstruction)


@pytest.mark.parametrize("config", [{}, {"frame_convention": "4k+1"}, {"first_frame": "separate"}])
def test_every_scheme_of_vc_vae_returns_the_frames_in_place(make_vae, make_video, config):
    vae = make_vae(**config)
    wrapped = any_vae.TrainableVAE(vae, [1, 6, 8, 9])
    for frames in (6, 8, 9):
        clip = make_video(frames, height=16, width=16)
        with torch.no_grad():
            reconstruction = wrapped(clip, None)[0]
            padded = any_vae.pad_frames(clip, wrapped.padded_frames[frames])
            assert (reconstruction - vae(padded).sample[:, :, :frames]).abs().max() < 1e-5


def test_sizes_that_do_not_fit_are_named():
    wrapped = any_vae.TrainableVAE(wan().eval(), [1])
    with pytest.raises(ValueError, match="its spatial compression divides"):
        wrapped(torch.zeros(1, 3, 1, 60, 60), None)
