"""`vcvae plan`: chunks and tiles that fit into memory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .models import check_model, load_model, model_name
from .options import DeviceOption, DtypeOption, JsonOption, ModelOption, SubfolderOption, check_place, parse_budget
from .printing import emit, format_bytes


def plan(
    height: Annotated[int, typer.Option("--height", min=1, help="Of the video in pixels.")],
    width: Annotated[int, typer.Option("--width", min=1, help="Of the video in pixels.")],
    memory: Annotated[str | None, typer.Option("--memory", help="Budget, as 8GB or 6GiB; by default what is free.")] = None,
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", min=1, help="Of a whole clip; leave out for a stream.")
    ] = None,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Choose chunk length and tiles so that a video fits into memory. An estimate: nothing is run."""
    check_place(device, dtype)
    check_model(model, subfolder)
    budget = parse_budget(memory)

    from ..autoencoder.memory_plan import plan as choose_plan

    vae = load_model(model, subfolder, device, dtype)
    ratio = vae.spatial_compression_ratio
    padded_height, padded_width = (-(-side // ratio) * ratio for side in (height, width))
    with Console(stderr=True).status("estimating memory"):
        chosen = choose_plan(vae, padded_height, padded_width, num_frames, budget)
    result = {"command": "plan", "model": model_name(model, subfolder), **chosen.to_dict(), "fits": chosen.fits}
    table = Table("memory", *(estimate.operation for estimate in chosen.estimates))
    for part in ("runtime", "weights", "video", "cache", "activations", "total"):
        table.add_row(part, *(format_bytes(getattr(estimate, part)) for estimate in chosen.estimates))
    tile = "no tiles" if chosen.tile is None else f"{chosen.tiles} tiles: --tile {chosen.tile[0]}x{chosen.tile[1]}"
    line = f"--groups-per-chunk {chosen.groups_per_chunk}, {tile}; {format_bytes(chosen.memory)} given"
    emit(result, as_json, table, line)
