#!/usr/bin/env python3
"""Time and peak memory of a training step, gradient checkpointing off and on, VC-VAE beside diffusers' video VAEs.

A step is what `examples/train_vcvae.py` does in Stage I without LPIPS: encode, sample, decode, L1 + 1e-8 KL, backward,
AdamW; float32 weights, optionally bfloat16 autocast. Every measurement is a fresh process with one step to warm up (on CUDA
this process, whose allocator counts what is measured); rounds go over all models and settings before the next one starts,
A B C A B C.

    python benchmarks/train_step.py --size 64x64 --frames 16 --json train_step.json
    python benchmarks/train_step.py --device cuda --precision bfloat16 --size 256x256 --batch 1 --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from common import (
    MODELS,
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
    run_fresh,
    synchronize,
    table,
    warn_if_busy,
)

PARTS = ("forward", "backward", "optimizer")


def train_steps(
    name: str, checkpointing: bool, frames: int, size: tuple[int, int], batch: int, device: str, precision: str, steps: int
) -> dict[str, Any]:
    """Seconds of each part of each step after the first, and memory; to be called in a fresh process."""
    imported = memory_bytes(device)
    vae = load(name, device, torch.float32, fuse=False)
    vae.train().requires_grad_(True)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-5)
    clip = clip_for(name, frames, *size, device, torch.float32).repeat(batch, 1, 1, 1, 1)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
    reset_peak(device)
    loaded = memory_bytes(device)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(1 + steps):
        marks = [_now(device)]
        with autocast:
            posterior = vae.encode(clip).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            loss = (reconstruction.float() - clip).abs().mean()
            loss = loss + 1e-8 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        marks.append(_now(device))
        loss.backward()
        marks.append(_now(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(_now(device))
        if not torch.isfinite(loss):
            raise ValueError(f"{name}: the loss is {loss.item()} at step {step}")
        if step > 0:
            for part, start, end in zip(PARTS, marks, marks[1:], strict=False):
                seconds[part].append(end - start)
    return {
        "frames": clip.shape[2],
        "seconds": seconds,
        "memory": {"imported": imported, "loaded": loaded, "peak": memory_bytes(device, peak=True)},
    }


def _now(device: str) -> float:
    synchronize(device)
    return time.perf_counter()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, checkpointing in itertools.product(options.models, (False, True)):
        setting = {"setting": MODELS[name].setting.replace(", fuse_tdc()", ""), "runs": []}
        rows.append({"model": name, "checkpointing": checkpointing, **setting})
    for i, row in itertools.product(range(options.rounds), rows):
        console(
            f"round {i + 1} of {options.rounds}: {row['model']}, checkpointing {'on' if row['checkpointing'] else 'off'}"
        )
        arguments = (row["model"], row["checkpointing"], options.frames, options.size, options.batch, options.device)
        arguments += (options.precision, options.steps)
        try:
            if torch.device(options.device).type == "cuda":
                row["runs"].append(train_steps(*arguments))
                torch.cuda.empty_cache()
            else:
                row["runs"].append(run_fresh(train_steps, *arguments, threads=options.threads))
        except (WorkerError, torch.cuda.OutOfMemoryError) as error:  # out of memory is a result as well
            row["error"] = str(error).strip().splitlines()[-1]
    for row in rows:
        if row["runs"]:
            _summarise(row)
    return rows


def _summarise(row: dict[str, Any]) -> None:
    runs = row["runs"]
    frames = runs[0]["frames"]
    for part in PARTS:
        row[f"{part}_seconds"] = statistics.median(s for run in runs for s in run["seconds"][part])
    steps = [sum(parts) for run in runs for parts in zip(*run["seconds"].values(), strict=True)]
    row["step_seconds"] = statistics.median(steps)
    row["ms_per_frame"] = 1e3 * row["step_seconds"] / frames
    row["peak_bytes"] = max(run["memory"]["peak"] for run in runs)
    row["weights_and_more_bytes"] = max(run["memory"]["loaded"] for run in runs)


def tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> list:
    title = f"A training step, {options.precision}, batch {options.batch}, {options.size[0]}x{options.size[1]}"
    made = table(title, ["model", "checkpointing", "s", "forward", "backward", "optimizer", "ms/frame of a clip", "peak GB"])
    for row in rows:
        cells = [row["model"], "on" if row["checkpointing"] else "off"]
        if row["runs"]:
            cells += [f"{row[key]:.2f}" for key in ("step_seconds", *(f"{part}_seconds" for part in PARTS))]
            cells += [f"{row['ms_per_frame']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        else:
            cells.append(row["error"])
        made.add_row(*cells)
    return [made]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["vcvae-4x8x8", "wan", "hunyuanvideo-untiled", "cogvideox"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=models, metavar="NAME")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--size", type=parse_size, default=(64, 64), help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of a process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    add_common_options(parser)
    options = parser.parse_args(arguments)
    warn_if_busy()
    results = {"environment": environment(options.device, options.threads), "options": plain(options)}
    results["rows"] = measure(options)
    report(results, options.json, tables(results["rows"], options))


if __name__ == "__main__":
    main()
