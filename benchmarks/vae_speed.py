#!/usr/bin/env python3
"""Time of encoding and decoding, VC-VAE beside diffusers' video VAEs, at their published sizes with random weights.

Each model waits in a process of its own; one at a time is asked for one run, round after round: A B C A B C. Whatever the
machine does meanwhile so falls on all of them, and ratios are taken within a round. Beside the times stand the arithmetic
that is done (torch's counter), the share of the convolution limit (the time of the model's convolutions alone, run in the
same rounds, over the model's, see `convolution_limit.py`), and the peak memory of each operation in a fresh process.

    python benchmarks/vae_speed.py                                        # 64x64, 16 or 17 frames, float32
    python benchmarks/vae_speed.py --dtype float32 bfloat16 --size 64x64 128x128 --frames 16 --threads 2 --json speed.json
    python benchmarks/vae_speed.py --device cuda --dtype bfloat16 float16 --size 256x256 480x832 --frames 16 80
    python benchmarks/vae_speed.py --models vcvae-4x8x8 vcvae-8x8x8 wan ltx mochi cosmos

Models get the frames that they take without padding (16 for VC-VAE, 17 for Wan), and times are per frame of each. Peers run
in the memory format that is faster for them here, found by trying; everything runs under `torch.inference_mode`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
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
    memory_bytes,
    parse_size,
    plain,
    report,
    reset_peak,
    run,
    run_fresh,
    synchronize,
    table,
    warn_if_busy,
)
from convolution_limit import ConvolutionLimit, direct_convolutions, record_convolutions
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

DEFAULT_MODELS = ["vcvae-4x8x8", "vcvae-8x8x8", "wan", "hunyuanvideo", "hunyuanvideo-untiled", "cogvideox"]
FORMATS = ("contiguous", "channels_last")


def packed_flops(x: torch.Size, weight: torch.Size, *others: Any, out_shape: torch.Size) -> int:
    """Arithmetic of a convolution with a packed kernel, which torch's counter does not know."""
    return conv_flop_count(x, weight, out_shape)


def packed_sum_flops(y: torch.Size, x: torch.Size, weight: torch.Size, *others: Any, out_shape: torch.Size) -> int:
    """The same for one that adds to y."""
    return conv_flop_count(x, weight, out_shape)


PACKED_CONVOLUTIONS = {
    torch.ops.mkldnn._convolution_pointwise: packed_flops,
    torch.ops.mkldnn._convolution_pointwise_: packed_sum_flops,
}


class Bench:
    """One model in a worker process, with the inputs and the convolutions of the size at hand."""

    def __init__(
        self,
        name: str,
        device: str,
        dtype: str,
        groups_per_chunk: int,
        compiled: bool,
        formats: tuple[str, ...] = FORMATS,
        cudnn_benchmark: bool = False,
    ):
        torch.backends.cudnn.benchmark = cudnn_benchmark
        self.name, self.device, self.dtype = name, device, DTYPES[dtype]
        self.vae = load(name, device, self.dtype)
        self.compiled = compiled
        if MODELS[name].ours:
            self.vae.groups_per_chunk = groups_per_chunk
        self.formats = formats
        self.format = "model's own" if MODELS[name].ours else FORMATS[0]
        self.inputs: dict[str, torch.Tensor] = {}
        self.limits: dict[str, ConvolutionLimit] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in self.vae.parameters()),
            "setting": MODELS[self.name].setting,
            "memory_format": self.format,
        }

    def prepare(self, frames: int, height: int, width: int, with_limits: bool) -> dict[str, Any]:
        """Make inputs, count the arithmetic, note the convolutions, warm up, and pick the memory format of a peer."""
        torch.compiler.set_stance("force_eager")
        clip = clip_for(self.name, frames, height, width, self.device, self.dtype)
        with torch.no_grad():
            latents = run(self.vae, "encode", clip).clone()
        self.inputs = {"encode": clip, "decode": latents}
        flops = {operation: self._flops(operation) for operation in OPERATIONS}
        self.limits = {}
        if not MODELS[self.name].ours:
            self._choose_format()
        if with_limits:
            find = direct_convolutions if MODELS[self.name].ours else record_convolutions
            for operation in OPERATIONS:
                self.limits[operation] = ConvolutionLimit(find(self.vae, operation, self.inputs[operation]))
                self.limits[operation].run()
        if self.compiled:
            torch.compiler.set_stance("default")
            self.vae.encoder.compile()
            self.vae.decoder.compile()
        for operation in OPERATIONS:
            self.time(operation)
        return {
            **self.describe(),
            "frames": clip.shape[2],
            "latents": list(latents.shape),
            "flops": flops,
            "direct_flops": {operation: limit.flops for operation, limit in self.limits.items()},
        }

    def _flops(self, operation: str) -> int:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=PACKED_CONVOLUTIONS) as counter:
            run(self.vae, operation, self.inputs[operation])
        return counter.get_total_flops()

    def _choose_format(self) -> None:
        seconds = {}
        for name in self.formats:
            self._set_format(name)
            self.time("decode")
            seconds[name] = sum(min(self.time(operation) for _ in range(2)) for operation in OPERATIONS)
        self._set_format(min(seconds, key=seconds.get))

    def _set_format(self, name: str) -> None:
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        self.format = name
        for tensor in [*self.vae.parameters(), *self.inputs.values()]:
            layout = layouts.get(tensor.ndim - 2) if name == "channels_last" else torch.contiguous_format
            if layout is not None:
                tensor.data = tensor.data.contiguous(memory_format=layout)

    @torch.inference_mode()
    def time(self, operation: str) -> float:
        """Seconds of one run."""
        x = self.inputs[operation]
        synchronize(self.device)
        start = time.perf_counter()
        run(self.vae, operation, x)
        synchronize(self.device)
        return time.perf_counter() - start

    @torch.inference_mode()
    def peak(self, operation: str) -> dict[str, int]:
        """Bytes with the model and at the peak of one run, on a device whose allocator counts them itself."""
        self.limits.clear()
        reset_peak(self.device)
        loaded = memory_bytes(self.device)
        run(self.vae, operation, self.inputs[operation])
        synchronize(self.device)
        return {"imported": 0, "loaded": loaded, "peak": memory_bytes(self.device, peak=True)}

    @torch.inference_mode()
    def time_limit(self, operation: str) -> float:
        """Seconds of one run of the convolutions alone."""
        synchronize(self.device)
        start = time.perf_counter()
        self.limits[operation].run()
        synchronize(self.device)
        return time.perf_counter() - start


