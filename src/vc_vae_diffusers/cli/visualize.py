"""`vcvae visualize`: what a TDC layer sees (Fig. 5)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..video.suffixes import VIDEO_SUFFIXES
from .inputs import find_jobs, open_input
from .models import check_model, load_model
from .options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    ResizeOption,
    StartOption,
    SubfolderOption,
    check_place,
    check_suffix,
    make_folder,
)
from .printing import emit, files_table

if TYPE_CHECKING:
    import torch

    from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
    from ..video import VideoReader


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
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw what a TDC layer sees: the anchor's term and those of the differences (Fig. 5)."""
    check_place(device, "float32")
    check_model(model, subfolder)
    if source.is_dir() and (videos := [path for path in source.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES]):
        raise ValueError(f"IN: {source} holds {len(videos)} videos, but one clip is drawn at a time; name one of them.")
    [job] = find_jobs([source], out, overwrite, lambda source: ".png", frozenset())
    check_suffix(job.out, image=True)

    import numpy as np
    import torch

    from ..report.visualize import draw_components, tdc_components, tdc_layers
    from ..video import write_image

    vae = load_model(model, subfolder, device, "float32")
    layers = tdc_layers(vae)
    if not layers or (layer is not None and layer not in layers):
        some = f"use one of its {len(layers)}, for example {', '.join(layers[:4])}" if layers else "it has none at all"
        raise ValueError(f"--layer: {layer or 'by default'} names no group causal TDC of this model; {some}.")
    with open_input(job.source, start=start, num_frames=num_frames, resize=resize) as reader:
        video = _whole_groups(vae, reader, start)
    default = next((name for name in layers if name.startswith("encoder.down_blocks.1.")), layers[0])
    components = tdc_components(vae, video, layer or default)
    shown = list(range(video.shape[2]))[-rows:]
    drawing = draw_components(components, shown)
    make_folder(job.out)
    write_image(job.out, torch.from_numpy(np.array(drawing)).permute(2, 0, 1))
    share = components.motion_share()
    result = {
        "command": "visualize",
        "layer": components.layer,
        "frames": shown,
        "motion_share": share,
        "output": str(job.out),
    }
    emit(result, as_json, f"{components.layer}: {share:.1%} of the activity is motion", files_table({"drawing": job.out}))


def _whole_groups(vae: AutoencoderKLVCVAE, reader: VideoReader, start: float) -> torch.Tensor:
    """What the reader gives, cropped to whole groups and to the model's sizes, on its device.

    Raises:
        ValueError: if there is no whole group.
    """
    import torch

    ratio, group = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    video = torch.cat(list(reader), dim=2)
    frames = video.shape[2] // group * group
    if frames == 0:
        raise ValueError(
            f"IN has {video.shape[2]} frames from second {start:g} on, a group has {group}: choose an earlier --start"
        )
    height, width = (side // ratio * ratio for side in video.shape[3:])
    if not height or not width:
        size = f"{video.shape[4]}x{video.shape[3]}"
        raise ValueError(f"IN: its frames are {size} pixels, a model needs {ratio}x{ratio}: choose a larger --resize")
    return video[:, :, :frames, :height, :width].to(vae.device)
