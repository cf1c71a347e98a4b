"""Clips for the ablations: training clips that are a function of (seed, step), and the windows that are measured.

Two sources of frames behind one sampler: files that were decoded once to small uint8 frames (`cache_short_side`), mapped
into the memory of every process alike, or video files read as the training goes.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from settings import FOLDER, ClipSettings
from torch.utils.data import DataLoader, Dataset

from vc_vae_diffusers.training.data import find_files, read_list

# Streams of random numbers, so that frames of images and of videos are drawn apart.
IMAGES, VIDEOS = 1, 2
_ZOOM = 1.5  # a training crop covers up to this many times its side, where the frame is large enough


@dataclass(frozen=True)
class Window:
    """A test window: one file, one place in time, one scale."""

    clip: str
    start: float  # part of what the clip leaves free before and behind the window, in [0, 1]
    fps: float
    side: int


def split_clips(data: Path, settings: ClipSettings) -> dict[str, list[str]]:
    """The names of the training, validation and test clips; no clip is in two of them.

    Raises:
        ValueError: if a clip is in two lists, or a list is empty.
    """
    lists = {name: _read(data, getattr(settings, name)) for name in ("train", "validation")}
    if settings.test is None:
        used = {name for part in lists.values() for name in part}
        names = [Path(file).relative_to(data).as_posix() for file in find_files(data)]
        lists["test"] = [name for name in names if name not in used]
    else:
        lists["test"] = _read(data, settings.test)
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = sorted(set(lists[first]) & set(lists[second]))
        if both:
            raise ValueError(f"{both[:3]} are {first} and {second} clips: take them out of one list")
    empty = [name for name, part in lists.items() if not part]
    if empty:
        raise ValueError(f"no {' and no '.join(empty)} clips in {data}: check the lists of the scale")
    return lists


def _read(data: Path, reference: str) -> list[str]:
    file, _, section = reference.partition(":")
    here = FOLDER / file
    return read_list(here if here.is_file() else data / file, section or None)


class Frames:
    """uint8 frames `(3, T, H, W)` and the rate of every clip, from the cache."""

    def __init__(self, cache: Path):
        self._file = safe_open(cache, framework="pt")
        self.fps = {name: Fraction(rate) for name, rate in json.loads(self._file.metadata()["fps"]).items()}
        self._clips: dict[str, torch.Tensor] = {}

    def clip(self, name: str) -> torch.Tensor:
        if name not in self._clips:
            self._clips[name] = self._file.get_tensor(name)
        return self._clips[name]

    def take(self, name: str, frames: int, start: float, fps: float) -> torch.Tensor:
        """`frames` frames at `fps` (every n-th frame, n at least 1), beginning at the part `start` of what is free."""
        clip = self.clip(name)
        stride = max(1, round(float(self.fps[name] / Fraction(fps))))
        stride = max(1, min(stride, (clip.shape[1] - 1) // max(1, frames - 1)))
        free = clip.shape[1] - 1 - stride * (frames - 1)
        if free < 0:
            raise ValueError(f"{name} has {clip.shape[1]} frames, fewer than the {frames} of a window: leave it out")
        first = min(int(start * (free + 1)), free)
        return clip[:, first : first + stride * (frames - 1) + 1 : stride]


class Files:
    """The same from video files, decoded at every call."""

    def __init__(self, data: Path):
        self.data = data

    def take(self, name: str, frames: int, start: float, fps: float) -> torch.Tensor:
        from vc_vae_diffusers.video import probe, read_clip

        info = probe(self.data / name)
        rate = min(Fraction(fps), info.fps)
        free = max(Fraction(0), info.duration - (frames - 1) / rate - 1 / info.fps)
        begin = int(start * float(free * info.fps)) / info.fps
        wanted = rate if rate < info.fps else None
        return read_clip(self.data / name, num_frames=frames, start_time=begin, fps=wanted, dtype=torch.uint8)


def open_frames(data: Path, work: Path, settings: ClipSettings) -> Frames | Files:
    """The source of frames; the cache is made where it is missing, by the first process that asks."""
    if settings.cache_short_side is None:
        return Files(data)
    work.mkdir(parents=True, exist_ok=True)
    cache = work / f"clips-{settings.cache_short_side}.safetensors"
    with open(cache.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cache.exists():
            _pack(data, cache, settings)
    return Frames(cache)


def _pack(data: Path, cache: Path, settings: ClipSettings) -> None:
    from vc_vae_diffusers.video import VideoReader

    clips, rates = {}, {}
    for name in sorted(name for part in split_clips(data, settings).values() for name in part):
        with VideoReader(data / name, resize=settings.cache_short_side, dtype=torch.uint8, threads=1) as reader:
            clips[name] = torch.cat(list(reader), dim=1).contiguous()
            rates[name] = str(reader.fps)
    partial = cache.with_suffix(".partial")
    save_file(clips, partial, {"fps": json.dumps(rates)})
    partial.replace(cache)


def crop(frames: torch.Tensor, size: int, numbers: np.ndarray) -> torch.Tensor:
    """A random crop of uint8 `(3, T, H, W)`, resized to `size`, mirrored half of the time, in [-1, 1].

    Args:
        numbers: four numbers in [0, 1): scale (log-uniform up to `_ZOOM`, or the whole short side), top, left, mirror.
    """
    height, width = frames.shape[-2:]
    largest = min(height, width) / size
    limit = largest if largest > 2 else min(_ZOOM, largest)
    side = min(round(size * limit ** numbers[0]), height, width)
    top, left = int(numbers[1] * (height - side + 1)), int(numbers[2] * (width - side + 1))
    clip = frames[..., top : top + side, left : left + side].float().div(127.5).sub(1)
    if side != size:
        clip = F.interpolate(clip.transpose(0, 1), (size, size), mode="bilinear", antialias=True).transpose(0, 1)
    return (clip.flip(-1) if numbers[3] < 0.5 else clip).contiguous()


class TrainingClips(Dataset):
    """Item `step` is the batch of that step, `(B, 3, T, size, size)`: a function of seed and step alone."""

    def __init__(
        self,
        source: Frames | Files,
        names: list[str],
        settings: ClipSettings,
        seed: int,
        stream: int,
        frames: int,
        batch: int,
    ):
        self.source, self.names, self.settings = source, names, settings
        self.seed, self.stream, self.frames, self.batch = seed, stream, frames, batch

    def __getitem__(self, step: int) -> torch.Tensor:
        clips = []
        for index in range(self.batch):
            rng = np.random.default_rng([self.seed, self.stream, step, index])
            name = self.names[rng.integers(len(self.names))]
            fps = self.settings.fps[rng.integers(len(self.settings.fps))]
            numbers = rng.random(5)
            clips.append(crop(self.source.take(name, self.frames, numbers[4], fps), self.settings.size, numbers))
        return torch.stack(clips)

    def batches(self, first: int, last: int, workers: int) -> DataLoader:
        """The batches of steps `first` to `last` - 1, in order."""
        return DataLoader(self, batch_size=None, sampler=range(first, last), num_workers=workers)


def test_windows(names: list[str], settings: ClipSettings) -> list[list[Window]]:
    """The windows of every clip, early ones first: one for every rate of the settings."""
    count = len(settings.window_fps)
    starts = [(index + 0.5) / count for index in range(count)]
    return [
        [Window(name, *w) for w in zip(starts, settings.window_fps, settings.window_side, strict=True)] for name in names
    ]


def window_frames(source: Frames | Files, window: Window, settings: ClipSettings, frames: int) -> torch.Tensor:
    """The frames of a window, `(1, 3, frames, size, size)` in [-1, 1]: short side to `side`, centre crop."""
    from vc_vae_diffusers.video import from_uint8, resize_and_crop

    clip = source.take(window.clip, frames, window.start, window.fps)
    return from_uint8(resize_and_crop(clip, window.side, settings.size))[None]
