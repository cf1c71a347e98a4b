"""What the tests of the VAE trainer share: videos, and runs on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import tiny_vae
from vae_runs import BUCKETS, parse
from video_files import encode, numbered_frames

from vc_vae_diffusers.training import program, vcvae


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five short videos, moving each in its own way."""
    folder = tmp_path_factory.mktemp("data")
    frames = numbered_frames(30)
    for k in range(5):
        encode(folder / f"{k}.mp4", np.roll(frames, 11 * k, axis=2)[:, :, :: 1 if k % 2 else -1], rate=24)
    return folder


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory) -> Callable[..., list[str]]:
    """`arguments(output, *more)`: a command line that trains a tiny VC-VAE for six steps."""
    start = tmp_path_factory.mktemp("start")
    tiny_vae().save_pretrained(start)

    def make(output: Path, *more: str) -> list[str]:
        common = ["--data", str(data), "--holdout", "0.mp4", "--output", str(output), "--steps", "6"]
        common += ["--model", str(start), "--validation_size", "32", "--validation_frames", "4", "--cpu"]
        common += ["--learning_rate", "1e-3", "--checkpoint_every", "2", "--log_every", "1", "--tracker", "none"]
        common += ["--mixed_precision", "no"]  # bfloat16 is another thing on every processor
        return [*common, "--validation_videos", "0", "--num_threads", "1", "--buckets", *BUCKETS, *more]

    return make


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Callable[[list[str]], Path]:
    """`whole(stage)`: the folder of an unbroken run of that stage, trained once."""
    folders: dict[tuple[str, ...], Path] = {}

    def get(stage: list[str]) -> Path:
        if tuple(stage) not in folders:
            folders[tuple(stage)] = tmp_path_factory.mktemp("whole")
            AcceleratorState._reset_state(reset_partial_state=True)
            program.main("vcvae", arguments(folders[tuple(stage)], *stage))
            AcceleratorState._reset_state(reset_partial_state=True)
        return folders[tuple(stage)]

    return get


@pytest.fixture
def run():
    """`run(argv)` trains in this process; returns the signal that stopped it, or 0."""

    def call(argv: list[str]) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return program.main("vcvae", argv)

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trainer():
    """`trainer(argv)` builds what `run` would train with."""

    def make(argv: list[str]) -> vcvae.VAETrainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = parse(argv)
        torch.manual_seed(config.run.seed)
        accelerator = Accelerator(cpu=True, mixed_precision=config.run.mixed_precision)
        return vcvae.VAETrainer(config, accelerator, *vcvae.find_data(config.data))

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
