"""The first ten minutes of someone new, in small, with the commands as README and pages have them.

A clone, the demo's picture, an image VAE made a video VAE, a training, its result.

Every step is a process of its own in the clone. `slow` marks the whole: `pytest -m "not slow"` leaves it out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from image_vaes import FLUX, SMALL, random_image_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers.video import probe

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone of this repository with what is not committed yet, as a newcomer would have it."""
    folder = tmp_path_factory.mktemp("new") / "clone"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a repository")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def run(clone):
    """`run(command)` in the clone, as a shell would; returns what was printed, on both streams."""

    def call(*words: object, code: int = 0) -> subprocess.CompletedProcess:
        starts = {"vcvae": [sys.executable, "-m", "vc_vae_diffusers"], "python": [sys.executable]}
        command = [*starts[str(words[0])], *map(str, words[1:])]
        environment = {**os.environ, "PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames = numbered_frames(24)
    for number in range(3):
        encode(folder / f"{number}.mp4", np.roll(frames, 11 * number, axis=2), rate=24)
    return folder


def test_the_demo_gives_a_picture(run, clone):
    done = run("vcvae", "demo", "--out", "out", "--num-frames", 4, "--json")
    result = json.loads(done.stdout)
    pair, source = probe(clone / "out" / "side_by_side.mp4"), probe(clone / "out" / "reconstruction.mp4")
    assert (pair.num_frames, pair.width) == (4, 2 * source.width)
    assert result["psnr"] > 15
    assert probe(clone / "out" / "picture.png").width == pair.width
    refused = run("vcvae", "demo", "--out", "out", "--num-frames", 4, code=1)
    assert "--overwrite" in refused.stderr


def test_an_image_vae_becomes_a_video_vae_that_is_trained(run, clone, clips):
    random_image_vae({**FLUX, **SMALL, "down_block_types": ["DownEncoderBlock2D"] * 4}).save_pretrained(clone / "image_vae")
    assert isinstance(AutoencoderKL.from_pretrained(clone / "image_vae"), AutoencoderKL)
    run("python", "convert_flux_weights.py", "image_vae", "video_vae")
    told = run("vcvae", "info", "video_vae").stdout
    assert "4x8x8" in told

    buckets = ["--buckets", "size=32 frames=8 fps=24 batch=2"]
    options = ["--data", clips, "--holdout", "0.mp4", "--validation_size", 32, "--validation_frames", 4]
    options += ["--validation_videos", 0, "--steps", 3, "--log_every", 1, "--lpips_weight", 0, "--cpu", "--tracker", "none"]
    options += ["--num_threads", 1, *buckets]
    trained = run("python", "examples/train_vcvae.py", "--model", "video_vae", "--output", "runs/first", *options)
    printed = trained.stdout + trained.stderr
    assert "3/3" in printed or "step 3" in printed
    rows = [json.loads(line) for line in (clone / "runs/first/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]

    done = run("vcvae", "reconstruct", clips / "0.mp4", "seen/0.mp4", "--model", "runs/first/vae", "--json")
    assert json.loads(done.stdout)["frames"] == probe(clone / "seen" / "0.mp4").num_frames == 24
    run("vcvae", "stats", "--data", clips, "--model", "runs/first/vae", "--num-frames", 4, "--size", 32, "--write")
    measured = json.loads((clone / "runs/first/vae/config.json").read_text())
    assert measured["scaling_factor"] != json.loads((clone / "video_vae/config.json").read_text())["scaling_factor"]

    for wrong, message in (("--step", "--step"), ("--learning_rat", "--learning_rat")):
        mistaken = run("python", "examples/train_vcvae.py", "--model", "video_vae", "--output", "runs/x", wrong, 3, code=1)
        assert message in mistaken.stderr


def test_an_image_vae_of_ones_own_and_a_denoiser_on_its_video_vae(run, clone, clips):
    (clone / "clips.txt").write_text("[train]\n1.mp4\n2.mp4\n[holdout]\n0.mp4\n")
    small = ["--channels", 8, 8, 16, 16, "--norm_num_groups", 4, "--latent_channels", 4, "--batch_size", 2, "--sizes", 16]
    short = ["--steps", 2, "--cpu", "--num_threads", 1]
    image = ["--data", clips, "--clips", "clips.txt", "--output", "runs/image", "--validation_size", 32]
    told = run("python", "examples/train_image_vae.py", *image, *small, *short)
    assert "the model is in runs/image/image_vae" in told.stdout + told.stderr
    run("python", "convert_flux_weights.py", "runs/image/image_vae", "own_vae")

    network = json.dumps({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8})
    latents = ["--vae", "own_vae", "--data", clips, "--resolution", 32, "--num_frames", 8, "--fps", 24, "--batch_size", 2]
    latte = [
        "--size",
        "S/2",
        "--transformer_config",
        network,
        "--output",
        "runs/latte",
        "--sample_every",
        0,
        "--tracker",
        "none",
    ]
    told = run("python", "examples/train_latte.py", *latents, *latte, *short)
    assert "the model is in runs/latte/pipeline" in told.stdout + told.stderr
    run(
        "python",
        "examples/sample_latte.py",
        "--model",
        "runs/latte/pipeline",
        "--output",
        "samples",
        "--num",
        1,
        "--steps",
        2,
    )
    (sample,) = (clone / "samples").glob("*.mkv")
    assert probe(sample).num_frames in (8, None)


WRONG = {
    ("reconstruct", "nope.mp4", "x.mp4"): "nope.mp4",
    ("reconstruct", "CLIP", "x.mp4", "--model", "../nope"): "--model: ../nope is neither a folder here nor a hub id",
    ("reconstruct", "CLIP", "x.txt"): ".txt",
    ("report", "CLIP"): "0.mp4 is no text; give a result file",
    ("plan", "--height", 64, "--width", 64, "--memory", 8): "8GB",
    ("train", "vcvae", "--step", 3): "did you mean --steps?",
    ("train", "latte", "--vae", "../nope", "--data", "FOLDER", "--output", "runs/y"): "../nope",
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(map(str, words)))
def test_a_wrong_call_is_one_line_with_a_remedy(run, clips, words):
    named = [{"CLIP": clips / "0.mp4", "FOLDER": clips}.get(word, word) for word in words]
    told = run("vcvae", *named, code=1).stderr.strip().splitlines()
    assert WRONG[words] in told[-1]
    assert sum(line.startswith("Error: ") for line in told) == 1
