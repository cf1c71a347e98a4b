"""What `gpu_estimate.py` estimates, for real: the same operations of the same models on a device that is there."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import DTYPES, MODELS, clip_for, load, memory_bytes, reset_peak, run, synchronize
from train_step import train_steps


def latents_of(vae: torch.nn.Module, clip: torch.Tensor) -> torch.Tensor:
    """Latents of the shape that encoding the clip gives, by encoding a small one."""
    small = clip[..., :64, :64]
    shape = run(vae, "encode", small).shape
    return clip.new_empty(*shape[:3], shape[3] * clip.shape[3] // 64, shape[4] * clip.shape[4] // 64)


def measure(name: str, operation: str, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a frame, the median of some runs after two, and bytes at the peak above the weights."""
    if operation.startswith("train"):
        precision = "bfloat16" if options.autocast else "float32"
        checkpointing = operation == "train-checkpointed"
        made = train_steps(name, checkpointing, options.frames, options.size, 1, options.device, precision, options.runs)
        seconds = [sum(parts) for parts in zip(*made["seconds"].values(), strict=True)]
        taken = made["memory"]["peak"] - made["memory"]["loaded"]
    else:
        vae = load(name, options.device, DTYPES[options.dtype])
        if MODELS[name].ours:
            vae.groups_per_chunk = options.groups_per_chunk
        if options.compiled:
            for network in [vae] if MODELS[name].ours else [vae.encoder, vae.decoder]:
                network.compile()
        x = clip_for(name, options.frames, *options.size, options.device, DTYPES[options.dtype])
        x = x if operation == "encode" else latents_of(vae, x)
        with torch.no_grad():
            seconds = [_seconds(vae, operation, x, options.device) for _ in range(2)]  # compiling, choosing kernels
            reset_peak(options.device)
            before = memory_bytes(options.device)
            seconds = [_seconds(vae, operation, x, options.device) for _ in range(options.runs)]
            taken = memory_bytes(options.device, peak=True) - before
    frames = MODELS[name].frames(options.frames)
    return {"measured_ms_per_frame": 1e3 * statistics.median(seconds) / frames, "measured_peak_bytes": taken}


def _seconds(vae: torch.nn.Module, operation: str, x: torch.Tensor, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(vae, operation, x)
    synchronize(device)
    return time.perf_counter() - start
