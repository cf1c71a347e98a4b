"""What the subcommands share: options, the model, the size of frames, progress, results for people and for machines.

Rule of all commands: results go to stdout (a table, or with `--json` one JSON object and nothing else), everything else,
progress included, to stderr. Mistakes are `ValueError`s that `cli.py` reports.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

from ..video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a VC-VAE; by default the small one in the package."),
]
SubfolderOption = Annotated[
    str | None, typer.Option("--subfolder", help="Folder inside the model's folder or repository, e.g. vae.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (float32, bfloat16 on CUDA), float32, bfloat16, float16 for the model.")
]
TileOption = Annotated[
    str | None,
    typer.Option("--tile", help="Work in overlapping tiles of this many pixels, N or HEIGHTxWIDTH: less memory a frame."),
]
GroupsOption = Annotated[
    int,
    typer.Option("--groups-per-chunk", min=1, help="Groups of frames at once: more is faster and takes more memory."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and only that.")]
StartOption = Annotated[float, typer.Option("--start", min=0, help="Begin at this second of the input.")]
StopOption = Annotated[float | None, typer.Option("--stop", help="End at this second of the input.")]
FramesOption = Annotated[int | None, typer.Option("--num-frames", min=1, help="Stop after this many frames.")]
FpsOption = Annotated[
    float | None, typer.Option("--fps", help="Resample the input to this rate; by default every frame keeps its time.")
]
ResizeOption = Annotated[int | None, typer.Option("--resize", min=1, help="Scale the short side to this many pixels.")]
CrfOption = Annotated[float, typer.Option("--crf", help="H.264 quality of the output, 0-51, lower is better.")]
LosslessOption = Annotated[
    bool, typer.Option("--lossless", help="Keep every RGB value: FFV1 in .mkv, H.264 RGB in .mp4 and .mov.")
]

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


# ---------------------------------------------------------------------------------------------------- the model


def parse_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU, whichever is there first.

    Raises:
        ValueError: for a name torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {name!r} is no device; use auto, cpu, cuda, cuda:N or mps.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"--device: {name!r} is not available on this machine; use cpu.")
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype: {name!r} is unknown; use auto, float32, bfloat16 or float16.")
    return DTYPES[name]


def parse_tile(text: str) -> tuple[int, int]:
    """`512` or `384x640` (height x width) in pixels.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"--tile: {text!r} is neither a number of pixels nor HEIGHTxWIDTH; use e.g. 512 or 384x640.")
    return int(match[1]), int(match[2] or match[1])


def locate_model(model: str | None, subfolder: str | None) -> str:
    """The folder or hub id to load, with local folders checked.

    Raises:
        ValueError: if it is neither, or holds no VC-VAE.
    """
    if model is None:
        if not (bundled_model_path() / "config.json").is_file():
            raise ValueError(
                f"--model: the bundled checkpoint is missing from this installation ({bundled_model_path()}); reinstall the "
                "package, or pass --model."
            )
        return str(bundled_model_path())
    folder = Path(model)
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            return model
        raise ValueError(f"--model: {model} is neither a folder nor a hub id (owner/name); check the path.")
    if folder.is_file():
        raise ValueError(
            f"--model: {model} is a file; pass the folder that save_pretrained wrote. Image VAE weights become one by "
            "`python convert_flux_weights.py`."
        )
    inner = folder / subfolder if subfolder else folder
    if not (inner / "config.json").is_file():
        hint = "it has a vae/ folder: add --subfolder vae" if (inner / "vae" / "config.json").is_file() else "check the path"
        raise ValueError(f"--model: {inner} has no config.json, so it is no model folder; {hint}.")
    try:
        found = json.loads((inner / "config.json").read_text()).get("_class_name")
    except json.JSONDecodeError as error:
        raise ValueError(f"--model: {inner / 'config.json'} is not valid JSON ({error}); download it again.") from error
    if found != AutoencoderKLVCVAE.__name__:
        raise ValueError(
            f"--model: {inner} holds a {found}, not an {AutoencoderKLVCVAE.__name__}; an image VAE becomes one by "
            "`python convert_flux_weights.py`."
        )
    return model


