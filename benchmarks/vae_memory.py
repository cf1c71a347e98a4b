#!/usr/bin/env python3
"""Peak memory of encoding and decoding against the number of frames and against resolution, each in a fresh process.

Modes of VC-VAE: `whole`, one call with the clip; `streamed`, `encode_stream` and `decode_stream` over chunks that are made
as they are asked for; `tiled`, one call with `enable_tiling`. Peers run whole, and tiled as `enable_tiling()` tiles them.
Beside each measurement of a VC-VAE stands the estimate of `vc_vae_diffusers.autoencoder.memory_plan`.

    python benchmarks/vae_memory.py --frames 16 64 256 1024 --size 64x64 128x128 256x256 --json memory.json
    python benchmarks/vae_memory.py --device cuda --dtype bfloat16 --size 256x256 480x832 720x1280 --models vcvae-4x8x8 wan
    python benchmarks/vae_memory.py --calibrate   # the two constants of the estimate on CPUs, over a grid of small sizes

All frame counts are measured at the first size, and all sizes at the first frame count.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from common import (
    DTYPES,
    MODELS,
    OPERATIONS,
    Worker,
    WorkerError,
    add_common_options,
    clip_for,
    console,
    environment,
    load,
    memory_bytes,
    parse_size,
    plain,
    report,
    reset_peak,
    run,
    run_fresh,
    synchronize,
    table,
)

from vc_vae_diffusers.autoencoder.memory_plan import FIRST_USE_BYTES, HEAP_FACTOR, MemoryEstimator

MODES = ("whole", "streamed", "tiled")
# Frames that come at once in a stream.
_ARRIVING = 16


def peak_memory(
    name: str,
    operation: str,
    mode: str,
    frames: int,
    size: tuple[int, int],
    tile: int,
    device: str,
    dtype: str,
    groups_per_chunk: int,
) -> dict[str, int]:
    """Bytes before the model, with it (and its input, if whole), and at the peak; to be called in a fresh process."""
    imported = memory_bytes(device)
    vae = load(name, device, DTYPES[dtype])
    if MODELS[name].ours:
        vae.groups_per_chunk = groups_per_chunk
    if mode == "tiled":
        if MODELS[name].ours:
            vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
        else:
            vae.enable_tiling()
    with torch.inference_mode():
        x = None if mode == "streamed" else _input(vae, name, operation, frames, size, device, dtype)
        reset_peak(device)
        loaded = memory_bytes(device)
        if x is None:
            _drain_stream(vae, name, operation, frames, size, device, dtype)
        else:
            result = run(vae, operation, x)
            del result
    synchronize(device)
    return {"imported": imported, "loaded": loaded, "peak": memory_bytes(device, peak=True)}


def _input(vae: Any, name: str, operation: str, frames: int, size: tuple[int, int], device: str, dtype: str) -> torch.Tensor:
    if operation == "encode":
        return clip_for(name, frames, *size, device, DTYPES[dtype])
    # The shape of the latents, from a frame small enough to leave no peak.
    small = clip_for(name, frames, 64, 64, device, DTYPES[dtype])[:, :, :1]
    channels, down = run(vae, "encode", small).shape[1], 64 // run(vae, "encode", small).shape[-1]
    model = MODELS[name]
    length = (model.frames(frames) - model.alone) // model.group + model.alone
    return torch.randn(1, channels, length, size[0] // down, size[1] // down, device=device, dtype=DTYPES[dtype])


def _drain_stream(vae: Any, name: str, operation: str, frames: int, size: tuple[int, int], device: str, dtype: str) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        for start in range(0, frames, _ARRIVING):
            yield _input(vae, name, operation, min(_ARRIVING, frames - start), size, device, dtype)

    stream = vae.encode_stream(chunks()) if operation == "encode" else vae.decode_stream(chunks())
    for _ in stream:
        pass


class Estimates:
    """Estimates of VC-VAEs that are never loaded."""

    def __init__(self, device: str):
        self.device = device
        self._estimators: dict[tuple[str, str], MemoryEstimator] = {}

    def peak(
        self,
        imported: int,
        name: str,
        operation: str,
        mode: str,
        frames: int,
        size: tuple[int, int],
        tile: int,
        dtype: str,
        groups_per_chunk: int,
        heap_factor: float = HEAP_FACTOR,
    ) -> int:
        """The estimated peak of what `peak_memory` measures, in a process of `imported` bytes."""
        if (name, dtype) not in self._estimators:
            with torch.device("meta"):
                vae = MODELS[name].build().eval().requires_grad_(False)
            vae.fuse_tdc()
            self._estimators[name, dtype] = MemoryEstimator(vae, self.device, DTYPES[dtype])
        estimator = self._estimators[name, dtype]
        estimator.runtime, estimator.heap_factor = imported, heap_factor
        estimate = estimator.estimate(
            operation,
            *size,
            None if mode == "streamed" else MODELS[name].frames(frames),
            groups_per_chunk=groups_per_chunk,
            tile=(tile, tile) if mode == "tiled" else None,
        )
        return estimate.total


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every model, mode and operation, over frames at the first size and over sizes at the first frame count."""
    cases = [(frames, options.size[0]) for frames in options.frames]
    cases += [(options.frames[0], size) for size in options.size[1:]]
    estimates, rows = Estimates(options.device), []
    for name, operation, mode in itertools.product(options.models, options.operation, options.mode):
        if mode == "streamed" and not MODELS[name].ours:
            continue
        for frames, size in cases:
            console(f"{name} {operation} {mode} {frames} frames {size[0]}x{size[1]}")
            row = {"model": name, "operation": operation, "mode": mode, "frames": frames, "size": list(size)}
            rows.append(row)
            arguments = (name, operation, mode, frames, size, options.tile)
            settings = (options.device, options.dtype, options.groups_per_chunk)
            try:
                row |= run_fresh(peak_memory, *arguments, *settings, threads=options.threads)
            except WorkerError as error:  # out of memory is a result as well
                row["error"] = str(error).strip().splitlines()[-1]
                continue
            if MODELS[name].ours:
                row["estimate"] = estimates.peak(row["imported"], *arguments, options.dtype, options.groups_per_chunk)
                row["estimate_error"] = row["estimate"] / row["peak"] - 1
    return rows


