"""What IN and OUT mean: one video, image, folder of images or pattern; or many videos, whose results go into a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, WRITABLE_VIDEO_SUFFIXES
from .options import check_distinct, check_output, check_suffix, make_folder
from .printing import emit, warn

if TYPE_CHECKING:
    from ..video import VideoReader


@dataclass(frozen=True)
class Job:
    """One input and where its results go; `alone` if it is the only one, named as such."""

    source: Path
    out: Path
    compare: Path | None = None
    alone: bool = True


def is_image(source: Path) -> bool:
    """Whether an input is a single image, as the reader sees it."""
    return source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES


def find_jobs(
    sources: Sequence[Path],
    out: Path,
    overwrite: bool,
    out_suffix: Callable[[Path], str],
    files: frozenset[str] = VIDEO_SUFFIXES,
    compare: Path | None = None,
) -> list[Job]:
    """What is to be done, checked before any work: no output exists, is an input or is written twice.

    Args:
        sources: as typed.
        out: as typed: a file for one input, a folder for several.
        overwrite: whether outputs may exist.
        out_suffix: the suffix of an input's result in a folder.
        files: suffixes of what is taken from a folder.
        compare: a second output, which follows the same rule.

    Raises:
        ValueError: naming IN, OUT or --compare.
    """
    found = [expanded for source in sources for expanded in _expand(source, files)]
    several = found != list(sources) or len(found) > 1
    if several:
        names_of_files = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {out_suffix(source) for source in found}
        for option, path in (("OUT", out), ("--compare", compare)):
            if path is not None and (path.is_file() or path.suffix.lower() in names_of_files):
                raise ValueError(f"{option}: {path} is a file name, but IN is {len(found)} files; pass a folder.")
    jobs = []
    for source in found:
        name = f"{source.stem if source.is_file() else Path(os.path.realpath(source)).name}{out_suffix(source)}"
        inside = several or out.is_dir()
        pair = compare / name if compare is not None and (several or compare.is_dir()) else compare
        jobs.append(Job(source, out / name if inside else out, pair, alone=not several))
    outputs: dict[Path, Path] = {}
    for job in jobs:
        if (other := outputs.setdefault(job.out, job.source)) != job.source:
            raise ValueError(f"IN: {other} and {job.source} would both become {job.out}; do them one by one.")
        check_distinct(IN=job.source, OUT=job.out, **{"--compare": job.compare})
        check_output(job.out, overwrite)
        if job.compare is not None:
            check_output(job.compare, overwrite, "--compare")
    return jobs


def _expand(source: Path, files: frozenset[str]) -> list[Path]:
    """The files that a folder or a quoted pattern means; images in them are one video and stay together."""
    if source.is_dir():
        names = sorted((path for path in source.iterdir() if not path.name.startswith(".")), key=_natural)
        taken = [path for path in names if path.is_file() and path.suffix.lower() in files]
        images = [path for path in names if path.suffix.lower() in IMAGE_SUFFIXES]
        if taken and images:
            raise ValueError(
                f"IN: {source} holds {len(taken)} videos and {len(images)} images; name what is meant, e.g. "
                f"{source / ('*' + taken[0].suffix)}"
            )
        if not taken and any(path.suffix == ".tar" for path in names):
            raise ValueError(f"IN: {source} holds shards; decode them one by one, as {source / '….tar'}.")
        if not taken and not images:
            kinds = " or ".join([*([", ".join(sorted(files))] if files else []), "images"])
            raise ValueError(f"IN: {source} is a folder without {kinds}; check the path.")
        return taken or [source]
    if not source.exists() and glob.has_magic(os.fspath(source)):
        matches = sorted((Path(name) for name in glob.glob(os.fspath(source))), key=_natural)
        if not matches:
            raise ValueError(f"IN: {source} matches no file; check the pattern.")
        return [source] if all(path.suffix.lower() in IMAGE_SUFFIXES for path in matches) else matches
    if re.match(r"(https?|ftp|s3|gs):/", os.fspath(source)):
        address = os.fspath(source).replace(":/", "://", 1)  # a path has no two slashes
        raise ValueError(f"IN: {address} is an address, and only files are read; download it, and give its path.")
    if not source.exists() and not re.search(r"%0?\d*d", source.name):
        raise ValueError(f"IN: {source} does not exist; check the path.")
    return [source]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order by the numbers in names, not by their digits."""
    return [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def video_suffix(source: Path) -> str:
    """What a result is written as where only a folder was given: the input's own suffix if that can be written."""
    own = source.suffix.lower()
    if is_image(source):
        return own if own in IMAGE_SUFFIXES else ".png"
    return own if own in WRITABLE_VIDEO_SUFFIXES else ".mp4"


def check_suffixes(jobs: Sequence[Job]) -> None:
    """Raises ValueError where an output's suffix does not fit its input."""
    for job in jobs:
        check_suffix(job.out, image=is_image(job.source))
        if job.compare is not None:
            check_suffix(job.compare, image=is_image(job.source), option="--compare")


def run_jobs(
    command: str,
    jobs: Sequence[Job],
    work: Callable[[Job], dict[str, Any]],
    parts: Callable[[Job, dict[str, Any]], list[Any]],
    as_json: bool,
) -> None:
    """Do the jobs in order and print what they give. Of several, one that fails is reported and the others are done.

    Args:
        command: its name, for machines.
        jobs: at least one.
        work: does one and returns its facts.
        parts: tables and lines about it, for people.
        as_json: print one object: the facts of the only job, or of all with those that failed.

    Raises:
        typer.Exit: with code 1 if one of several failed.
    """
    from ..video import VideoWriteError

    for job in jobs:
        make_folder(job.out)
        if job.compare is not None:
            make_folder(job.compare, "--compare")
    results, failed = [], []
    for job in jobs:
        try:
            result = {"command": command, **work(job)}
        except (ValueError, OSError, VideoWriteError) as error:
            if job.alone:
                raise
            warn(f"{job.source} was left out: {error}")
            failed.append({"input": str(job.source), "message": str(error)})
            continue
        results.append(result)
        if not as_json:
            emit(result, False, *parts(job, result))
    if as_json:
        emit(results[0] if jobs[0].alone else {"command": command, "results": results, "failed": failed}, True)
    if failed:
        raise typer.Exit(1)


def open_input(
    source: Path,
    groups_per_chunk: int = 1,
    *,
    start: float = 0.0,
    stop: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    resize: int | None = None,
) -> VideoReader:
    """A reader of an input, by the options of the command line; chunks serve several steps of the model."""
    from ..video import VideoReader

    return VideoReader(
        source,
        start_time=start or None,
        stop_time=stop,
        num_frames=num_frames,
        fps=fps,
        resize=resize,
        batch_dim=True,
        chunk_frames=8 * groups_per_chunk,
    )
