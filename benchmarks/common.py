"""What the benchmarks share: the models at their published sizes, fresh and persistent processes, peak memory, results.

Every model has random weights: speed and memory do not depend on them. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)
from rich.console import Console
from rich.table import Table

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATIONS = ("encode", "decode")

# Far smaller than anything published, with the same code: to see whether a benchmark runs, and to calibrate on many sizes.
_TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
_SMALL = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2}
_MEDIUM = {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2}


@dataclass(frozen=True)
class Model:
    """A video VAE to be measured.

    Args:
        build: makes it with random weights.
        group, alone: it takes `alone + group * k` frames as they are.
        setting: how it is used, for the record.
        ours: whether it is a VC-VAE.
    """

    build: Callable[[], diffusers.ModelMixin]
    group: int
    alone: int
    setting: str
    ours: bool = False

    def frames(self, wanted: int) -> int:
        """The number of frames nearest to `wanted`, from above for `k` of whole groups, that it takes without padding."""
        groups = -(-wanted // self.group)
        if self.alone and self.group * (groups - 1) + self.alone >= wanted:
            groups -= 1
        return self.group * groups + self.alone


def _bundled() -> AutoencoderKLVCVAE:
    return AutoencoderKLVCVAE.from_config(AutoencoderKLVCVAE.load_config(str(bundled_model_path())))


def _hunyuan_untiled() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


_OURS = "default evaluation, fuse_tdc()"
_PEER = "diffusers' defaults"

MODELS: dict[str, Model] = {
    "vcvae-4x8x8": Model(AutoencoderKLVCVAE, 4, 0, _OURS, ours=True),
    "vcvae-8x8x8": Model(
        lambda: AutoencoderKLVCVAE(temporal_downsample=(True, True, True), latent_channels=32), 8, 0, _OURS, ours=True
    ),
    "vcvae-tiny": Model(lambda: AutoencoderKLVCVAE(**_TINY), 4, 0, f"{_OURS}; a toy size", ours=True),
    "vcvae-small": Model(lambda: AutoencoderKLVCVAE(**_SMALL), 4, 0, f"{_OURS}; a toy size", ours=True),
    "vcvae-medium": Model(lambda: AutoencoderKLVCVAE(**_MEDIUM), 4, 0, f"{_OURS}; a toy size", ours=True),
    "vcvae-bundled": Model(_bundled, 4, 0, f"{_OURS}; the bundled model's configuration", ours=True),
    "wan": Model(AutoencoderKLWan, 4, 1, f"Wan 2.1, {_PEER}"),
    "wan-tiny": Model(lambda: AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1), 4, 1, f"{_PEER}; a toy size"),
    "wan-small": Model(
        lambda: AutoencoderKLWan(base_dim=24, dim_mult=[1, 2, 3, 4], num_res_blocks=1),
        4,
        1,
        f"{_PEER}; widths and depth near the bundled model's",
    ),
    "hunyuanvideo": Model(
        AutoencoderKLHunyuanVideo, 4, 1, f"{_PEER}: clips of more than 16 frames in overlapping, blended tiles of 16 in time"
    ),
    "hunyuanvideo-untiled": Model(_hunyuan_untiled, 4, 1, "use_framewise_encoding and use_framewise_decoding off: no tiles"),
    "cogvideox": Model(AutoencoderKLCogVideoX, 4, 1, f"{_PEER}: 8 frames, 2 latent frames at once"),
    "ltx": Model(AutoencoderKLLTXVideo, 8, 1, f"LTX-Video 0.9, {_PEER}; compression 8x32x32"),
    "mochi": Model(AutoencoderKLMochi, 6, 1, f"{_PEER}; compression 6x8x8"),
    "cosmos": Model(AutoencoderKLCosmos, 8, 1, f"Cosmos 1.0 CV8x8x8, {_PEER}"),
}


def load(name: str, device: str, dtype: torch.dtype, fuse: bool = True) -> diffusers.ModelMixin:
    """Build a model on its device, ours with kernels fused for inference or not.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: choose from {', '.join(MODELS)}")
    torch.manual_seed(0)
    with torch.device(device):
        vae = MODELS[name].build().eval().requires_grad_(False)
    for parameter in vae.parameters():  # `to` would warn for classes that list modules for float32
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    for module in vae.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device=device, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
    if MODELS[name].ours and fuse:
        vae.fuse_tdc()
    return vae


