"""`vcvae reconstruct`: videos or images through the model and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import Job, check_suffixes, find_jobs, is_image, open_input, run_jobs, video_suffix
from .models import check_model, load_model, model_name
from .options import (
    CompileOption,
    CrfOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    FramesOption,
    GroupsOption,
    JsonOption,
    LosslessOption,
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
from .printing import files_table, frame_progress


def reconstruct(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IN", help="Video, image, folder of images or pattern; or several videos.")
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Video (.mp4 .m4v .mov .mkv .webm .gif), image if IN is one; folder for several."
        ),
    ],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Also write source and reconstruction side by side to this file.")
    ] = None,
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
    audio: Annotated[
        bool, typer.Option("--audio", help="Copy the input's audio to the output, without re-encoding.")
    ] = False,
    crf: CrfOption = 16,
    lossless: LosslessOption = False,
    metrics: Annotated[bool, typer.Option("--metrics/--no-metrics", help="Measure PSNR and SSIM.")] = True,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode and decode IN with the model, write the result to OUT, print PSNR and SSIM by frame range.

    Streams from file to file: memory does not grow with the length of the video. Frame count, size and rate are kept. A
    folder of videos, or several videos, go into the folder OUT one by one.
    """
    check_place(device, dtype)
    check_range(start, stop, fps)
    parse_tile(tile)
    check_model(model, subfolder)
    jobs = find_jobs(sources, out, overwrite, video_suffix, compare=compare)
    check_suffixes(jobs)

    from ..coding.reconstruction import reconstruct_file
    from .quality import quality_table, summary_line

    vae = load_model(model, subfolder, device, dtype, tile, groups_per_chunk, compile)
    part: dict[str, Any] = {"start": start, "stop": stop, "num_frames": num_frames, "fps": fps, "resize": resize}
    output: dict[str, Any] = {"crf": crf, "lossless": lossless, "with_metrics": metrics}

    def work(job: Job) -> dict[str, Any]:
        with open_input(job.source, groups_per_chunk, **part) as reader:
            span = _audio_range(reader, start, stop, num_frames) if audio else None
            with frame_progress("reconstruct") as progress:
                result = reconstruct_file(vae, reader, job.out, job.compare, audio_range=span, progress=progress, **output)
        return {"model": model_name(model, subfolder), **result}

    def parts(job: Job, result: dict[str, Any]) -> list[Any]:
        files = {"reconstruction": job.out}
        if job.compare is not None:
            files["comparison" if is_image(job.source) else "side by side"] = job.compare
        return [summary_line(result), *([quality_table(result)] if metrics else []), files_table(files)]

    run_jobs("reconstruct", jobs, work, parts, as_json)


def _audio_range(reader: Any, start: float, stop: float | None, num_frames: int | None) -> tuple[float, float | None]:
    """The seconds whose audio belongs to the frames that are read.

    Raises:
        ValueError: if there is no audio.
    """
    if not reader.info.has_audio:
        raise ValueError(f"--audio: {reader.info.path} has no audio; leave the option out.")
    ends = [stop, None if num_frames is None else start + num_frames / float(reader.fps)]
    return start, min((end for end in ends if end is not None), default=None)
