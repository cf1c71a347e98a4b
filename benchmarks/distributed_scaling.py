#!/usr/bin/env python3
"""Time of one video on several processes against one, by tiles and by segments (`vc_vae_diffusers.autoencoder.distributed`).

The groups of processes wait side by side, and one of them at a time works, round after round. Each process has the same
number of threads (`--threads`), so that n processes are to be n times as fast. The results of all groups are compared.

    python benchmarks/distributed_scaling.py --processes 1 2 --threads 1 --size 96x160 --frames 32 --json scaling.json
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from common import (
    DTYPES,
    MODELS,
    OPERATIONS,
    Worker,
    add_common_options,
    clip_for,
    console,
    environment,
    load,
    parse_size,
    plain,
    report,
    run,
    synchronize,
    table,
    warn_if_busy,
)

from vc_vae_diffusers.autoencoder.distributed import decode_segments, distribute_tiles, encode_segments

SPLITS = ("tiles", "segments")


class Member:
    """One process of a group, which is put together by a rendezvous at a port of this machine."""

    def __init__(self, name: str, device: str, dtype: str):
        self.name, self.device, self.dtype = name, device, DTYPES[dtype]

    def join(self, rank: int, processes: int, port: int) -> int:
        """Wait for the others, and load the model."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        state = PartialState(cpu=torch.device(self.device).type == "cpu")
        self.device = str(state.device)
        self.vae = load(self.name, self.device, self.dtype)
        return state.num_processes

    def prepare(self, frames: int, size: tuple[int, int], tile: int, gop_size: int) -> int:
        """Make the inputs; the number of tiles of a frame."""
        self.gop_size = gop_size
        clip = clip_for(self.name, frames, *size, self.device, self.dtype)
        with torch.inference_mode():
            latents = encode_segments(self.vae, clip, gop_size).mode()
        self.inputs = {"encode": clip, "decode": latents}
        self.vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
        return len(list(self.vae.tile_grid.tiles(*latents.shape[3:], 1)))

    def time(self, operation: str, split: str) -> float:
        """Seconds until this process has the whole result."""
        x = self.inputs[operation]
        self.result = None
        synchronize(self.device)
        start = time.perf_counter()
        if split == "tiles":
            with distribute_tiles(self.vae), torch.no_grad():
                self.result = run(self.vae, operation, x)
        else:
            self.vae.use_tiling = False
            work = encode_segments if operation == "encode" else decode_segments
            result = work(self.vae, x, self.gop_size)
            self.result = result.mode() if operation == "encode" else result
            self.vae.use_tiling = True
        synchronize(self.device)
        return time.perf_counter() - start

    def last_result(self) -> np.ndarray:
        """What the last timed call computed."""
        return self.result.float().cpu().numpy()


class Group:
    """Processes that work together."""

    def __init__(self, processes: int, options: argparse.Namespace):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (options.model, options.device, options.dtype)
        self.members = [Worker(Member, *arguments, threads=options.threads) for _ in range(processes)]
        for rank, member in enumerate(self.members):
            member.ask("join", rank, processes, port)
        for member in self.members:
            member.answer()

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Run a method in all at once."""
        for member in self.members:
            member.ask(method, *arguments)
        return [member.answer() for member in self.members]

    def close(self) -> None:
        for member in self.members:
            member.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    groups: dict[int, Group] = {}
    seconds: dict[tuple[int, str, str], list[float]] = {}
    results: dict[tuple[int, str, str], np.ndarray] = {}
    try:
        for processes in options.processes:
            console(f"starting {processes} processes")
            groups[processes] = Group(processes, options)
            arguments = (options.frames, options.size, options.tile, options.gop_size)
            tiles = groups[processes].all("prepare", *arguments)[0]
        for i in range(1 + options.rounds):
            console("warming up" if i == 0 else f"round {i} of {options.rounds}")
            for operation in OPERATIONS:
                for split in SPLITS:
                    for processes, group in groups.items():
                        slowest = max(group.all("time", operation, split))
                        if i == 0:
                            results[processes, operation, split] = group.members[-1].call("last_result")
                        else:
                            seconds.setdefault((processes, operation, split), []).append(slowest)
    finally:
        for group in groups.values():
            group.close()
    fewest = min(options.processes)
    rows = []
    for (processes, operation, split), times in seconds.items():
        pairs = zip(seconds[fewest, operation, split], times, strict=True)
        speedup = statistics.median(base / own for base, own in pairs)
        row = {"split": split, "operation": operation, "processes": processes, "seconds": times, "speedup": speedup}
        off = float(np.abs(results[processes, operation, split] - results[fewest, operation, split]).max())
        rows.append(row | {"efficiency": speedup * fewest / processes, "difference": off})
    return {"tiles": tiles, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = [name for name, model in MODELS.items() if model.ours]
    parser.add_argument("--model", choices=ours, default="vcvae-4x8x8")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--size", type=parse_size, default=(96, 160), help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--tile", type=int, default=96, help="edge of a tile in pixels")
    parser.add_argument("--gop-size", type=int, default=2, help="latent frames of a segment")
    parser.add_argument("--rounds", type=int, default=3)
    add_common_options(parser)
    parser.set_defaults(threads=1)
    options = parser.parse_args(arguments)
    warn_if_busy()
    results = {"environment": environment(options.device, options.threads), "options": plain(options)} | measure(options)
    title = f"{options.size[0]}x{options.size[1]}, {options.frames} frames, {results['tiles']} tiles, {options.dtype}"
    made = table(title, ["split", "", "processes", "s", "speedup", "efficiency", "largest difference"])
    for row in sorted(results["rows"], key=lambda row: (row["split"], row["operation"], row["processes"])):
        cells = [f"{statistics.median(row['seconds']):.2f}", f"{row['speedup']:.2f}", f"{row['efficiency']:.0%}"]
        cells.append(f"{row['difference']:.1g}")
        made.add_row(row["split"], row["operation"], str(row["processes"]), *cells)
    report(results, options.json, [made])


if __name__ == "__main__":
    main()
