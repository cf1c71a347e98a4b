"""Make the clips of examples/proof_report.sh: windows of held-out clips, and clips that a public page may show.

    python examples/proof_clips.py --data CLIPS_FOLDER --clips examples/configs/tiny_clips.txt --output OUT

`OUT/windows` holds windows of the held-out clips, evenly over each, as lossless files: FVD wants more clips than there are
videos. `OUT/shown` holds camera moves over two photographs without copyright that come with scikit-image (an astronaut, by
NASA; a coffee cup, CC0, courtesy of Pikolo Espresso Bar).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from vc_vae_diffusers.training import data
from vc_vae_diffusers.video import VideoReader, VideoWriter, from_uint8

MOVES = {  # of the camera, from the first frame to the last: centre (x, y), half width, degrees; -1 to 1 is the photograph
    "astronaut": ((-0.35, -0.35, 0.45, 0.0), (-0.05, -0.45, 0.30, 0.0)),
    "coffee": ((-0.10, 0.15, 0.55, 0.0), (0.10, 0.05, 0.45, 25.0)),
}
SIZE = 256  # of the shown clips, pixels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the clips")
    parser.add_argument("--clips", default="examples/configs/tiny_clips.txt", help="list with a section [holdout]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2, help="of every held-out clip")
    parser.add_argument("--frames", type=int, default=17, help="of a clip: those that are scored, and one before")
    return parser.parse_args()


def cut_windows(path: Path, folder: Path, windows: int, frames: int) -> list[Path]:
    """Write windows of `path`, evenly from its start to its end; returns their paths.

    Raises:
        ValueError: if the clip has fewer frames than a window.
    """
    with VideoReader(path, dtype=torch.uint8) as reader:
        clip, fps = torch.cat(list(reader), dim=1), reader.fps
    last = clip.shape[1] - frames
    if last < 0:
        raise ValueError(f"{path} has {clip.shape[1]} frames, fewer than a window of {frames}; leave it out")
    starts = [round(last * index / max(1, windows - 1)) for index in range(windows)]
    written = []
    for start in starts:
        target = folder / f"{path.stem}_{start:04d}.mkv"
        write_lossless(target, clip[:, start : start + frames], fps)
        written.append(target)
    return written


def camera_move(photograph: torch.Tensor, move: tuple[tuple[float, ...], tuple[float, ...]], frames: int) -> torch.Tensor:
    """A camera moving over a photograph (3, H, W) in [-1, 1], with sub-pixel steps: (3, T, SIZE, SIZE)."""
    height, width = photograph.shape[1:]
    pictures = []
    for step in torch.linspace(0, 1, frames).tolist():
        x, y, half, degrees = (a + (b - a) * step for a, b in zip(*move, strict=True))
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        aspect = width / height  # half is of the width; pixels stay square
        turn = torch.tensor([[half * cosine, -half * sine, x], [half * aspect * sine, half * aspect * cosine, y]])
        grid = F.affine_grid(turn[None], [1, 3, SIZE, SIZE], align_corners=False)
        picture = F.grid_sample(photograph[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        pictures.append(picture[0].clamp(-1, 1))
    return torch.stack(pictures, dim=1)


def write_lossless(path: Path, clip: torch.Tensor, fps: float) -> None:
    with VideoWriter(path, fps, codec="lossless") as writer:
        writer.write(clip)


def main() -> None:
    args = parse_args()
    from skimage import data as photographs  # a test dependency, only needed here

    windows, shown = args.output / "windows", args.output / "shown"
    for folder in (windows, shown):
        folder.mkdir(parents=True, exist_ok=True)
    first = []
    for path in data.find_files(str(args.data), data.expand_patterns([f"@{args.clips}:holdout"], Path())):
        first.append(cut_windows(Path(path), windows, args.windows, args.frames)[0].name)
    (args.output / "first_windows.txt").write_text("".join(f"{name}\n" for name in first))
    for name, move in MOVES.items():
        photograph = from_uint8(torch.from_numpy(getattr(photographs, name)()).permute(2, 0, 1))
        write_lossless(shown / f"{name}.mkv", camera_move(photograph, move, args.frames), 24)
    print(f"{len(list(windows.iterdir()))} windows and {len(MOVES)} shown clips in {args.output}")


if __name__ == "__main__":
    main()