# Small enough for minutes, and different in what dominates: model, size, length, chunk, dtype.
# model, mode, frames, size, groups a chunk, dtype
_GRID = [
    ("vcvae-tiny", "whole", 16, (256, 256), 1, "float32"),
    ("vcvae-small", "whole", 16, (128, 128), 1, "float32"),
    ("vcvae-small", "whole", 8, (256, 256), 1, "float32"),
    ("vcvae-small", "whole", 16, (192, 320), 2, "float32"),
    ("vcvae-small", "whole", 8, (384, 384), 1, "bfloat16"),
    ("vcvae-small", "streamed", 32, (192, 192), 1, "float32"),
    ("vcvae-small", "tiled", 8, (320, 320), 1, "float32"),
    ("vcvae-medium", "whole", 8, (128, 128), 1, "float32"),
    ("vcvae-medium", "whole", 8, (160, 160), 1, "bfloat16"),
]
_FACTORS = (1.25, 1.4, 1.5, 1.75, 2.0)


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a grid, and the estimates' errors for several factors: the one with the smallest largest error is right."""
    rows, estimates = [], Estimates(options.device)
    for (name, mode, frames, size, groups, dtype), operation in itertools.product(_GRID, OPERATIONS):
        arguments = (name, operation, mode, frames, size, options.tile)
        measured = run_fresh(peak_memory, *arguments, options.device, dtype, groups, threads=options.threads)
        errors = {
            factor: estimates.peak(measured["imported"], *arguments, dtype, groups, factor) / measured["peak"] - 1
            for factor in _FACTORS
        }
        case = f"{name} {operation} {mode} {frames} frames {size[0]}x{size[1]}, {groups} groups a chunk, {dtype}"
        rows.append({"case": case, **measured, "errors": errors})
        console(f"{case}: {measured['peak'] / 1e9:.3f} GB; {', '.join(f'{k}: {v:+.1%}' for k, v in errors.items())}")
    return {
        "first_use": first_use(options),
        "rows": rows,
        "errors": {factor: [row["errors"][factor] for row in rows] for factor in _FACTORS},
    }


def first_use(options: argparse.Namespace) -> int:
    """What a tiny model leaves in a process that used it once, its weights excluded: `FIRST_USE_BYTES`."""
    arguments = ("vcvae-tiny", "decode", "whole", 4, (32, 32), options.tile, options.device, "float32", 1)
    measured = run_fresh(peak_memory, *arguments, threads=options.threads)
    return measured["peak"] - measured["imported"]


def calibration_tables(result: dict[str, Any]) -> list:
    summary = table("Error of the estimate over the grid", ["heap factor", "lowest", "highest"])
    summary.caption = f"first use: {result['first_use'] / 2**20:.0f} MiB (FIRST_USE_BYTES: {FIRST_USE_BYTES / 2**20:.0f})"
    for factor, errors in result["errors"].items():
        summary.add_row(str(factor), f"{min(errors):+.1%}", f"{max(errors):+.1%}")
    cases = table("Cases", ["case", "GB", *map(str, result["errors"])])
    for i, row in enumerate(result["rows"]):
        cells = [f"{errors[i]:+.1%}" for errors in result["errors"].values()]
        cases.add_row(row["case"], f"{row['peak'] / 1e9:.2f}", *cells)
    return [summary, cases]


def tables(rows: list[dict[str, Any]]) -> list:
    made = table(
        "Peak memory", ["model", "", "mode", "frames", "size", "peak GB", "above the libraries", "estimate GB", "off"]
    )
    for row in rows:
        cells = [row["model"], row["operation"], row["mode"], str(row["frames"]), "x".join(map(str, row["size"]))]
        if "error" in row:
            made.add_row(*cells, row["error"])
            continue
        cells += [f"{row['peak'] / 1e9:.3f}", f"{(row['peak'] - row['imported']) / 1e9:.3f}"]
        if "estimate" in row:
            cells += [f"{row['estimate'] / 1e9:.3f}", f"{row['estimate_error']:+.1%}"]
        made.add_row(*cells)
    return [made]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vcvae-4x8x8", "wan"], metavar="NAME")
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--size", nargs="+", type=parse_size, default=[(64, 64), (128, 128), (256, 256)])
    parser.add_argument("--tile", type=int, default=128, help="edge of VC-VAE's tiles in pixels")
    parser.add_argument("--groups-per-chunk", type=int, default=1, help="VC-VAE's groups_per_chunk")
    parser.add_argument("--calibrate", action="store_true", help="calibrate the estimate on this machine instead")
    parser.add_argument(
        "--start-method",
        choices=("spawn", "forkserver"),
        default="spawn",
        help="forkserver is faster and counts of the libraries only what is used; compare peaks above the libraries then",
    )
    add_common_options(parser)
    options = parser.parse_args(arguments)
    Worker.start_method = options.start_method
    results = {"environment": environment(options.device, options.threads), "options": plain(options)}
    if options.calibrate:
        results["calibration"] = calibrate(options)
        made = calibration_tables(results["calibration"])
    else:
        results["rows"] = measure(options)
        made = tables(results["rows"])
    report(results, options.json, made)


if __name__ == "__main__":
    main()
