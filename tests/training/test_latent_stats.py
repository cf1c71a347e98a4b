"""Latent statistics against exact values, over processes, and in the model's configuration."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from video_files import encode, numbered_frames

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.training.data import DataError
from vc_vae_diffusers.training.latent_cache import merge_moments, moments_of
from vc_vae_diffusers.training.latent_stats import LatentStatistics, measure_latents, write_statistics
from vc_vae_diffusers.video import read_clip


@pytest.fixture
def files(tmp_path) -> list[str]:
    frames = numbered_frames(30)
    videos = [encode(tmp_path / f"{k}.mp4", np.roll(frames, 9 * k, axis=2), rate=25) for k in range(3)]
    return [str(video) for video in videos]


def test_a_model_in_bfloat16_is_measured_as_it_is(make_vae, files):
    measured = measure_latents(make_vae().to(torch.bfloat16), files, num_frames=8, size=32)
    exactly = measure_latents(make_vae(), files, num_frames=8, size=32)
    difference = torch.tensor(measured.latents_mean) - torch.tensor(exactly.latents_mean)
    assert 0 < difference.abs().max() < 0.05 * max(exactly.latents_std)


def test_moments_in_pieces_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(10, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    mean = mean + torch.tensor([1e4, 0.0, -3.0])[:, None, None, None]
    variance = torch.rand(mean.shape, generator=generator, dtype=torch.float64)
    exact_mean, exact_variance = mean.mean(dim=(0, 2, 3, 4)), mean.var(dim=(0, 2, 3, 4), unbiased=False)
    for extra in (None, variance):
        sizes = [1, 2, 3, 4]
        pieces = zip(mean.split(sizes), [None] * 4 if extra is None else extra.split(sizes), strict=True)
        merged = merge_moments([moments_of(*piece) for piece in pieces])
        expected = exact_variance + (0 if extra is None else variance.mean(dim=(0, 2, 3, 4)))
        for count, center, deviation in (moments_of(mean, extra), merged):
            assert count.tolist() == [1000] * 3
            assert (center - exact_mean).abs().max() < 1e-11
            assert (deviation / count - expected).abs().max() < 1e-11


def exact(vae: AutoencoderKLVCVAE, clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        posteriors = [vae.encode(clip[None]).latent_dist for clip in clips]
    means = torch.cat([p.mean.double().transpose(0, 1).flatten(1) for p in posteriors], dim=1)
    variances = torch.cat([p.var.double().transpose(0, 1).flatten(1) for p in posteriors], dim=1)
    return means, variances


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_statistics_equal_the_exact_ones(make_vae, files, posterior):
    vae = make_vae()
    statistics = measure_latents(vae, files, num_frames=8, size=32, clips_per_video=2, posterior=posterior)
    starts = (0, 22)
    clips = [read_clip(f, num_frames=8, start_frame=start, resize=32, crop=32) for f in files for start in starts]
    means, variances = exact(vae, clips)
    variance = means.var(dim=1, unbiased=False) + (variances.mean(dim=1) if posterior == "sample" else 0)
    everything = means.var(unbiased=False) + (variances.mean() if posterior == "sample" else 0)
    assert (torch.tensor(statistics.latents_mean, dtype=torch.float64) - means.mean(dim=1)).abs().max() < 1e-12
    assert (torch.tensor(statistics.latents_std, dtype=torch.float64) - variance.sqrt()).abs().max() < 1e-12
    assert abs(statistics.shift_factor - means.mean().item()) < 1e-12
    assert abs(statistics.scaling_factor - 1 / everything.sqrt().item()) < 1e-10
    assert (statistics.elements, statistics.clips) == (means.shape[1], 6)


def test_a_clip_is_filled_up_with_its_last_frame(files):
    """Six frames, where Wan's scheme is 1 + 4k."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[]).eval()
    clips = [read_clip(path, num_frames=6, resize=32, crop=32) for path in files]
    means, _ = exact(vae, [torch.cat([clip, *[clip[:, -1:]] * 3], dim=1) for clip in clips])
    measured = measure_latents(vae, files, num_frames=6, size=32)
    torch.testing.assert_close(torch.tensor(measured.latents_mean).double(), means.mean(dim=1), rtol=0, atol=1e-5)


def test_statistics_go_to_the_configuration_and_come_back(make_vae, files, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    weights = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    statistics = measure_latents(vae, files, num_frames=4, size=16)
    names = write_statistics(tmp_path / "vae", statistics)
    assert names == ["latents_mean", "latents_std", "scaling_factor", "shift_factor"]
    config = AutoencoderKLVCVAE.from_pretrained(tmp_path / "vae").config
    assert config.latents_mean == statistics.latents_mean
    assert config.latents_std == statistics.latents_std
    assert (config.scaling_factor, config.shift_factor) == (statistics.scaling_factor, statistics.shift_factor)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_other_models_get_the_entries_that_they_have(tmp_path):
    statistics = LatentStatistics([0.5], [2.0], 0.4, 0.1, 10, 1, 0)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLHunyuanVideo", "scaling_factor": 0.47}')
    assert write_statistics(tmp_path, statistics) == ["scaling_factor"]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "scaling_factor": 0.4,
    }
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="none of"):
        write_statistics(tmp_path, statistics)


def test_images_count_and_broken_files_are_skipped_with_their_reason(make_vae, files, tmp_path, caplog):
    Image.fromarray(numbered_frames(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    sources = [*files, str(tmp_path / "a.png"), str(tmp_path / "broken.mp4")]
    with caplog.at_level(logging.WARNING):
        statistics = measure_latents(make_vae(), sources, num_frames=8, size=32)
    assert (statistics.clips, statistics.unreadable) == (4, 1)
    assert statistics.elements == 3 * 2 * 16 + 16
    assert any("broken.mp4" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="no clip could be read"):
        measure_latents(make_vae(), files, num_frames=31, size=32)
    with pytest.raises(DataError, match="reads failed"):
        measure_latents(make_vae(), [str(tmp_path / "broken.mp4")] * 20, num_frames=4, size=32)


def test_constant_channels_are_refused(make_vae, files):
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_out.weight[1] = 0
    with pytest.raises(ValueError, match=r"channels \[1\] are constant"):
        measure_latents(vae, files, num_frames=4, size=32)


SCRIPT = """
import dataclasses, json, sys
from accelerate import PartialState
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.training.latent_stats import measure_latents
vae = AutoencoderKLVCVAE.from_pretrained(sys.argv[1])
statistics = measure_latents(vae, sys.argv[2:], num_frames=8, size=32)
state = PartialState()
assert state.num_processes == 2
if state.is_main_process:
    print(json.dumps(dataclasses.asdict(statistics)))
state.destroy_process_group()
"""


def test_two_processes_measure_what_one_measures(make_vae, files, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    one = measure_latents(vae, files, num_frames=8, size=32)
    (tmp_path / "measure.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "measure.py"), str(tmp_path / "vae"), *files]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert (two["elements"], two["clips"]) == (one.elements, 3)
    for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor"):
        difference = np.abs(np.array(two[name]) - np.array(getattr(one, name)))
        assert difference.max() < 1e-12