def load_model(
    model: str | None,
    subfolder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tile: str | None = None,
    groups_per_chunk: int = 1,
) -> AutoencoderKLVCVAE:
    """The model ready for inference: options checked before anything is loaded, kernels folded, tiling on when asked.

    Raises:
        ValueError: for options that make no sense here.
        OSError: if the weights cannot be read.
    """
    target = parse_device(device)
    precision = parse_dtype(dtype, target)
    tile_size = parse_tile(tile) if tile is not None else None
    vae = AutoencoderKLVCVAE.from_pretrained(locate_model(model, subfolder), subfolder=subfolder, torch_dtype=precision)
    vae = vae.to(target).eval().requires_grad_(False)
    vae.fuse_tdc()
    vae.groups_per_chunk = groups_per_chunk
    if tile_size is not None:
        vae.enable_tiling(tile_sample_min_height=tile_size[0], tile_sample_min_width=tile_size[1])
    return vae


def model_name(model: str | None, subfolder: str | None = None) -> str:
    """How results name the model."""
    return "bundled" if model is None else f"{model}/{subfolder}" if subfolder else model


# ---------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class FrameSize:
    """A frame's size and the multiple of the model's ratio that it is padded to by repeating the last row and column."""

    height: int
    width: int
    padded_height: int
    padded_width: int

    @classmethod
    def of(cls, height: int, width: int, ratio: int) -> FrameSize:
        return cls(height, width, -(-height // ratio) * ratio, -(-width // ratio) * ratio)

    def pad(self, frames: torch.Tensor) -> torch.Tensor:
        """`(1, C, T, H, W)` to the padded size."""
        right, bottom = self.padded_width - self.width, self.padded_height - self.height
        return F.pad(frames, (0, right, 0, bottom, 0, 0), mode="replicate") if right or bottom else frames

    def crop(self, frames: torch.Tensor) -> torch.Tensor:
        """Back to the original size."""
        return frames[..., : self.height, : self.width]


def needs_frame_count(vae: AutoencoderKLVCVAE) -> bool:
    """Whether streams must know their length beforehand: "4k+1" puts the frames it repeats at the start."""
    return vae.config.first_frame == "in_sequence" and vae.config.frame_convention == "4k+1"


def check_output(path: Path, *, image: bool, option: str = "OUT") -> None:
    """Refuse a bad destination before any work is done.

    Raises:
        ValueError: for a missing folder, or a suffix that does not fit what is written.
    """
    suffixes = IMAGE_SUFFIXES if image else VIDEO_SUFFIXES
    if path.suffix.lower() not in suffixes:
        what = "an image" if image else "a video"
        raise ValueError(f"{option}: {path} must be {what} here; use one of {', '.join(sorted(suffixes))}.")
    check_folder(path, option)


def check_folder(path: Path, option: str = "OUT") -> None:
    """Raises ValueError if the folder that `path` is to lie in does not exist, or `path` is a folder itself."""
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; pass a file name.")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the folder {path.parent} does not exist; create it first (mkdir -p {path.parent}).")


def check_distinct(**paths: Path | None) -> None:
    """Raises ValueError if two of the named files are one."""
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        if (other := seen.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{option}: {path} is {other} as well; pass another file name.")


# ---------------------------------------------------------------------------------------------------- printing


class _FramesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- frames/s" if speed is None else f"{speed:.1f} frames/s", style="progress.data.speed")


def frame_progress() -> Progress:
    """Bar, frames done, frames/s and time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _FramesPerSecond(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def counted(frames: Iterator[Any], progress: Progress, task: Any, length: Any) -> Iterator[Any]:
    """Pass items through and advance the bar by `length(item)` each."""
    for item in frames:
        yield item
        progress.advance(task, length(item))


def emit(result: dict[str, Any], as_json: bool, *parts: Table | str) -> None:
    """The result on stdout: JSON for machines, tables and lines for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    console = Console()
    for part in parts:
        console.print(part, highlight=False)


def files_table(files: dict[str, Path]) -> Table:
    """Where the files are, and how large."""
    table = Table()
    table.add_column("file")
    table.add_column("where", overflow="fold")
    table.add_column("size", justify="right")
    for what, path in files.items():
        table.add_row(what, str(path), format_bytes(path.stat().st_size))
    return table


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def json_number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: null."""
    return value if value is not None and math.isfinite(value) else None
