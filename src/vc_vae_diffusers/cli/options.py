"""The options that commands share, and the checks that need neither PyTorch nor a model.

Every command checks its options first: a mistake is told at once, and under the name that was typed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..names import is_bundled

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or hub id of a VC-VAE; by default the small one in the package.",
        callback=lambda name: None if is_bundled(name) else name,
    ),
]
SubfolderOption = Annotated[
    str | None, typer.Option("--subfolder", help="Folder inside the model's folder or repository, e.g. vae.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:N, mps.", autocompletion=lambda: ["auto", "cpu", "cuda", "cuda:0", "mps"]
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16 for the model; auto is bfloat16 where the device computes in it, else float32.",
        autocompletion=lambda: ["auto", "float32", "bfloat16", "float16"],
    ),
]
MeasuringDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16 for the model: what is measured must not depend on the machine.",
        autocompletion=lambda: ["float32", "bfloat16", "float16"],
    ),
]
TileOption = Annotated[
    str | None,
    typer.Option("--tile", help="Work in overlapping tiles of this many pixels, N or HEIGHTxWIDTH: less memory a frame."),
]
GroupsOption = Annotated[
    int,
    typer.Option("--groups-per-chunk", min=1, help="Groups of frames at once: more is faster and takes more memory."),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the network first, for GPUs: worth it for long videos.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and only that.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")]
StartOption = Annotated[float, typer.Option("--start", min=0, help="Begin at this second of the input.")]
StopOption = Annotated[float | None, typer.Option("--stop", help="End at this second of the input.")]
FramesOption = Annotated[int | None, typer.Option("--num-frames", min=1, help="Stop after this many frames.")]
FpsOption = Annotated[
    float | None, typer.Option("--fps", help="Resample the input to this rate; by default every frame keeps its time.")
]
ResizeOption = Annotated[int | None, typer.Option("--resize", min=1, help="Scale the short side to this many pixels.")]
CrfOption = Annotated[float, typer.Option("--crf", min=0, max=51, help="H.264 quality of the output, lower is better.")]
LosslessOption = Annotated[
    bool, typer.Option("--lossless", help="Keep every RGB value: FFV1 in .mkv, H.264 RGB in .mp4 and .mov.")
]


def check_range(start: float, stop: float | None, fps: float | None) -> None:
    """Raises ValueError for a part of the input that makes no sense."""
    if stop is not None and stop <= start:
        raise ValueError(f"--stop: {stop:g} must be later than --start, {start:g} seconds.")
    if fps is not None and not 1e-5 <= fps <= 1e5:
        raise ValueError(f"--fps: {fps:g} must lie between 0.00001 and 100000 frames a second.")


def parse_tile(text: str | None) -> tuple[int, int] | None:
    """`512` or `384x640` (height x width) in pixels.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if match is None:
        raise ValueError(f"--tile: {text!r} is neither a number of pixels nor HEIGHTxWIDTH; use e.g. 512 or 384x640.")
    return int(match[1]), int(match[2] or match[1])


def check_place(device: str, dtype: str) -> None:
    """Raises ValueError for names of devices and types that do not exist."""
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"--device: {device!r} is no device; use auto, cpu, cuda, cuda:N or mps.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} is unknown; use auto, float32, bfloat16 or float16.")


def check_measuring_place(device: str, dtype: str) -> None:
    """`check_place` of commands whose result is a number: the machine does not decide it."""
    check_place(device, dtype)
    if dtype == "auto":
        raise ValueError("--dtype: auto would let the machine decide a number; use float32, bfloat16 or float16.")


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU, whichever is there first.

    Raises:
        ValueError: for a device that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available() and (device.index or 0) < torch.xpu.device_count(),
    }
    if not there[device.type]:
        raise ValueError(f"--device: {name!r} is not available on this machine; use cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has instructions for it (`docs/performance.md`), float32 elsewhere."""
    import torch

    from ..hardware import has_bfloat16

    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    dtype = getattr(torch, DTYPES[name])
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16(device))):
        from .printing import warn

        warn(f"--dtype {name}: this processor only emulates it, many times slower than float32")
    return dtype


def parse_budget(text: str | None) -> int | None:
    """`8GB`, `6GiB`, … in bytes.

    Raises:
        ValueError: without a unit, or for anything else.
    """
    if text is None:
        return None
    if text.strip().replace(".", "", 1).isdigit():
        raise ValueError(f"--memory: {text} has no unit; say {text}GB, or {text}B if bytes are meant.")
    from ..autoencoder.memory_plan import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise ValueError(f"--memory: {text!r} is no amount of memory; use e.g. 8GB, 512MiB or 24GiB.") from error


# ---------------------------------------------------------------------------------------------------- outputs


def check_suffix(path: Path, *, image: bool, option: str = "OUT") -> None:
    """Raises ValueError for a suffix that does not fit what is written."""
    from ..video import IMAGE_SUFFIXES, WRITABLE_VIDEO_SUFFIXES

    suffixes = IMAGE_SUFFIXES if image else WRITABLE_VIDEO_SUFFIXES
    if path.suffix.lower() not in suffixes:
        what = "an image" if image else "a video"
        raise ValueError(f"{option}: {path} must be {what} here; use one of {', '.join(sorted(suffixes))}.")


def check_output(path: Path, overwrite: bool, option: str = "OUT") -> None:
    """Refuse a destination before any work is done; the one rule of all commands for files that exist.

    Raises:
        ValueError: if the path is a folder, a device or the like, or a file that `overwrite` does not give up.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; pass a file name.")
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{option}: {path} is a device, a pipe, a socket or a broken link; pass a file name.")
    if path.exists() and not overwrite:
        raise ValueError(f"{option}: {path} exists; pass --overwrite to replace it, or another name.")


def check_distinct(**paths: Path | None) -> None:
    """Raises ValueError if two of the named files are one, by whatever links."""
    seen: dict[str, Path] = {}
    for option, path in paths.items():
        if path is None:
            continue
        for other, known in seen.items():
            same = os.path.realpath(path) == os.path.realpath(known)  # which takes loops of links
            if same or (path.exists() and known.exists() and path.samefile(known)):
                raise ValueError(f"{option}: {path} is {other} as well; pass another file name.")
        seen[option] = path


def make_folder(path: Path, option: str = "OUT") -> None:
    """Make the folder that `path` is to lie in.

    Raises:
        ValueError: if that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: the folder {path.parent} cannot be made ({error.strerror}); choose another.") from error
