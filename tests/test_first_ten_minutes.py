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
