"""A good call of every command and training program, with the options it knows: what `hostile_words.py` mutates."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import typer
from commands import LATTE, TRAINING, VCVAE, run
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers.cli.app import app

# Groups of words; F is a folder of `prepare`. Outputs go into F/out.
MODEL = "--model F/model | --device cpu"
CALLS = {
    "reconstruct": f"F/video.mkv | F/out/a.mp4 | {MODEL}",
    "encode": f"F/video.mkv | F/out/a.safetensors | {MODEL}",
    "decode": f"F/in.safetensors | F/out/a.mp4 | {MODEL}",
    "info": "F/model",
    "plan": f"--height 32 | --width 32 | {MODEL}",
    "visualize": f"F/video.mkv | F/out/a.png | --num-frames 4 | {MODEL}",
    "evaluate": "--data F/videos | --out F/out/a.json | --metrics psnr | --size 32 | --num-frames 4 | --model tiny=F/model",
    "report": "F/result.json | --out F/out/page",
    "stats": f"--data F/videos | --size 16 | --num-frames 4 | {MODEL}",
    "demo": f"--out F/out/demo | --num-frames 4 | {MODEL}",
    "fetch-weights": "lpips | --to F/out/weights",
    "export": "F/model | F/out/programs | --format torch",
    "app": f"--no-browser | {MODEL}",
}
TRAINERS = {"vcvae": "--model F/model", "latte": "--vae F/model", "image-vae": "--clips F/clips.txt"}
TRAIN = "train NAME | --config F/NAME.yaml | --steps 1 | --data F/videos | --output F/out/run"
IMAGE_VAE = """
channels: [8, 8, 8, 8]
norm_num_groups: 4
latent_channels: 4
sizes: [16]
batch_size: 2
validation_size: 16
cpu: true
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """A good call in groups of words.

    Attributes:
        needed: so many of the first groups stay, without which a call would take minutes.
        options: by name, whether they take a value.
        places: of IN and OUT among the groups.
    """

    name: str
    words: list[list[str]]
    needed: int
    options: dict[str, bool]
    places: tuple[int, ...] = ()


def calls(folder: Path) -> list[Call]:
    """All of them, with the files of their options."""
    found = []
    group: Any = typer.main.get_command(app)
    for name, text in CALLS.items():
        words = [part.replace("F/", f"{folder}/").split() for part in text.split(" | ")]
        params = [param for param in group.commands[name].params if param.param_type_name == "option"]
        options = {opt: not param.is_flag for param in params for opt in (*param.opts, *param.secondary_opts)}
        options.pop("--compile", None)  # takes minutes
        places = tuple(at for at, part in enumerate(words) if not part[0].startswith("-"))
        found.append(Call(name, [[name], *words], 1, options, tuple(at + 1 for at in places)))
    for (name, vae), options in zip(TRAINERS.items(), (VCVAE, LATTE, IMAGE_VAE), strict=True):
        (folder / f"{name}.yaml").write_text(TRAINING + options)
        config = importlib.import_module(f"vc_vae_diffusers.training.{name.replace('-', '_')}_options").Config
        fields = [part for field in dataclasses.fields(config) for part in dataclasses.fields(field.default_factory)]
        text = f"{TRAIN} | {vae}".replace("NAME", name).replace("F/", f"{folder}/")
        words = [part.split() for part in text.split(" | ")]
        found.append(Call(f"train {name}", words, 3, {f"--{field.name}": True for field in fields if field.name != "steps"}))
    return found


def prepare(folder: Path) -> None:
    """A tiny model, videos, latents and a result."""
    tiny_vae().save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for name in ("a.mkv", "b.mkv"):
        encode(folder / "videos" / name, numbered_frames(8), "ffv1", "yuv444p")
    shutil.copy(folder / "videos" / "a.mkv", folder / "video.mkv")
    (folder / "clips.txt").write_text("[train]\na.mkv\n[holdout]\nb.mkv\n")
    run(["encode", str(folder / "video.mkv"), str(folder / "in.safetensors"), "--model", str(folder / "model")])
    short = ["--metrics", "psnr", "--size", "32", "--num-frames", "4", "--device", "cpu"]
    run(["evaluate", "--model", "original", "--data", str(folder / "videos"), "--out", str(folder / "result.json"), *short])
