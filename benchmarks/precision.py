#!/usr/bin/env python3
"""How much half precision costs, and what repeated encoding and decoding costs: PSNR in dB, over the frames of one clip.

Each dtype starts from the same clip. "Against float32" is the difference of its reconstruction to float32's, before both are
clamped; "cycle n" is its n-th reconstruction of the reconstruction before, clamped, against the clip. Accuracy does not
depend on what else the machine does.

    python benchmarks/precision.py --video clip.mp4 --json precision.json
    python benchmarks/precision.py                                          # the test pattern of `vcvae demo`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, add_common_options, console, environment, parse_size, plain, report, table

from vc_vae_diffusers.cli.models import load_model, model_name
from vc_vae_diffusers.metrics.frame import psnr
from vc_vae_diffusers.video import read_clip
from vc_vae_diffusers.video.samples import write_test_pattern


def clip_of(video: Path | None, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """The first frames of a video, or of the test pattern: `(1, 3, T, H, W)`, resized to cover `size` and cropped to it."""
    with tempfile.TemporaryDirectory() as folder:
        path = video or Path(folder) / "test_pattern.mp4"
        if video is None:
            write_test_pattern(path, frames)
        return read_clip(path, num_frames=frames, resize=max(size), crop=size)[None]


@torch.inference_mode()
def cycles(options: argparse.Namespace, dtype: str, clip: torch.Tensor) -> list[torch.Tensor]:
    """The reconstruction after every cycle in float32, not clamped; each next one is of the clamped one before."""
    vae = load_model(options.model, device=options.device, dtype=dtype)
    results, x = [], clip
    for _ in range(max(options.cycles)):
        x = vae(x.to(vae.device, vae.dtype)).sample.float().cpu()
        results.append(x)
        x = x.clamp(-1, 1)
    return results


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over frames."""
    return psnr(x.clamp(-1, 1), y, data_range=(-1, 1)).mean().item()


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """PSNR of a difference that nothing is clamped in, peak to peak 2, mean over frames."""
    return (10 * (4 / (x - y).square().mean(dim=(1, 3, 4))).log10()).mean().item()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    clip = clip_of(options.video, options.frames, options.size)
    rows: list[dict[str, Any]] = []
    exact: list[torch.Tensor] = []
    for dtype in options.dtype:
        console(f"{dtype}: {max(options.cycles)} cycles of {options.frames} frames {options.size[0]}x{options.size[1]}")
        results = cycles(options, dtype, clip)
        exact = exact or results
        row = {"dtype": dtype, "cycles": {n: decibels(results[n - 1], clip) for n in options.cycles}}
        rows.append(row | {"against_float32": None if dtype == "float32" else difference(results[0], exact[0])})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; by default the bundled model")
    parser.add_argument("--video", type=Path, help="a real clip; by default the test pattern of `vcvae demo`")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=parse_size, default=(128, 128), help="HEIGHTxWIDTH")
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="float32 is always among them"
    )
    parser.add_argument("--cycles", nargs="+", type=int, default=[1, 2, 5, 10], help="after which PSNR is taken")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    options.dtype = ["float32", *(name for name in options.dtype if name != "float32")]
    torch.set_num_threads(options.threads)
    results = {"environment": environment(options.device, options.threads), "options": plain(options)}
    results["rows"] = measure(options)
    source = "the test pattern" if options.video is None else options.video.name
    title = f"{model_name(options.model)}, {options.frames} frames of {source}, {options.size[0]}x{options.size[1]}, dB"
    made = table(title, ["dtype", "against float32", *(f"cycle {n}" for n in options.cycles)])
    for row in results["rows"]:
        against = "" if row["against_float32"] is None else f"{row['against_float32']:.1f}"
        made.add_row(row["dtype"], against, *(f"{value:.2f}" for value in row["cycles"].values()))
    report(results, options.json, [made])


if __name__ == "__main__":
    main()
