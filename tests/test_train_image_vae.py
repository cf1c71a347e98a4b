"""The training example of the small image VAE: it learns, and a broken run goes on to the same weights."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from video_files import encode, numbered_frames

SCRIPT = Path(__file__).parents[1] / "examples" / "train_image_vae.py"
WEIGHTS = Path("image_vae") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def script():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_image_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """`train(output)` trains a tiny image VAE for six steps and returns its folder."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(8))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")
    small = ["--channels", "8", "8", "16", "16", "--norm_num_groups", "4", "--latent_channels", "4", "--batch_size", "2"]
    small += [
        "--sizes",
        "16",
        "32",
        "--steps",
        "6",
        "--validate_every",
        "2",
        "--validation_size",
        "32",
        "--frame_stride",
        "2",
    ]
    small += ["--mixed_precision", "no", "--warmup_steps", "1", "--ema_decay", "0.5", "--num_threads", "1"]

    def call(name: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(
            ["--data", str(tmp_path), "--clips", str(tmp_path / "clips.txt"), "--output", str(tmp_path / name), *small]
        )
        return tmp_path / name

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_broken_run_goes_on_to_the_same_weights(train, script, tmp_path, monkeypatch, renamed):
    whole = load_file(train("whole") / WEIGHTS)
    batch_of_step, asked = script.batch_of_step, []

    def break_off(frames, args, step):
        asked.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return batch_of_step(frames, args, step)

    monkeypatch.setattr(script, "batch_of_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        train("broken")
    if renamed:  # as a kill between the two renames of a checkpoint leaves it
        os.replace(tmp_path / "broken" / "checkpoint", tmp_path / "broken" / "checkpoint.old")
    monkeypatch.setattr(script, "batch_of_step", lambda *args: asked.append(args[2]) or batch_of_step(*args))
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
    assert {path.name for path in output.iterdir()} == {"checkpoint", "image_vae"}


def test_a_step_has_its_own_batch(script):
    args = script.parse_args(["--data", ".", "--clips", "x", "--output", "y", "--sizes", "16", "32", "--batch_size", "4"])
    frames = [torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    first, second, again = (script.batch_of_step(frames, args, step) for step in (0, 1, 0))
    assert (first.shape, second.shape) == ((4, 3, 16, 16), (1, 3, 32, 32))  # the same number of pixels
    assert torch.equal(first, again)
    assert -1 <= first.min() < first.max() <= 1
    assert not torch.equal(first, script.batch_of_step(frames, args, 2))
