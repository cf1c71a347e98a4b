"""From result files to a folder with page, tables and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..evaluation.journal import file_name
from ..evaluation.results import read_result
from ..files import write_whole
from .figures import (
    CURVES,
    SOURCE,
    Crop,
    choose_crop,
    draw_crops,
    draw_curves,
    draw_errors,
    draw_frames,
    load_clips,
    pick_frames,
    save_png,
)
from .page import Picture, Section, describe_models, render_page
from .tables import tables_of


def write_report(
    results: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    paper: Sequence[str] = (),
    crop: Crop | None = None,
    strip_frames: int = 4,
    title: str = "Reconstruction by video autoencoders",
    notes: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write page, tables and figures.

    Args:
        results: result files. Files of one protocol on the same samples share their tables.
        out: the folder, created if missing.
        paper: tables of the paper to show besides those that the protocols name.
        crop: the zoomed square.
        strip_frames: frames in a strip.
        title: of the page.
        notes: paragraphs at its top.
        command: that made it, to be shown on the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: for files that are no results, or models with one label in one table.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        groups = _grouped(results)
        sections = [_section(name, group, out, paper, crop, strip_frames) for name, group in groups.items()]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        files = ", ".join(map(str, results))
        raise ValueError(f"{files}: not what `vcvae evaluate` writes ({error!r}); evaluate again") from error
    today = datetime.now(UTC).date().isoformat()
    lead = [*notes, f"Written {today}" + (f" by: {command}" if command else "")]
    write_whole(out / "index.html", render_page(title, lead, sections))
    return out / "index.html"


def _grouped(results: Sequence[str | os.PathLike]) -> dict[str, dict[str, Any]]:
    """Results by name; those of one protocol on the same samples are one, with the models of all."""
    groups: dict[str, dict[str, Any]] = {}
    keys: dict[str, str] = {}
    for path in map(Path, results):
        result = read_result(path)
        kept = result.get("frames", {"folder": None, "samples": []})
        for entry in result["models"]:
            entry["frames_folder"] = None if kept["folder"] is None else path.parent / kept["folder"]
            entry["frames_of"] = kept["samples"]
        key = json.dumps([result["protocol"], result["samples"]["sha256"]], sort_keys=True)
        if key not in keys:
            name = path.stem if path.stem not in groups else f"{path.stem} ({len(groups) + 1})"
            keys[key] = name
            groups[name] = result
            continue
        found = groups[keys[key]]
        labels = {entry["label"] for entry in found["models"]}
        for entry in result["models"]:
            if entry["label"] in labels:
                raise ValueError(f"{path} has a model {entry['label']!r}, which another result of the same protocol has too")
        found["models"] += result["models"]
    return groups


def _section(
    name: str, result: Mapping[str, Any], out: Path, paper: Sequence[str], crop: Crop | None, strip_frames: int
) -> Section:
    slug, models, protocol = file_name(name), result["models"], result["protocol"]
    tables = tables_of(result, name, paper)
    for number, table in enumerate(tables):
        stem = f"{slug}_table{number + 1}" if len(tables) > 1 else f"{slug}_table"
        forms = {".md": table.to_markdown(), ".tex": table.to_latex(), ".csv": table.to_csv()}
        for suffix, text in forms.items():
            write_whole(out / f"{stem}{suffix}", text)
    skipped = "\n".join(dict.fromkeys(record["skipped"] for entry in models for record in entry["skipped"]))
    details = [
        ("Protocol", json.dumps(protocol, indent=1)),
        ("Models and metrics", describe_models(models)),
        ("Packages", "\n".join(f"{entry['label']}: {json.dumps(entry['packages'])}" for entry in models)),
        (f"Samples ({result['samples']['count']}, sha256 {result['samples']['sha256'][:16]}…)", _samples(result)),
    ]
    if skipped:
        details.append(("Files that could not be used", skipped))
    return Section(
        title=name,
        summary=_summary(protocol, result["samples"]["count"]),
        tables=tables,
        curves=_curves(slug, models, out),
        strips=_strips(slug, result, out, crop, strip_frames),
        warnings=_warnings(models),
        details=details,
    )


def _warnings(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every warning once, with the models it is about unless it is about all."""
    about: dict[str, list[str]] = {}
    for entry in models:
        for warning in entry["warnings"]:
            about.setdefault(warning, []).append(entry["label"])
    return [text if len(labels) == len(models) else f"{', '.join(labels)}: {text}" for text, labels in about.items()]


def _summary(protocol: Mapping[str, Any], count: int) -> str:
    """What was done, from the fields and not from the preset's description, which a changed protocol keeps."""
    frames = "whole videos" if protocol["num_frames"] is None else f"{protocol['num_frames']} frames"
    size = "native size" if protocol["size"] is None else f"{protocol['size']} pixels"
    parts = [f"Protocol {protocol['name']}", f"{count} samples", "images" if protocol["kind"] == "image" else frames, size]
    if protocol["without_first_frame"]:
        parts.append("scored without the first frame")
    return ", ".join(parts) + "."


def _samples(result: Mapping[str, Any]) -> str:
    samples = result["samples"]
    return "\n".join([f"{samples['source']}", *samples["names"]])


def _curves(slug: str, models: Sequence[Mapping[str, Any]], out: Path) -> list[Picture]:
    """All curves, and Fig. 4b where the first frame was scored."""
    present = [m for m in CURVES if any(len(entry["curves"].get(m, [])) > 1 for entry in models)]
    if not present:
        return []
    pictures: list[tuple[str, str, list[str], int | None]] = [
        ("curves", "Metrics by frame index, mean over samples", present, None)
    ]
    if models[0]["first_frame"] and "ssim" in present:
        pictures.append(("fig4b", "SSIM of the first five frames (Fig. 4b)", ["ssim"], 5))
    result = []
    for stem, caption, metrics, frames in pictures:
        path = out / f"{slug}_{stem}.png"
        save_png(draw_curves(models, metrics, frames), path)
        result.append(Picture(path, caption))
    return result


def _strips(
    slug: str, result: Mapping[str, Any], out: Path, crop: Crop | None, strip_frames: int
) -> dict[str, list[Picture]]:
    strips: dict[str, list[Picture]] = {}
    kept = [entry for entry in result["models"] if entry["frames_folder"] is not None]
    first = 1 if result["protocol"]["without_first_frame"] else 0
    for sample in dict.fromkeys(name for entry in kept for name in entry["frames_of"]):
        folders = {entry["label"]: entry["frames_folder"] / file_name(sample) for entry in kept}
        folders = {label: folder for label, folder in folders.items() if (folder / file_name(label)).is_dir()}
        if not folders:
            continue  # the file could not be used, which the section says
        source = next(iter(folders.values())) / SOURCE
        clips = load_clips(sample, source, {label: folder / file_name(label) for label, folder in folders.items()}, first)
        square = choose_crop(clips) if crop is None else crop
        frames = pick_frames(len(clips.source), strip_frames)
        chosen = "where the models differ most" if crop is None else "as given"
        where = f"{square.side} pixels square at ({square.left}, {square.top}), {chosen}"
        drawn = [
            ("frames", f"Frames; the outlined square is {where}", draw_frames(clips, square, frames)),
            ("crops", "The outlined square, enlarged", draw_crops(clips, square, frames)),
            ("errors", "Error maps", draw_errors(clips, frames)),
        ]
        strips[sample] = []
        for stem, caption, image in drawn:
            path = out / f"{slug}_{file_name(sample)}_{stem}.png"
            save_png(image, path)
            strips[sample].append(Picture(path, caption))
    return strips
