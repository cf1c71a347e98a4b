#!/usr/bin/env python3
"""Time and size of exported programs beside the model itself, a group of a stream at a time.

    vcvae export bundled out/onnx
    vcvae export bundled out/torch --format torch
    python benchmarks/export_speed.py out/onnx out/torch --size 128x128 --threads 2 --json export.json

One group at a time of the same stream goes through the model, its kernels fused, and through every folder of programs, in
turns: A B C A B C. Timed is the program that a stream runs for all groups but its first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import OPERATIONS, add_common_options, console, environment, parse_size, plain, report, table, warn_if_busy

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

# A group or a latent frame and the cache before it, None at a stream's start, to what comes out and the cache after it.
Step = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


def onnx_step(folder: Path, files: dict[bool, str], threads: int) -> Step:
    """A direction of a folder of ONNX programs; `files` by whether a stream starts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    sessions = {
        start: onnxruntime.InferenceSession(folder / name, options, providers=providers) for start, name in files.items()
    }

    def step(x: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        session = sessions[cache is None]
        names = [put.name for put in session.get_inputs()]
        out, *following = session.run(None, dict(zip(names, [x.numpy(), *(cache or [])], strict=True)))
        return torch.from_numpy(out), following

    return step


def torch_step(folder: Path, files: dict[bool, str], threads: int) -> Step:
    """A direction of a folder of `torch.export` programs."""
    modules = {start: torch.export.load(folder / name).module() for start, name in files.items()}

    def step(x: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out, *following = modules[cache is None](x, cache or [])
        return out, following

    return step


def steps_of(folder: Path, threads: int) -> tuple[dict[str, Step], int]:
    """Both directions of a folder that `vcvae export` wrote, and the bytes of its programs."""
    description = json.loads((folder / "vcvae_export.json").read_text(encoding="utf-8"))
    make = onnx_step if description["format"] == "vcvae-onnx" else torch_step
    files = {name: facts["file"] for name, facts in description["programs"].items()}
    steps = {
        operation: make(
            folder, {start: files[f"{operation}_{'start' if start else 'next'}"] for start in (True, False)}, threads
        )
        for operation in OPERATIONS
    }
    return steps, sum((folder / file).stat().st_size for file in files.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    place = str(bundled_model_path()) if options.model == "bundled" else options.model
    vae = AutoencoderKLVCVAE.from_pretrained(place).to(options.device).eval()
    vae.fuse_tdc()
    eager = {"encode": vae.encode_chunk, "decode": vae.decode_chunk}
    runners = {"model": (eager, sum(tensor.nbytes for tensor in vae.state_dict().values()))}
    runners |= {str(folder): steps_of(folder, options.threads) for folder in options.programs}
    rows = []
    for operation in OPERATIONS:
        before, group = _inputs(vae, operation, options.size)
        caches = {name: steps[operation](before, None)[1] for name, (steps, _) in runners.items()}
        outs = {name: steps[operation](group, caches[name])[0] for name, (steps, _) in runners.items()}  # and warms up
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for i in range(options.rounds):
            console(f"{operation}: round {i + 1} of {options.rounds}")
            for name, (steps, _) in runners.items():
                start = time.perf_counter()
                steps[operation](group, caches[name])
                seconds[name].append(time.perf_counter() - start)
        for name, (_, size) in runners.items():
            off = float((outs[name] - outs["model"]).abs().max() / outs["model"].abs().max())
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["model"], strict=True))
            rows.append(
                {"operation": operation, "by": name, "bytes": size, "off": off, "ratio": ratio, "seconds": seconds[name]}
            )
    return {"options": plain(options), "environment": environment(options.device, options.threads), "rows": rows}


def _inputs(vae: AutoencoderKLVCVAE, operation: str, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A stream's first group and its second."""
    generator = torch.Generator().manual_seed(0)
    if operation == "decode":
        cells = [side // vae.spatial_compression_ratio for side in size]
        return tuple(torch.randn(2, 1, vae.config.latent_channels, 1, *cells, generator=generator).unbind())
    counts = (vae.groups.total(1), vae.groups.size)
    return tuple(torch.rand(1, vae.config.in_channels, count, *size, generator=generator) * 2 - 1 for count in counts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", type=Path, metavar="PROGRAMS", help="folders that `vcvae export` wrote")
    parser.add_argument("--model", default="bundled", help="folder or hub id of the model that they were made of")
    parser.add_argument("--size", type=parse_size, default=(128, 128), help="of frames, HEIGHTxWIDTH")
    parser.add_argument("--rounds", type=int, default=9)
    add_common_options(parser)
    options = parser.parse_args(argv)
    warn_if_busy()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        results = measure(options)
    shown = table("A group of a stream, beside the model", ["", "MiB", "ms", "times the model's", "off"])
    for row in results["rows"]:
        milliseconds = 1000 * statistics.median(row["seconds"])
        figures = (f"{row['bytes'] / 2**20:.1f}", f"{milliseconds:.1f}", f"{row['ratio']:.2f}", f"{row['off']:.1e}")
        shown.add_row(f"{row['operation']}, {row['by']}", *figures)
    report(results, options.json, [shown])


if __name__ == "__main__":
    main()
