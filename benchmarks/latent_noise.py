#!/usr/bin/env python3
"""How a decoder takes latents that are not quite right: PSNR of clips decoded from latents with noise added, in dB.

A diffusion model's samples are near the latents it was trained on, never on them. Latents are normalised by channel as
diffusion models see them, noise of each standard deviation is added (0.1 is a tenth of what latents vary by), and the clip
is decoded. Models with latents of one shape get the same noise.

    python benchmarks/latent_noise.py --data CLIPS_DIR --include @examples/configs/tiny_clips.txt:holdout --lpips vgg
    python benchmarks/latent_noise.py --model bundled runs/other/vae --data CLIPS_DIR --json noise.json
    python benchmarks/latent_noise.py                       # the bundled model on the test pattern of `vcvae demo`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import add_common_options, console, environment, parse_size, plain, report, table
from precision import clip_of, decibels

from vc_vae_diffusers.cli.models import load_model
from vc_vae_diffusers.generation.pipeline_latte import denormalize_latents, normalize_latents
from vc_vae_diffusers.metrics.perceptual import LPIPSMetric
from vc_vae_diffusers.training.data import expand_patterns, find_files

Measure = Callable[[torch.Tensor, torch.Tensor], float]


def measures(lpips: str | None) -> dict[str, Measure]:
    """By name, a function of a decoded clip and its source, mean over frames."""
    found: dict[str, Measure] = {"psnr": decibels}
    if lpips:
        network = LPIPSMetric(lpips)
        found[f"lpips_{lpips}"] = lambda x, y: network(x.clamp(-1, 1), y, data_range=(-1, 1)).mean().item()
    return found


@torch.inference_mode()
def measure(model: str, clips: list[torch.Tensor], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a strength: every measure's mean over the clips."""
    vae = load_model(None if model == "bundled" else model, device=options.device, dtype="float32")
    taken = measures(options.lpips)
    values = {strength: {name: [] for name in taken} for strength in options.noise}
    for seed, clip in enumerate(clips):
        console(f"{model}: clip {seed + 1} of {len(clips)}")
        latents = normalize_latents(vae, vae.encode(clip.to(vae.device)).latent_dist.mode())
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        for strength, found in values.items():
            noisy = denormalize_latents(vae, latents + strength * noise)
            decoded = vae.decode(noisy, num_frames=clip.shape[2]).sample.cpu()
            for name, function in taken.items():
                found[name].append(function(decoded, clip))
    return [
        {"model": model, "noise": strength} | {name: fmean(all_clips) for name, all_clips in found.items()}
        for strength, found in values.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["bundled"], help="folders or hub ids; bundled is the package's own")
    parser.add_argument("--data", type=Path, help="folder of clips; by default the test pattern of `vcvae demo`")
    parser.add_argument("--include", nargs="+", default=[], help="patterns, or @FILE:SECTION, of clips in the folder")
    parser.add_argument("--noise", nargs="+", type=float, default=[0, 0.05, 0.1, 0.2, 0.4, 0.8], help="standard deviations")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=parse_size, default=(128, 128), help="HEIGHTxWIDTH")
    parser.add_argument("--lpips", choices=["alex", "vgg"], help="beside PSNR; needs `vcvae fetch-weights lpips`")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    files = [Path(file) for file in find_files(options.data, expand_patterns(options.include))] if options.data else [None]
    clips = [clip_of(file, options.frames, options.size) for file in files]
    results = {"environment": environment(options.device, options.threads), "options": plain(options)}
    results["rows"] = [row for model in options.model for row in measure(model, clips, options)]
    names = [name for name in results["rows"][0] if name not in ("model", "noise")]
    made = table(
        f"{len(clips)} clips of {options.frames} frames, {options.size[0]}x{options.size[1]}", ["model", "noise", *names]
    )
    for row in results["rows"]:
        made.add_row(row["model"], f"{row['noise']:g}", *(f"{row[name]:.{2 if name == 'psnr' else 4}f}" for name in names))
    report(results, options.json, [made])


if __name__ == "__main__":
    main()
