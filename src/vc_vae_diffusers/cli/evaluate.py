"""`vcvae evaluate`: reconstruction by a recorded protocol."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..evaluation.protocols import KINDS_WITH_FRAMES, METRICS, load_protocol, protocol_names
from ..evaluation.results import json_ready
from .options import (
    DTYPES,
    JsonOption,
    MeasuringDtypeOption,
    check_measuring_place,
    check_output,
    choose_device,
    make_folder,
)
from .printing import emit, say

if TYPE_CHECKING:
    from ..evaluation.runner import Progress as ProgressCall

UNITS = {"psnr": "dB", "temporal_difference_psnr": "dB"}


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            help="SOURCE or LABEL=SOURCE, any number of times. A source is a baseline's name (wan2.1, cogvideox, "
            "hunyuanvideo, ltx, mochi, cosmos, flux, sd3.5), vcvae-tiny, original, a folder, a hub id, inflate:IMAGE_VAE "
            "(an untrained VC-VAE), an adapter file (FILE.py or FILE.py:CHECKPOINT), or samples:FOLDER (generated videos)."
        ),
    ],
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of videos or images.")],
    out: Annotated[
        Path,
        typer.Option(help="Result file (JSON). An unfinished run is continued, a finished one extended; never replaced."),
    ],
    protocol: Annotated[
        str,
        typer.Option(
            help="A preset or a YAML file. Presets: " + ", ".join(protocol_names()) + ".", autocompletion=protocol_names
        ),
    ] = "folder",
    samples: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file with one path a line, relative to --data.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated, instead of the protocol's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=0, help="Frames scored per video; 0 for whole videos.")] = None,
    size: Annotated[int | None, typer.Option(min=0, help="Short side and centre crop in pixels; 0 keeps the size.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Take so many samples.")] = None,
    dtype: MeasuringDtypeOption = "float32",
    device: Annotated[str, typer.Option(help="auto (accelerate's choice), cpu, cuda, cuda:N.")] = "auto",
    save_frames: Annotated[int, typer.Option(min=0, help="Keep frames of so many samples, for the report's figures.")] = 0,
    weights: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with the weights of the metrics' networks.")
    ] = None,
    ocr: Annotated[
        Path | None, typer.Option(exists=True, help="TokBench: PARSeq's ONNX file; without it rapidocr stands in.")
    ] = None,
    faces: Annotated[
        Path | None, typer.Option(exists=True, help="TokBench: glintr100.onnx; without it dlib stands in.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Hub token, for gated repositories.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure reconstruction by a recorded protocol. Run it under `accelerate launch` for several processes."""
    check_measuring_place(device, dtype)
    chosen = load_protocol(protocol, _overrides(metrics, num_frames, size, max_samples))
    if save_frames and chosen.kind not in KINDS_WITH_FRAMES:
        raise ValueError(f"--save-frames: {save_frames}, but protocol {chosen.name} keeps no frames; leave it out.")
    check_output(out, overwrite=True, option="--out")
    make_folder(out, "--out")

    import torch

    from ..evaluation import runner
    from ..evaluation.loading import ModelSpec

    if device != "auto":
        choose_device(device)
    specs = [ModelSpec.parse(text) for text in model]
    with _progress() as progress:
        options = runner.RunOptions(
            device=None if device == "auto" else device,
            dtype=getattr(torch, DTYPES[dtype]),
            list_file=samples,
            weights=weights,
            saved_samples=save_frames,
            token=token,
            ocr=ocr,
            faces=faces,
            progress=progress,
        )
        result = runner.run_evaluation(specs, chosen, data, out, options)
    if _is_main():
        emit(summary(result, out), as_json, summary_table(result))
        warnings = [f"{entry['label']}: {warning}" for entry in result["models"] for warning in entry["warnings"]]
        for line in [*warnings, f"Wrote {out}"]:
            say(line)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _overrides(metrics: str | None, num_frames: int | None, size: int | None, max_samples: int | None) -> dict[str, Any]:
    """Fields of the protocol that the options replace; 0 frames or pixels mean all of them."""
    overrides: dict[str, Any] = {}
    if metrics is not None:
        overrides["metrics"] = names = tuple(name.strip() for name in metrics.split(",") if name.strip())
        if unknown := [name for name in names if name not in METRICS]:
            raise ValueError(f"--metrics: {', '.join(unknown)} is unknown; choose among {', '.join(METRICS)}.")
        if not names:
            raise ValueError(f"--metrics: {metrics!r} names none; choose among {', '.join(METRICS)}.")
    if max_samples is not None:
        overrides["max_samples"] = max_samples
    overrides |= {name: value or None for name, value in (("num_frames", num_frames), ("size", size)) if value is not None}
    return overrides


@contextlib.contextmanager
def _progress() -> Iterator[ProgressCall]:
    """One bar a model, of the main process's share of the samples."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not _is_main())) as bars:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done)

        yield update


def summary(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """The averages of a result, for machines."""
    models = {
        entry["label"]: {name: metric["value"] for name, metric in entry["metrics"].items()} for entry in result["models"]
    }
    found = {"command": "evaluate", "out": str(out), "protocol": result["protocol"]["name"], "models": models}
    return json_ready(found)


def summary_table(result: dict[str, Any]) -> Table:
    """The averages of a result, one column a model."""
    names = dict.fromkeys(name for entry in result["models"] for name in entry["metrics"])
    table = Table(title=f"{result['protocol']['name']}, {result['samples']['count']} samples")
    table.add_column("metric", no_wrap=True)
    for entry in result["models"]:
        table.add_column(entry["label"], justify="right", overflow="fold")
    for name in names:
        values = [entry["metrics"].get(name) for entry in result["models"]]
        cells = ("" if value is None else f"{value['value']:.5g}" for value in values)
        table.add_row(f"{name} ({UNITS[name]})" if name in UNITS else name, *cells)
    return table
