#!/usr/bin/env python3
"""Throughput of `vcvae encode --shards` per process, and on several processes against one.

    python benchmarks/shards_scaling.py VIDEOS --processes 1 2 --threads 1 --num-frames 32 --resize 128 --json shards.json

The command runs with each number of processes in turn, round after round, into fresh folders, and the shards are compared.
Then it runs again and finds nothing to do: that time, of starting Python and loading the model, is taken off. Each process
has the same number of threads, so that n processes are to be n times as fast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from common import add_common_options, console, environment, plain, report, table, warn_if_busy


def encode(options: argparse.Namespace, out: Path, processes: int) -> float:
    """Seconds of the command, from its start to its end."""
    command = ["-m", "vc_vae_diffusers", "encode", str(options.videos), str(out), "--shards", str(options.per_shard)]
    command += ["--num-frames", str(options.num_frames), "--resize", str(options.resize), "--device", options.device]
    command += ["--dtype", options.dtype, *(["--model", options.model] if options.model else [])]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return seconds


def frames_of(out: Path) -> int:
    """How many frames the shards hold."""
    count = 0
    for path in out.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    count += json.load(archive.extractfile(member))["frames"]
    return count


def measure(options: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {processes: [] for processes in options.processes}
    digests = set()
    for i in range(options.rounds):
        for processes in options.processes:
            console(f"round {i + 1} of {options.rounds}: {processes} processes")
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "latents"
                whole, nothing = (encode(options, out, processes) for _ in range(2))
                seconds[processes].append(whole - nothing)
                shards = sorted(out.glob("*.tar"))
                digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest())
                frames = frames_of(out)
    if len(digests) > 1:
        raise SystemExit("The shards of these runs are not equal: they depend on the number of processes.")
    made = {"frames": frames, "shards": len(shards), "seconds": seconds}
    return {"options": plain(options), "environment": environment(options.device, options.threads), **made}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="folder or list, as of `vcvae encode --shards`")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", help="by default the bundled one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--resize", type=int, default=128)
    parser.add_argument("--per-shard", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    add_common_options(parser)
    options = parser.parse_args(argv)
    warn_if_busy()
    results = measure(options)
    shown = table(f"{results['frames']} frames in {results['shards']} shards", ["processes", "s", "frames/s", "times one"])
    medians = {processes: statistics.median(seconds) for processes, seconds in results["seconds"].items()}
    for processes, median in medians.items():
        faster = next(iter(medians.values())) / median
        shown.add_row(str(processes), f"{median:.1f}", f"{results['frames'] / median:.1f}", f"{faster:.2f}")
    report(results, options.json, [shown])


if __name__ == "__main__":
    main()
