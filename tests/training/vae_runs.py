"""Runs of the VAE trainer on tiny models, for the tests beside this: arguments, what a run leaves, and how to compare it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from vc_vae_diffusers.training import checkpoints
from vc_vae_diffusers.training.vcvae_options import Config

STAGE_1 = ["--lpips_weight", "0", "--lr_scheduler", "cosine"]
STAGE_2 = [*STAGE_1, "--gan_weight", "0.05", "--discriminator_channels", "8", "--discriminator_layers", "2"]
STAGE_2 += ["--lecam_weight", "0.01", "--gan_start", "1", "--gan_warmup_steps", "3"]
BUCKETS = ["size=32 frames=8 fps=24 batch=4 micro=2", "size=24 frames=3 fps=8 batch=4", "size=32 frames=1 fps=0 batch=2"]
FLOAT = ["--mixed_precision", "no", "--max_grad_norm", "1e9", "--gan_start", "0", "--gan_warmup_steps", "0"]


def parse(argv: list[str]) -> Config:
    """The options of a command line."""
    return Config.parse(argv)


def log_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_state(first: Path, second: Path) -> list[str]:
    """Names of the files of two runs' last checkpoints and results that differ."""
    a, b = (checkpoints.list_checkpoints(output / "checkpoints")[-1] for output in (first, second))
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    assert len([name for name in names if name.suffix == ".safetensors"]) >= 2
    unequal = [str(name) for name in names if name.suffix == ".safetensors" and not _equal(a / name, b / name)]
    for name in names:
        if name.name.startswith("optimizer"):
            one, two = (torch.load(folder / name, weights_only=True)["state"] for folder in (a, b))
            pairs = [(one[key][part], two[key][part]) for key in one for part in one[key]]
            unequal += [] if pairs and all(torch.equal(x, y) for x, y in pairs) else [str(name)]
    weights = checkpoints.WEIGHTS_NAME
    return unequal + ([] if _equal(first / "vae" / weights, second / "vae" / weights) else ["vae"])


def _equal(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
