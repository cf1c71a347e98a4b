"""A video through exported programs: read, encoded, decoded and written group by group, by onnxruntime alone.

    vcvae export bundled out/onnx
    python examples/stream_onnx.py out/onnx IN OUT.mp4

The model is in the programs and in `vcvae_export.json`; this package only reads and writes the video. What is done here is
what a program in another language does: feed a group and the cache, keep the cache that comes back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from vc_vae_diffusers.video import VideoReader, VideoWriter


class Stream:
    """One direction of a stream: the program for its start, then the one for all that follows, and the cache between."""

    def __init__(self, folder: Path, direction: str, threads: int):
        self.description = json.loads((folder / "vcvae_export.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._sessions = {
            start: onnxruntime.InferenceSession(
                folder / self.description["programs"][f"{direction}_{'start' if start else 'next'}"]["file"],
                options,
                providers=["CPUExecutionProvider"],
            )
            for start in (True, False)
        }
        self._cache: list[np.ndarray] | None = None

    def __call__(self, group: np.ndarray) -> np.ndarray:
        session = self._sessions[self._cache is None]
        names = [put.name for put in session.get_inputs()]
        result, *self._cache = session.run(None, dict(zip(names, [group, *(self._cache or [])], strict=True)))
        return result


def groups(reader: VideoReader, description: dict) -> Iterator[tuple[np.ndarray, int]]:
    """Groups as the programs take them, and how many frames are in each.

    They are padded to whole cells by the edge, to whole groups by the last frame.
    """
    cell, size = description["config"]["spatial_compression_ratio"], description["config"]["temporal_compression_ratio"]
    bottom, right = -reader.height % cell, -reader.width % cell
    held = torch.empty(1, 3, 0, reader.height, reader.width)
    wanted, repeats = description["start"]["frames"], description["start"]["first_frame_repeated"]
    for chunk in reader:
        held = torch.cat([held, chunk], dim=2)
        if repeats:  # the first frame fills its group
            held, repeats = torch.cat([held[:, :, :1].expand(-1, -1, wanted - 1, -1, -1), held], dim=2), False
        while held.shape[2] >= wanted:
            yield _padded(held[:, :, :wanted], bottom, right), wanted
            held, wanted = held[:, :, wanted:], size
    if count := held.shape[2]:
        full = torch.cat([held, held[:, :, -1:].expand(-1, -1, wanted - count, -1, -1)], dim=2)
        yield _padded(full, bottom, right), count


def _padded(frames: torch.Tensor, bottom: int, right: int) -> np.ndarray:
    return np.pad(frames.numpy(), [(0, 0)] * 3 + [(0, bottom), (0, right)], mode="edge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="folder that `vcvae export` wrote")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0 lets it choose")
    parser.add_argument("--lossless", action="store_true", help="keep every value that the model gives, rounded to 8 bits")
    args = parser.parse_args()
    encode, decode = (Stream(args.programs, direction, args.threads) for direction in ("encode", "decode"))
    description = encode.description
    with (
        VideoReader(args.source, batch_dim=True) as reader,
        VideoWriter(
            args.out,
            reader.fps,
            codec="lossless" if args.lossless else "h264",
            sample_aspect_ratio=reader.info.sample_aspect_ratio,
        ) as writer,
    ):
        channels = description["config"]["latent_channels"]
        for number, (group, count) in enumerate(groups(reader, description)):
            latents = np.ascontiguousarray(encode(group)[:, :channels])  # the mean; the rest is the variance's logarithm
            frames = decode(latents)
            kept = min(count, description["start"]["frames_back"] if number == 0 else count)
            writer.write(torch.from_numpy(frames[:, :, :kept, : reader.height, : reader.width]).clamp(-1, 1))
    print(f"{args.out}: {writer.num_frames} frames")


if __name__ == "__main__":
    main()