def clip_for(name: str, frames: int, height: int, width: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A random clip `(1, 3, T, H, W)` in [-1, 1], T as the model takes it."""
    shape = (1, 3, MODELS[name].frames(frames), height, width)
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(device, dtype)


def run(vae: diffusers.ModelMixin, operation: str, x: torch.Tensor) -> torch.Tensor:
    """Encode a clip to the posterior's mode, or decode latents."""
    if operation == "encode":
        return vae.encode(x).latent_dist.mode()
    return vae.decode(x).sample


def synchronize(device: str) -> None:
    """Wait for a device that works asynchronously."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- memory


def resident_bytes(peak: bool = False) -> int:
    """The resident size of this process, or the highest since `reset_peak`, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        key = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def reset_peak(device: str) -> None:
    """Start a new measurement of peak memory. Where the system cannot (only Linux can, on CPUs), peaks are the process's."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(device: str, peak: bool = False) -> int:
    """Memory in use on a device, or its peak since `reset_peak`: the process on a CPU, torch's tensors on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resident_bytes(peak)


# ---------------------------------------------------------------------------------------------------------- processes


class WorkerError(RuntimeError):
    """A worker failed, or was killed, for example for its memory."""


class Worker:
    """A process of its own that answers calls: `worker.call("name", *arguments)` runs that method of its object there.

    Args:
        factory: a module-level class; it is called with `arguments` in the new process, and holds what is measured.
        threads: of torch in the new process.

    Attributes:
        start_method: `"spawn"`, or `"forkserver"`, which imports the libraries once for all workers; of their memory a
            worker then shows what it uses.
    """

    start_method = "spawn"

    def __init__(self, factory: Callable[..., Any], *arguments: Any, threads: int):
        context = multiprocessing.get_context(self.start_method)
        if self.start_method == "forkserver":
            context.set_forkserver_preload(["vc_vae_diffusers"])
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory, arguments, threads), daemon=True)
        self._process.start()
        other.close()
        self._started = False

    def wait(self) -> None:
        """Wait until the object is there: workers that are made one after the other start side by side."""
        if not self._started:
            self._started = True
            self.answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method there and wait for its result.

        Raises:
            WorkerError: with the worker's own traceback, or the signal that ended it.
        """
        self.ask(method, *arguments)
        return self.answer()

    def ask(self, method: str, *arguments: Any) -> None:
        """Have a method run there, and do not wait: `answer` does."""
        self.wait()
        self._connection.send((method, arguments))

    def answer(self) -> Any:
        """Wait for the result of what was asked. Raises as `call`."""
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerError(f"the process ended with {f'signal {-code}' if code < 0 else f'status {code}'}") from None
        if kind == "error":
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve(connection: Connection, factory: Callable[..., Any], arguments: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    target: Any = None
    request: tuple | None = None
    while True:
        try:
            if target is None:
                target, value = factory(*arguments), None
            else:
                method, parameters = request
                value = getattr(target, method)(*parameters)
            connection.send(("result", value))
        except Exception:  # everything that can go wrong in there is reported, and the parent decides
            connection.send(("error", traceback.format_exc()))
        try:
            request = connection.recv()
        except EOFError:
            return


class _Call:
    def call(self, function: Callable[..., Any], arguments: tuple) -> Any:
        return function(*arguments)


def run_fresh(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """Run a module-level function in a process of its own and return its result.

    Raises:
        WorkerError: as `Worker.call`.
    """
    with Worker(_Call, threads=threads) as worker:
        return worker.call("call", function, arguments)


# ------------------------------------------------------------------------------------------------------------ results


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that all benchmarks have."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch in each process")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")


def parse_size(text: str) -> tuple[int, int]:
    """`64x96` is height x width; for argparse."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and (width.isdigit() or not width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: pass HEIGHTxWIDTH or one number, for example 64x64")
    return int(height), int(width or height)


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options for JSON."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {key: one(value) for key, value in vars(options).items()}


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    packages = {name: version(name) for name in ("torch", "diffusers", "accelerate", "vc_vae_diffusers")}
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "system": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        result |= {
            "device_name": torch.cuda.get_device_name(device),
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return result


def warn_if_busy() -> None:
    """Say so when other work runs on the machine: times would mean nothing."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.3 * cores:
        console(f"The machine is busy (load {load:.1f} on {cores} cores): times are not to be trusted.")


def console(text: str) -> None:
    """A line of progress on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def report(results: dict[str, Any], path: Path | None, tables: Sequence[Table]) -> None:
    """Print tables, and write JSON so that the file is whole or not there."""
    screen = Console()
    for made in tables:
        (screen if screen.is_terminal else Console(width=140)).print(made)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, path)
        console(f"wrote {path}")


def table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(title=title, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return result
