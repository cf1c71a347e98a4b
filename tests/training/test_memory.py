"""What a training step will need of memory: said by every program before the first step, and said if it does not fit."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import tiny_vae
from vae_runs import STAGE_1, STAGE_2
from video_files import encode, numbered_frames

from vc_vae_diffusers.training import image_vae, latte, memory

TINY_LATTE = '{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}'


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def built(arguments, trainer, tmp_path):
    """`built(program, *options)`: a trainer of the program on two small clips, micro-batches of four."""
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(20))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")
    common = ["--data", tmp_path, "--output", tmp_path / "run", "--cpu", "--tracker", "none", "--mixed_precision", "no"]
    common += ["--batch_size", 4, "--num_threads", 1]

    def make(program: str, *more: str):
        if program == "vcvae":
            return trainer(arguments(tmp_path, *STAGE_1, "--buckets", "size=32 frames=8 fps=24 batch=4", *more))
        if program == "latte":
            tiny_vae().save_pretrained(tmp_path / "vae")
            own = ["--vae", tmp_path / "vae", "--size", "S/2", "--transformer_config", TINY_LATTE, "--resolution", 32]
            own += ["--num_frames", 8, "--fps", 0]
            return latte.LatteTrainer(latte.Config.parse([*map(str, [*common, *own]), *more]), Accelerator(cpu=True))
        own = ["--clips", tmp_path / "clips.txt", "--channels", 8, 8, 16, 16, "--norm_num_groups", 4, "--sizes", 32]
        own += ["--validation_size", 32]
        return image_vae.ImageVAETrainer(image_vae.Config.parse([*map(str, [*common, *own]), *more]), Accelerator(cpu=True))

    return make


@pytest.mark.parametrize(
    ("program", "name", "fewer", "otherwise"),
    [
        (
            "vcvae",
            "bucket 32x32x8@24",
            "Give the bucket micro=2: gradients are accumulated",
            "--gradient_checkpointing true",
        ),
        ("latte", "clips 32x32x8@0", "Use --batch_size 2 --gradient_accumulation_steps 2", "--latent_cache"),
        ("image_vae", "crops 32x32", "Use --batch_size 2", "smaller --sizes"),
    ],
)
def test_a_batch_that_does_not_fit_is_said_before_the_first_step(
    built, monkeypatch, caplog, program, name, fewer, otherwise
):
    monkeypatch.setattr(memory, "held_bytes", lambda device: 10**8)  # what a process holds changes from call to call
    run = built(program)
    (load,), needs = run.loads(), memory.measure(run.trial(), run.accelerator.device)
    assert needs.need(load.pixels) > needs.need(0) + 10**5
    with caplog.at_level(logging.INFO, logger="vc_vae_diffusers"):
        run.tell_memory()
    assert [message[:30] for message in caplog.messages] == [f"memory    {name}: 4 at once in about "[:30]]
    caplog.clear()
    monkeypatch.setattr(memory, "available_memory", lambda device: needs.need(3 * load.pixels))
    run.tell_memory()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"{name}: 4 at once in about 0.1 GB, but 0.1 GB are there: the run is likely to be killed. ")
    assert fewer in warning  # 3 fit, but do not divide 4
    caplog.clear()
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    run.tell_memory()
    assert otherwise in caplog.text


@pytest.mark.parametrize(
    ("program", "option", "value", "named"),
    [
        ("vcvae", "--buckets", "size=32x36 frames=8 fps=24 batch=4", "--buckets: 32x36x8@24: 36"),
        ("vcvae", "--validation_size", "36", "--validation_size: 36"),
        ("latte", "--resolution", "36", "--resolution: 36"),
    ],
)
def test_sizes_that_the_model_cannot_have_are_told_by_option(built, program, option, value, named):
    with pytest.raises(ValueError, match=f"{named} is no multiple of 8, the spatial compression of AutoencoderKLVCVAE"):
        built(program, option, value)


def test_crops_of_every_size_are_told(built):
    loads = built("image_vae", "--sizes", "32", "64").loads()
    assert [(load.name, load.count, load.pixels) for load in loads] == [("crops 32x32", 4, 1024), ("crops 64x64", 1, 4096)]
    assert loads[1].fewer(2) == "Use --batch_size 8"  # of the first size


def test_encoding_counts_where_there_is_no_cache(built, tmp_path):
    each = built("latte", "--vae", str(tmp_path / "vae"))
    without = memory.measure(each.trial(), each.accelerator.device).per_pixel
    each.cache = object()  # latents are there
    assert memory.measure(each.trial(), each.accelerator.device).per_pixel < 0.8 * without


def test_the_estimate_leaves_no_trace_and_grows_with_the_pixels(arguments, trainer, tmp_path):
    argv = arguments(tmp_path, *STAGE_2)
    run = trainer(argv)
    state = torch.get_rng_state()
    needs = memory.measure(run.trial(), run.accelerator.device)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for learner in (run.main, run.discriminator) for p in learner.model.parameters())
    known = list(run.model.state_dict().values())

    def measured(clips: int, side: int) -> int:
        video = torch.zeros(clips, 3, 8, side, side, requires_grad=True)
        loss = lambda: run.trial_loss([run.model, run.discriminator.model], video)  # noqa: E731
        return memory.activation_bytes(loss, video, known)

    one = measured(1, 32)
    assert measured(2, 32) == pytest.approx(2 * one, rel=0.1)
    assert measured(1, 64) == pytest.approx(4 * one, rel=0.15)
    pixels = 8 * 32 * 32
    assert needs.need(2 * pixels) - needs.need(0) == pytest.approx(memory._OVERHEAD * 2 * one, rel=0.3)


@pytest.mark.parametrize("program", ["vcvae", "latte"])
def test_checkpointing_lowers_the_estimate(built, program):
    needs = []
    for more in ([], ["--gradient_checkpointing", "true"]):
        run = built(program, *more)
        run.cache = object()  # of Latte, only the denoiser
        needs.append(memory.measure(run.trial(), run.accelerator.device).per_pixel)
    assert needs[1] < 0.8 * needs[0]
