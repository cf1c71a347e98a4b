"""The trainer of the small image VAE: it learns, and a broken run goes on to the same weights."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from video_files import encode, numbered_frames

from vc_vae_diffusers.training import image_vae, program

WEIGHTS = Path("image_vae") / "diffusion_pytorch_model.safetensors"
SMALL = ["--channels", "8", "8", "16", "16", "--norm_num_groups", "4", "--latent_channels", "4", "--batch_size", "2"]
SMALL += ["--sizes", "16", "32", "--steps", "6", "--validate_every", "2", "--checkpoint_every", "2", "--log_every", "1"]
SMALL += ["--validation_size", "32", "--frame_stride", "2", "--cpu", "--mixed_precision", "no", "--warmup_steps", "1"]
SMALL += ["--ema_decay", "0.5", "--num_threads", "1"]


@pytest.fixture
def train(tmp_path):
    """`train(output)` trains a tiny image VAE for six steps and returns its folder."""
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(40))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")

    def call(name: str, *more: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        data = ["--data", str(tmp_path), "--clips", str(tmp_path / "clips.txt"), "--output", str(tmp_path / name)]
        program.main("image_vae", [*data, *SMALL, *more])
        return tmp_path / name

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_broken_run_goes_on_to_the_same_weights(train, monkeypatch):
    whole = load_file(train("whole") / WEIGHTS)
    batch_of_step, asked = image_vae.batch_of_step, []

    def break_off(frames, config, step, *ranks):
        asked.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return batch_of_step(frames, config, step, *ranks)

    monkeypatch.setattr(image_vae, "batch_of_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        train("broken")
    monkeypatch.setattr(image_vae, "batch_of_step", lambda *args: asked.append(args[2]) or batch_of_step(*args))
    resumed = load_file(train("broken") / WEIGHTS)
    assert asked == [0, 1, 2, 3, 4, 5, 4, 5]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_result_is_an_image_vae_that_others_can_read(train):
    output = train("run")
    vae = AutoencoderKL.from_pretrained(output / "image_vae")
    assert (vae.config.latent_channels, vae.config.use_quant_conv) == (4, False)
    before = os.umask(0)
    os.umask(before)
    assert (output / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~before
    assert {path.name for path in output.iterdir()} == {"checkpoints", "image_vae", "log.jsonl", "config.yaml"}


def test_it_learns(train):
    import json

    rows = [json.loads(line) for line in (train("run", "--steps", "40") / "log.jsonl").read_text().splitlines()]
    quality = [row["validation_psnr"] for row in rows if "validation_psnr" in row]
    assert len(quality) == 20
    assert quality[-1] > quality[0] + 1


def test_the_loss_is_l1_of_a_sample_and_the_kl_divergence():
    argv = ["--data", ".", "--clips", "x", "--output", "y", *SMALL, "--kl_weight", "0.3"]
    config = image_vae.Config.parse(argv)
    torch.manual_seed(0)
    model = image_vae.ImageVAE(config.model)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    trainer = SimpleNamespace(config=config)
    torch.manual_seed(1)
    terms = image_vae.ImageVAETrainer.terms(trainer, model, images)
    mean, logvar = model.vae.encode(images).latent_dist.parameters.chunk(2, dim=1)
    torch.manual_seed(1)
    sample = model.vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape)).sample
    l1, kl = (sample - images).abs().mean(), (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
    torch.testing.assert_close(terms["loss"], l1 + 0.3 * kl)
    torch.testing.assert_close((terms["l1"], terms["kl"]), (l1, kl))


def test_a_step_has_its_own_batch_and_so_has_a_process():
    argv = ["--data", ".", "--clips", "x", "--output", "y", "--sizes", "16", "32", "--batch_size", "4"]
    config = image_vae.Config.parse(argv)
    frames = [torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    first, second, again = (image_vae.batch_of_step(frames, config, step) for step in (0, 1, 0))
    assert (first.shape, second.shape) == ((4, 3, 16, 16), (1, 3, 32, 32))  # the same number of pixels
    assert torch.equal(first, again)
    assert -1 <= first.min() < first.max() <= 1
    assert not torch.equal(first, image_vae.batch_of_step(frames, config, 2))
    ranks = [image_vae.batch_of_step(frames, config, 0, rank, 2) for rank in (0, 1)]
    assert ranks[0].shape == ranks[1].shape
    assert not torch.equal(*ranks)


def test_held_out_frames_are_every_twelfth_of_four(tmp_path):
    encode(tmp_path / "v.mp4", numbered_frames(60), options={"crf": "0"})
    wanted = image_vae.read_frames(tmp_path / "v.mp4", 1)
    found = image_vae.read_frames(tmp_path / "v.mp4", 12, limit=4)
    assert len(found) == 4
    assert all(torch.equal(frame, wanted[12 * index]) for index, frame in enumerate(found))
    assert image_vae.read_frames(tmp_path / "v.mp4", 12, limit=4, size=32)[0].shape == (3, 32, 32)