def peak_memory(
    name: str, operation: str, frames: int, height: int, width: int, device: str, dtype: str, groups_per_chunk: int
) -> dict[str, int]:
    """Bytes before the model, with it, and at the peak of one operation; to be called in a fresh process."""
    imported = memory_bytes(device)
    vae = load(name, device, DTYPES[dtype])
    if MODELS[name].ours:
        vae.groups_per_chunk = groups_per_chunk
    x = clip_for(name, frames, height, width, device, DTYPES[dtype])
    if operation == "decode":
        with torch.inference_mode():
            # Latents by the shape that encoding the smallest clip tells, so that encoding at full size leaves no peak.
            small = clip_for(name, frames, 64, 64, device, DTYPES[dtype])
            shape = list(vae.encode(small).latent_dist.mode().shape)
        x = torch.randn(*shape[:3], shape[3] * height // 64, shape[4] * width // 64, device=device, dtype=DTYPES[dtype])
    reset_peak(device)
    loaded = memory_bytes(device)
    with torch.inference_mode():
        result = run(vae, operation, x)
    synchronize(device)
    peak = memory_bytes(device, peak=True)
    del result
    return {"imported": imported, "loaded": loaded, "peak": peak}


def measure(options: argparse.Namespace, workers: dict[str, Worker], dtype: str, frames: int, size: tuple[int, int]) -> dict:
    """All models at one size: prepare each, then rounds over all, then memory."""
    height, width = size
    models = {}
    for name, worker in workers.items():
        console(f"{dtype} {height}x{width} {frames} frames: preparing {name}")
        models[name] = worker.call("prepare", frames, height, width, options.limits)
    runs: dict[tuple[str, str, str], list[float]] = {}
    kinds = ("time", "time_limit") if options.limits else ("time",)
    for i in range(options.rounds):
        console(f"{dtype} {height}x{width} {frames} frames: round {i + 1} of {options.rounds}")
        for operation in OPERATIONS:
            for kind in kinds:
                for name, worker in workers.items():
                    runs.setdefault((name, operation, kind), []).append(worker.call(kind, operation))
    for name, model in models.items():
        for operation in OPERATIONS:
            limit = runs.get((name, operation, "time_limit"))
            model[operation] = _figures(model, operation, runs[name, operation, "time"], limit)
        if options.memory:
            console(f"{dtype} {height}x{width} {frames} frames: memory of {name}")
            arguments = (frames, height, width, options.device, dtype, options.groups_per_chunk)
            for operation in OPERATIONS:
                if torch.device(options.device).type == "cuda":
                    memory = workers[name].call("peak", operation)
                else:
                    memory = run_fresh(peak_memory, name, operation, *arguments, threads=options.threads)
                model[operation]["memory"] = memory
        del model["flops"], model["direct_flops"]
    return {
        "dtype": dtype,
        "height": height,
        "width": width,
        "frames": frames,
        "models": models,
        "ratios": {operation: _ratios(models, operation) for operation in OPERATIONS},
    }


def _figures(model: dict[str, Any], operation: str, seconds: list[float], limit: list[float] | None) -> dict[str, Any]:
    flops, median = model["flops"][operation], statistics.median(seconds)
    figures = {
        "seconds": seconds,
        "ms_per_frame": 1e3 * median / model["frames"],
        "ms_per_frame_range": [1e3 * bound / model["frames"] for bound in (min(seconds), max(seconds))],
        "gflop": flops / 1e9,
        "gflop_per_second": flops / 1e9 / median,
    }
    if limit is not None:
        figures["direct_convolutions_gflop"] = model["direct_flops"][operation] / 1e9
        figures["direct_convolutions_seconds"] = limit
        # Within a round, so that both saw the same machine.
        figures["share_of_convolution_limit"] = statistics.median(b / a for a, b in zip(seconds, limit, strict=True))
    return figures


def _ratios(models: dict[str, Any], operation: str) -> dict[str, dict[str, float]]:
    """Time per frame of each VC-VAE over each peer's: the median of the ratios within a round."""
    ratios: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        if not MODELS[name].ours:
            continue
        ratios[name] = {}
        for peer, other in models.items():
            if not MODELS[peer].ours:
                pairs = zip(model[operation]["seconds"], other[operation]["seconds"], strict=True)
                frames = other["frames"] / model["frames"]
                ratios[name][peer] = frames * statistics.median(mine / theirs for mine, theirs in pairs)
    return ratios


def tables(results: list[dict[str, Any]], limits: bool, memory: bool) -> list:
    """One table for each dtype and size; the last columns are the time of a VC-VAE over that of the row."""
    made = []
    for result in results:
        ours = [name for name in result["models"] if MODELS[name].ours]
        title = f"{result['dtype']}, {result['height']}x{result['width']}, at least {result['frames']} frames"
        columns = ["model", "frames", "", "ms/frame", "min-max", "GFLOP"] + ["limit"] * limits + ["peak GB"] * memory
        made.append(table(title, [*columns, *(f"{name} takes" for name in ours)]))
        for name, model in result["models"].items():
            for operation in OPERATIONS:
                figures = model[operation]
                cells = [f"{figures['ms_per_frame']:.1f}", "-".join(f"{b:.0f}" for b in figures["ms_per_frame_range"])]
                cells.append(f"{figures['gflop']:.0f}")
                if limits:
                    cells.append(f"{figures['share_of_convolution_limit']:.0%}")
                if memory:
                    cells.append(f"{figures['memory']['peak'] / 1e9:.2f}")
                ratios = [result["ratios"][operation][mine].get(name) for mine in ours]
                cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                made[-1].add_row(name, str(model["frames"]), operation, *cells)
        formats = sorted({f"{name} {model['memory_format']}" for name, model in result["models"].items()})
        made[-1].caption = f"memory formats: {', '.join(formats)}"
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=DEFAULT_MODELS, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--size", nargs="+", type=parse_size, default=[(64, 64)], help="HEIGHTxWIDTH, several")
    parser.add_argument("--frames", nargs="+", type=int, default=[16], help="frames of a clip, several")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups-per-chunk", type=int, default=1, help="VC-VAE's groups_per_chunk")
    parser.add_argument(
        "--peer-format",
        choices=["fastest", *FORMATS],
        default="fastest",
        help="memory format of the peers; contiguous is how diffusers loads them",
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="have cuDNN try its algorithms; PyTorch's default is not"
    )
    parser.add_argument("--compile", action="store_true", help="compile encoder and decoder of all models")
    parser.add_argument("--no-limits", dest="limits", action="store_false", help="leave the convolutions alone out")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    warn_if_busy()
    results = {"environment": environment(options.device, options.threads), "options": plain(options), "results": []}
    for dtype in options.dtype:
        workers: dict[str, Worker] = {}
        try:
            for name in options.models:
                console(f"{dtype}: building {name}")
                formats = FORMATS if options.peer_format == "fastest" else (options.peer_format,)
                arguments = (name, options.device, dtype, options.groups_per_chunk, options.compile, formats)
                arguments += (options.cudnn_benchmark,)
                workers[name] = Worker(Bench, *arguments, threads=options.threads)
            for size in options.size:
                for frames in options.frames:
                    results["results"].append(measure(options, workers, dtype, frames, size))
        finally:
            for worker in workers.values():
                worker.close()
    results["load_average_after"] = environment(options.device, options.threads)["load_average"]
    report(results, options.json, tables(results["results"], options.limits, options.memory))


if __name__ == "__main__":
    main()
