"""`vcvae encode`: videos or images to latents, in safetensors files (`latent_file.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import Job, find_jobs, open_input, run_jobs
from .models import check_model, load_model, model_name
from .options import (
    CompileOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    FramesOption,
    GroupsOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    ResizeOption,
    StartOption,
    StopOption,
    SubfolderOption,
    TileOption,
    check_place,
    check_range,
    parse_tile,
)
from .printing import facts_table, files_table, frame_progress

_STORAGE = ("float32", "bfloat16", "float16", "int8")
LATENTS = frozenset({".safetensors"})


def encode(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="IN", help="Video, image, folder of images or pattern; several videos; with --shards a collection."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The latents, a .safetensors file; a folder for several and for shards.")
    ],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    shards: Annotated[
        int | None,
        typer.Option(
            "--shards",
            min=1,
            metavar="N",
            help="Write webdataset shards of N samples; IN: folder with all below it, list (.txt, .csv) or tar shards.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="float32, bfloat16, float16 or int8 for the latents; by default the model's type.",
            autocompletion=lambda: ["float32", "bfloat16", "float16", "int8"],
        ),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample the posterior instead of taking its mode.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of --sample.")] = 0,
    tile: TileOption = None,
    groups_per_chunk: GroupsOption = 1,
    compile: CompileOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    start: StartOption = 0.0,
    stop: StopOption = None,
    num_frames: FramesOption = None,
    fps: FpsOption = None,
    resize: ResizeOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode IN to latents in a safetensors file, with what `vcvae decode` needs in its header.

    The frames are counted first, by decoding once, since the file states its size at the beginning. With --shards a whole
    collection goes into webdataset shards, under `accelerate launch` on several processes; a killed run goes on.
    """
    check_place(device, dtype)
    check_range(start, stop, fps)
    parse_tile(tile)
    check_model(model, subfolder)
    if storage is not None and storage not in _STORAGE:
        raise ValueError(f"--storage: {storage!r} is unknown; use {', '.join(_STORAGE)}.")
    part: dict[str, Any] = {"start": start, "stop": stop, "num_frames": num_frames, "fps": fps, "resize": resize}
    if shards is not None:
        from .encode_shards import encode_collection

        how_made = {"tile": tile, "groups_per_chunk": groups_per_chunk, "compile": compile, "dtype": dtype, "device": device}
        how = {"storage": storage, "sample": sample, "seed": seed, "overwrite": overwrite}
        encode_collection(sources, out, shards, model, subfolder, part, how_made, how, as_json)
        return
    jobs = find_jobs(sources, out, overwrite, lambda source: ".safetensors")
    if jobs[0].out.suffix.lower() not in LATENTS:
        raise ValueError(f"OUT: {out} must end in .safetensors.")

    import torch

    from ..coding.latents import encode_file

    vae = load_model(model, subfolder, device, dtype, tile, groups_per_chunk, compile)
    # A file that moves to another folder still names its model.
    place = str(Path(model).resolve()) if model is not None and Path(model).exists() else model
    origin = {"model": place or "bundled", "subfolder": subfolder or ""}

    def work(job: Job) -> dict[str, Any]:
        generator = torch.Generator(vae.device).manual_seed(seed) if sample else None
        with open_input(job.source, groups_per_chunk, **part) as reader, frame_progress("encode") as progress:
            result = encode_file(vae, reader, job.out, origin, generator, seed, progress, storage)
        return {**result, "model": model_name(model, subfolder)}

    def parts(job: Job, result: dict[str, Any]) -> list[Any]:
        facts = {key: result[key] for key in ("frames", "shape", "dtype", "posterior", "model")}
        return [facts_table(facts), files_table({"latents": job.out})]

    run_jobs("encode", jobs, work, parts, as_json)
