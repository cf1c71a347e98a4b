"""Figures of examples/train_tiny_latte.sh: FVD and loss over the steps, and frames of the samples.

python examples/plot_tiny_latte.py --run runs/latte_tiny --output docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from vc_vae_diffusers.evaluation.results import read_result
from vc_vae_diffusers.video import VideoReader, to_uint8

REAL = "training clips"  # the row that is no checkpoint


def fvd_of(path: Path) -> dict[str, float]:
    """FVD by label: steps, and the training clips."""
    return {entry["label"]: entry["metrics"]["fvd"]["value"] for entry in read_result(path)["models"]}


def plot(run: Path, path: Path) -> None:
    """FVD against the held-out clips, with that of the training clips as a dashed line; the error of the noise beside it."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = fvd_of(run / "fvd.json")
    left.axhline(values.pop(REAL), color="grey", linestyle="--", linewidth=1, label=REAL)
    steps = sorted(values, key=int)
    left.plot([int(step) for step in steps], [values[step] for step in steps], "o-", label="samples")
    left.set(xlabel="training step", ylabel="FVD against held-out clips", ylim=(0, None))
    left.legend()
    rows = [json.loads(line) for line in (run / "run" / "log.jsonl").read_text().splitlines()]
    right.plot([row["step"] for row in rows], [row["mse"] for row in rows], color="tab:green", linewidth=1)
    right.set(xlabel="training step", ylabel="mean squared error of the noise", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def frames_of(path: Path, number: int) -> list[np.ndarray]:
    """Evenly spaced frames of a video, (H, W, 3) uint8."""
    with VideoReader(path) as reader:
        video = to_uint8(torch.cat(list(reader), dim=1)).permute(1, 2, 3, 0).numpy()
    return [video[round(index * (len(video) - 1) / max(number - 1, 1))] for index in range(number)]


def sheet(samples: Path, path: Path, growing: int = 3, final: int = 7) -> None:
    """Two sheets in one: the same samples at each checkpoint (one frame each), then frames of samples of the last one."""
    steps = sorted((folder for folder in samples.iterdir()), key=lambda folder: int(folder.name))
    columns = len(steps)
    tiles = [[frames_of(step / f"sample-{row:05d}.mkv", 1)[0] for step in steps] for row in range(growing)]
    others = sorted(steps[-1].glob("*.mkv"))[growing : growing + final]
    tiles += [frames_of(sample, columns) for sample in others]
    blocks = [np.concatenate(row, axis=1) for row in tiles]
    gap = np.full((8, blocks[0].shape[1], 3), 255, dtype=np.uint8)
    image = Image.fromarray(np.concatenate([*blocks[:growing], gap, *blocks[growing:]], axis=0))
    image.quantize(256).save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that train_tiny_latte.sh filled")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two PNGs")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot(arguments.run, arguments.output / "latte_tiny_fvd.png")
    sheet(arguments.run / "samples", arguments.output / "latte_tiny_samples.png")


if __name__ == "__main__":
    main()
