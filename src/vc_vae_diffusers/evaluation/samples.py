"""Which files are measured, in which order, with one hash for the whole list."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoReader, VideoReadError, find_media, list_lines
from .protocols import Protocol

CHUNK_FRAMES = 8


@dataclass(frozen=True)
class Sample:
    """One file, named by its path below the data folder."""

    name: str
    path: Path

    def seed(self, seed: int) -> int:
        """A seed of its own for this sample, whatever else is measured before it and by which process."""
        return int.from_bytes(hashlib.sha256(f"{seed}:{self.name}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class SampleList:
    """The samples of a run.

    Args:
        root: the data folder.
        samples: in the order of the result file.
        source: the list file, or how the folder was searched.
        sha256: of names and sizes in bytes: two runs with the same hash measured the same files.
    """

    root: Path
    samples: tuple[Sample, ...]
    source: str
    sha256: str


def list_samples(data: str | Path, protocol: Protocol, list_file: str | Path | None = None) -> SampleList:
    """Find the files that a protocol measures.

    Args:
        data: a folder, searched with its subfolders.
        protocol: says whether videos or images are meant, which list the data must have, and how many are taken.
        list_file: a text file with one path a line, relative to `data`; what follows the path (a label) is ignored.

    Raises:
        ValueError: if there is no data, no list, or a listed file is missing.
    """
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"data is {root}, which is not a folder; give the folder that holds the files")
    if list_file is None and protocol.sample_list is not None:
        list_file = _find_list(root, protocol.sample_list)
    if list_file is not None:
        samples, source = _read_list(root, Path(list_file)), f"list {Path(list_file).name}"
    else:
        names = find_media(root, IMAGE_SUFFIXES if protocol.kind == "image" else VIDEO_SUFFIXES)
        samples = [Sample(name, root / name) for name in names]
        source = "all files of the folder, sorted"
    if not samples:
        raise ValueError(
            f"data is {root}, which holds no {'image' if protocol.kind == 'image' else 'video'} that could be read; "
            "give the folder that holds the files"
        )
    if protocol.max_samples is not None and len(samples) > protocol.max_samples:
        if protocol.sample_seed is None:
            samples, source = samples[: protocol.max_samples], f"{source}, the first {protocol.max_samples}"
        else:
            drawn = random.Random(protocol.sample_seed).sample(samples, protocol.max_samples)
            samples = sorted(drawn, key=lambda sample: sample.name)
            source = f"{source}, {protocol.max_samples} drawn with seed {protocol.sample_seed}"
    listing = "".join(f"{sample.name}\t{sample.path.stat().st_size}\n" for sample in samples)
    return SampleList(root, tuple(samples), source, hashlib.sha256(listing.encode()).hexdigest())


def _find_list(root: Path, name: str) -> Path:
    found = sorted([*root.rglob(name), *root.parent.glob(name), *root.parent.glob(f"*/{name}")])
    if not found:
        raise ValueError(
            f"data is {root}, but the protocol needs {name}, which is neither in it nor beside it; put it there, or give a "
            "list of your own"
        )
    return found[0]


def _read_list(root: Path, list_file: Path) -> list[Sample]:
    if not list_file.is_file():
        raise ValueError(f"sample list is {list_file}, which is not a file; give a text file with one path a line")
    samples, seen = [], set()
    for number, line in list_lines(list_file):
        entry = line
        if not (root / entry).is_file():
            entry = entry.split()[0]  # "path label", as UCF-101's train lists have it
        if not (root / entry).is_file():
            raise ValueError(
                f"line {number} of {list_file} is {line!r}, but {root / entry} does not exist; correct the list"
            )
        if entry in seen:
            raise ValueError(f"line {number} of {list_file} names {entry} again; every sample counts once: remove it")
        seen.add(entry)
        samples.append(Sample(entry, root / entry))
    return samples


def open_sample(sample: Sample, protocol: Protocol, size: int | None) -> VideoReader:
    """A reader of the frames that the protocol takes (before `frame_interval`), resized and cropped to `size`."""
    frames = protocol.clip_frames
    return VideoReader(
        sample.path,
        fps=protocol.fps,
        num_frames=None if frames is None else (frames - 1) * protocol.frame_interval + 1,
        resize=size,
        crop=size,
        chunk_frames=CHUNK_FRAMES,
        batch_dim=True,
        threads=1,
    )


def read_chunks(reader: VideoReader, frame_interval: int = 1) -> Iterator[torch.Tensor]:
    """Chunks (1, 3, t, H, W) in [-1, 1] with every `frame_interval`-th frame."""
    seen = 0
    for chunk in reader:
        kept = chunk[:, :, -seen % frame_interval :: frame_interval]
        seen += chunk.shape[2]
        if kept.shape[2]:
            yield kept


def read_clip_frames(sample: Sample, protocol: Protocol, size: int | None, num_frames: int) -> torch.Tensor:
    """The first `num_frames` frames that the protocol takes, (1, 3, T, H, W).

    Raises:
        VideoReadError: if the file cannot be read or is too short.
    """
    with open_sample(sample, protocol, size) as reader:
        clip = torch.cat(list(read_chunks(reader, protocol.frame_interval)), dim=2)
    if clip.shape[2] < num_frames:
        raise VideoReadError(sample.path, f"has {clip.shape[2]} frames, the protocol takes {num_frames}", "Leave it out.")
    return clip[:, :, :num_frames]
