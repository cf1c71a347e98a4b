"""`vcvae decode`: latents that `vcvae encode` wrote to video or an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..video import IMAGE_SUFFIXES
from .inputs import Job, find_jobs, run_jobs
from .models import check_model, load_model, model_name
from .options import (
    CompileOption,
    CrfOption,
    DeviceOption,
    DtypeOption,
    GroupsOption,
    JsonOption,
    LosslessOption,
    OverwriteOption,
    SubfolderOption,
    TileOption,
    check_place,
    check_suffix,
    parse_tile,
)
from .printing import files_table, frame_progress


def decode(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="IN", help="Latents that `vcvae encode` wrote: .safetensors, a folder of them, or a shard."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Video, or an image for one frame; a folder for several.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id of the VC-VAE; by default the one that IN names.")
    ] = None,
    subfolder: SubfolderOption = None,
    tile: TileOption = None,
    groups_per_chunk: GroupsOption = 1,
    compile: CompileOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    crf: CrfOption = 16,
    lossless: LosslessOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decode latents to a video or an image, with the frame count, size, rate and timing of what was encoded."""
    check_place(device, dtype)
    parse_tile(tile)
    if model is not None:
        check_model(model, subfolder)
    if len(sources) == 1 and sources[0].suffix == ".tar":
        from ..coding.latent_shards import unpacked

        how = (tile, groups_per_chunk, compile, dtype, device, crf, lossless, overwrite, as_json)
        with unpacked(sources[0]) as folder:
            decode([folder], out, model, subfolder, *how)
        return
    jobs = find_jobs(sources, out, overwrite, lambda source: ".mp4", frozenset({".safetensors"}))
    for job in jobs:
        check_suffix(job.out, image=job.out.suffix.lower() in IMAGE_SUFFIXES)

    from ..coding.latent_file import LatentFile
    from ..coding.latents import check_fit, decode_file

    models: dict[tuple[str | None, str | None], Any] = {}
    settings = {"crf": crf, "codec": "lossless" if lossless else "h264"}

    def work(job: Job) -> dict[str, Any]:
        latents = LatentFile(job.source)
        image = job.out.suffix.lower() in IMAGE_SUFFIXES
        if image and latents.num_frames > 1:
            raise ValueError(
                f"OUT: {job.out} is an image, but {job.source} holds {latents.num_frames} frames; write a video."
            )
        named = (model, subfolder) if model is not None else latents.origin
        if named not in models:
            models.clear()  # one at a time
            models[named] = load_model(*named, device, dtype, tile, groups_per_chunk, compile)
        check_fit(models[named], latents)
        with frame_progress("decode") as progress:
            frames = decode_file(models[named], latents, job.out, image, settings, progress)
        return {
            "input": str(job.source),
            "output": str(job.out),
            "frames": frames,
            "fps": str(latents.fps),
            "width": latents.width,
            "height": latents.height,
            "model": model_name(*named),
        }

    run_jobs("decode", jobs, work, lambda job, result: [files_table({"decoded": job.out})], as_json)
