"""`vcvae stats`: mean and standard deviation of a model's latents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from .models import check_model, load_model, model_name
from .options import DeviceOption, JsonOption, MeasuringDtypeOption, ModelOption, SubfolderOption, check_measuring_place
from .printing import emit


def stats(
    data: Annotated[Path, typer.Option("--data", exists=True, help="Folder or list file of videos.")],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Patterns, or @LIST:SECTION.")] = None,
    num_frames: Annotated[int, typer.Option("--num-frames", min=1, help="Of a clip.")] = 16,
    size: Annotated[int, typer.Option("--size", min=8, help="Side of a clip in pixels.")] = 256,
    clips_per_video: Annotated[int, typer.Option("--clips-per-video", min=1, max=1000, help="At equal distances.")] = 1,
    posterior: Annotated[
        str, typer.Option("--posterior", help="mode or sample.", autocompletion=lambda: ["mode", "sample"])
    ] = "mode",
    write: Annotated[bool, typer.Option("--write", help="Put the values into the config.json of --model.")] = False,
    device: DeviceOption = "auto",
    dtype: MeasuringDtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure mean and standard deviation of the latents by channel, and one scale and shift, in float64.

    Run it under `accelerate launch` for several processes.
    """
    check_measuring_place(device, dtype)
    if posterior not in ("mode", "sample"):
        raise ValueError(f"--posterior: {posterior!r} is unknown; use mode or sample.")
    if write and model is None:
        raise ValueError("--write: would change the model that is part of the installed package; pass a copy as --model.")
    place = Path(check_model(model, subfolder), subfolder or "")
    if write and not (place / "config.json").is_file():
        raise ValueError(f"--write: {place} is no local folder; download the model, or leave --write out.")

    from ..processes import processes
    from ..training.data import expand_patterns, find_files
    from ..training.latent_stats import measure_latents, write_statistics

    files = find_files(data, expand_patterns(include or [], Path()))
    process = processes(None if device == "auto" else device)
    vae = load_model(model, subfolder, str(process.device) if device == "auto" else device, dtype)
    kind: Literal["mode", "sample"] = "sample" if posterior == "sample" else "mode"
    measured = measure_latents(vae, files, num_frames=num_frames, size=size, clips_per_video=clips_per_video, posterior=kind)
    if not process.is_main_process:
        return
    written = write_statistics(place, measured) if write else []
    result = {"command": "stats", "model": model_name(model, subfolder), **asdict(measured), "written": written}
    table = Table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(measured.latents_mean, measured.latents_std, strict=True)):
        table.add_row(str(channel), f"{mean:.5f}", f"{std:.5f}")
    table.add_section()
    table.add_row("all", f"shift {measured.shift_factor:.5f}", f"scale {measured.scaling_factor:.5f}")
    where = f"written to {place / 'config.json'}" if written else "not written (--write does)"
    emit(result, as_json, table, f"{measured.clips} clips, {measured.elements} latent positions; {where}")
