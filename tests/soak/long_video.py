"""One long video through `reconstruct`: memory flat and speed constant from a tenth of the way to the end.

python tests/soak/long_video.py --frames 100000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_vae

from vc_vae_diffusers.coding.reconstruction import reconstruct_file
from vc_vae_diffusers.video import VideoReader, VideoWriter
from vc_vae_diffusers.video.samples import moving_pattern

SIDE = 32
MOST_GROWTH = 20  # MiB


def write_video(path: Path, frames: int) -> None:
    """The same second of a pattern over and over."""
    second = torch.stack(list(moving_pattern(24, SIDE, SIDE)), dim=1)
    with VideoWriter(path, 24, preset="ultrafast") as writer:
        for begin in range(0, frames, 24):
            writer.write(second[:, : frames - begin])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000)
    frames = parser.parse_args().frames
    torch.set_num_threads(1)
    process, vae, rows = psutil.Process(), tiny_vae(), []
    vae.fuse_tdc()

    def progress(done: int, total: int | None) -> None:
        if done >= len(rows) * frames / 10:
            cpu = process.cpu_times()
            rows.append((done, process.memory_info().rss / 2**20, process.num_fds(), cpu.user + cpu.system))
            print(
                f"{done:,} frames: {rows[-1][1]:.0f} MiB, {rows[-1][2]} open files, {rows[-1][3]:.0f} CPU seconds",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.mp4", Path(folder) / "out.mp4"
        write_video(source, frames)
        with VideoReader(source, chunk_frames=8, batch_dim=True) as reader:
            result = reconstruct_file(vae, reader, out, progress=progress)
        with VideoReader(out) as reader:
            there = sum(chunk.shape[1] for chunk in reader)
    _, early, files, begin = rows[1]
    _, last, files_after, end = rows[-1]
    middle = rows[len(rows) // 2]
    halves = (rows[-1][0] - middle[0]) / (end - middle[3]) / ((middle[0] - rows[1][0]) / (middle[3] - begin))
    print(
        f"{there:,} frames written, {last - early:+.0f} MiB, second half {halves:.2f} times as fast as the first by CPU time"
    )
    wrong = (
        there != frames or result["frames"] != frames or last - early > MOST_GROWTH or files_after > files or halves < 0.8
    )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
