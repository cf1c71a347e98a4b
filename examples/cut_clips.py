"""Cut videos into parts for training and for measuring, or into random short clips, both without loss.

    python examples/cut_clips.py --data CLIPS --include a.mp4 b.mp4 --span 0 0.667 --output parts/train
    python examples/cut_clips.py --data parts/train --clips 96 --output real/train --resolution 64 --num_frames 16 --fps 15

The first form writes the same span of every video; disjoint spans make a training and a held-out set of few videos. The
second writes clips as training sees them (random starts and crops, by the seed): real clips for FVD.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vc_vae_diffusers.training import clip_plan
from vc_vae_diffusers.training import data as vdata
from vc_vae_diffusers.video import VideoReader, VideoWriter


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, list file or CSV file of videos")
    parser.add_argument("--include", nargs="*", default=[], help="names, patterns, or @LIST, or @LIST:SECTION")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument(
        "--span", type=float, nargs=2, metavar=("FROM", "TO"), help="part of each video, shares of its length"
    )
    parser.add_argument("--short_side", type=int, default=128, help="of the parts, pixels; smaller videos keep their size")
    parser.add_argument("--clips", type=int, help="number of random clips")
    parser.add_argument("--resolution", type=int, default=64, help="side of the clips, pixels")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--fps", type=float, default=15.0, help="of the clips; 0 keeps the video's own rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if (arguments.span is None) == (arguments.clips is None):
        raise ValueError("--span writes parts and --clips random clips: give one of them.")
    if arguments.span is not None and not 0 <= arguments.span[0] < arguments.span[1] <= 1:
        raise ValueError(f"--span is {arguments.span}; it must be two rising numbers in [0, 1].")
    return arguments


def cut_parts(files: list[str], span: list[float], short_side: int, output: Path) -> None:
    """Write the span of each video, at its own rate."""
    for file, name in zip(files, vdata.distinct_names(files), strict=True):
        with VideoReader(file) as whole:
            frames, side = whole.count_frames(), min(whole.height, whole.width)
        start, stop = (round(share * frames) for share in span)
        resize = short_side if side > short_side else None
        with VideoReader(file, start=start, stop=stop, resize=resize) as reader:
            path = output / f"{name}.mkv"
            with VideoWriter(path, fps=reader.fps, codec="lossless") as writer:
                for chunk in reader:
                    writer.write(chunk)


def cut_clips(files: list[str], arguments: argparse.Namespace) -> None:
    """Write random clips, each named by its number."""
    side = arguments.resolution
    bucket = clip_plan.Bucket(side, side, arguments.num_frames, arguments.fps, 1.0, 1, 1)
    dataset = vdata.ClipDataset(files, [bucket], arguments.seed, flip=False)
    for index in range(arguments.clips):
        item = dataset[clip_plan.ClipRequest(0, 0, index)]
        with VideoWriter(arguments.output / f"clip-{index:05d}.mkv", arguments.fps or 24, codec="lossless") as writer:
            writer.write(item["video"])


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    files = vdata.find_files(arguments.data, vdata.expand_patterns(arguments.include))
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.span is not None:
        cut_parts(files, arguments.span, arguments.short_side, arguments.output)
    else:
        cut_clips(files, arguments)


if __name__ == "__main__":
    main()
