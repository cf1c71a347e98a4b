"""What the programs that break commands off share: commands in forked processes, and what they leave behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import av
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import coding
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.coding import latent_shards, latents, reconstruction
from vc_vae_diffusers.evaluation import runner
from vc_vae_diffusers.training import latte, vcvae

IMPORTED = (coding, latent_shards, latents, reconstruction, latte, runner, vcvae, av)  # once, before processes are forked


def start(words: list[str], log: str | Path = os.devnull, before: Callable[[], None] | None = None) -> int:
    """`vcvae WORDS` in a forked process whose output goes to `log`, after `before()` in it; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if before is not None:
            before()
        try:
            app(words)
        except SystemExit as done:
            code = int(done.code or 0)
    except KeyboardInterrupt:  # before the command had begun, or after its end
        code = 130
    finally:
        os._exit(code)


def finish(process: int) -> int:
    """Its exit code once it has ended, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(words: list[str]) -> float:
    """Run it to its end; returns its seconds."""
    begin = time.monotonic()
    code = finish(start(words))
    if code:
        raise RuntimeError(f"vcvae {' '.join(words)} ended with {code}")
    return time.monotonic() - begin


def contents(path: Path) -> dict[str, bytes]:
    """What stands under a final name, file or folder; hidden files and folders are temporary."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    names = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in names.items() if not any(part[0] == "." for part in Path(name).parts)}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders."""
    return sorted(p.name for pattern in (".*.part*", ".partial*") for p in folder.rglob(pattern))


@dataclass(frozen=True)
class Case:
    """A command that writes one file or folder.

    Attributes:
        words: up to OUT.
        out: OUT's name.
        more: the words after it.
        result: the part of OUT that must be the same in the end.
        resumes: it goes on where it was stopped, and so is stopped several times.
        compared: of a file's bytes, what must be equal.
    """

    words: list[str]
    out: str
    more: list[str]
    result: str = ""
    resumes: bool = False
    compared: Callable[[bytes], Any] = bytes


def metrics(data: bytes) -> Any:
    """What `vcvae evaluate` measured, without times and dates."""
    return [model["metrics"] for model in json.loads(data)["models"]]


def prepare(folder: Path) -> dict[str, Case]:
    """A tiny model and videos in a folder, and commands by name."""
    tiny_vae().save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        video = encode(folder / "videos" / name, numbered_frames(24), "ffv1", "yuv444p")
    stored = folder / "in.safetensors"
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    run(["encode", str(video), str(stored), *model])
    return {
        "encode": Case(["encode", str(video)], "out.safetensors", model),
        "decode": Case(["decode", str(stored)], "out.mp4", ["--lossless", *model]),
        "reconstruct": Case(["reconstruct", str(video)], "out.mp4", ["--lossless", *model]),
        "shards": Case(["encode", str(folder / "videos")], "out", ["--shards", "1", *model], resumes=True),
    }


TRAINING = """
tracker: none
mixed_precision: "no"
num_threads: 1
steps: 6
checkpoint_every: 1
log_every: 1
"""
VCVAE = """
holdout: [a.mkv]
buckets: [size=32 frames=4 fps=0 batch=1]
lpips_weight: 0
learning_rate: 1.0e-3
validation_size: 32
validation_frames: 4
cpu: true
"""
LATTE = """
size: S/2
transformer_config: {num_layers: 2, num_attention_heads: 2, attention_head_dim: 8}
resolution: 32
num_frames: 8
fps: 0
batch_size: 2
cache_clips: 6
sample_every: 0
"""


def prepare_long(folder: Path) -> dict[str, Case]:
    """Commands of many steps on what `prepare` made."""
    model, videos = str(folder / "model"), str(folder / "videos")
    trainers = {}
    for name, options, vae, result in (("vcvae", VCVAE, "--model", "vae"), ("latte", LATTE, "--vae", "pipeline")):
        config = folder / f"{name}.yaml"
        config.write_text(TRAINING + options)
        words = ["train", name, "--config", str(config), "--data", videos, vae, model, "--output"]
        trainers[f"train {name}"] = Case(words, "out", [], result, resumes=True)
    protocol = ["--protocol", "folder", "--size", "32", "--num-frames", "8", "--metrics", "psnr,ssim", "--device", "cpu"]
    words = ["evaluate", "--model", f"tiny={model}", "--data", videos, *protocol, "--out"]
    return trainers | {"evaluate": Case(words, "out.json", [], resumes=True, compared=metrics)}
