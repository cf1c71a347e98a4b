"""Training clips: which files there are, and how clips of them are read.

A :class:`ClipDataset` reads the clips that a plan (:mod:`.clip_plan`) asks for from files. Shards of a million clips are
streamed by :mod:`vc_vae_diffusers.training.shards`.
"""

from __future__ import annotations

import bisect
import csv
import fnmatch
import itertools
import logging
import math
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ..hardware import usable_processors
from ..video import (
    IMAGE_SUFFIXES,
    TIME_TOLERANCE,
    VideoInfo,
    VideoReader,
    VideoReadError,
    find_media,
    from_uint8,
    is_media_name,
    list_lines,
    probe,
    read_clip,
)
from .clip_plan import STREAM_CLIP, STREAM_EPOCH, STREAM_FILE, Bucket, ClipRequest, counter_rng, noise_seed

logger = logging.getLogger(__name__)


# Candidates that are tried for one clip before the run stops.
MAX_ATTEMPTS = 100


class DataError(RuntimeError):
    """The data cannot serve the run: nothing found, mostly unreadable, or no clip fits a bucket."""


# ------------------------------------------------------------------------------------------------------------ files


def read_list(path: str | Path, section: str | None = None) -> list[str]:
    """Read the entries of a list file, of one ``[section]`` if named.

    A text file holds one entry a line, as :func:`vc_vae_diffusers.video.list_lines` reads them, and ``[name]`` starts a
    section. A ``.csv`` file needs a column ``file``, ``path`` or ``video``; ``section`` then selects by its column
    ``split``.

    Raises:
        ValueError: for a missing section or column.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, section)
    entries: dict[str | None, list[str]] = {None: []}
    current = None
    for _, line in list_lines(path):
        if line.startswith("[") and line.endswith("]"):
            current = line[1:-1].strip()
            entries.setdefault(current, [])
        else:
            entries[current].append(line)
    if section is None:
        return [entry for part in entries.values() for entry in part]
    if section not in entries:
        known = sorted(name for name in entries if name is not None)
        raise ValueError(f"{path}: no section [{section}]; it has {known}")
    return entries[section]


def _read_csv(path: Path, section: str | None) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        column = next((name for name in ("file", "path", "video") if name in columns), None)
        if column is None or (section is not None and "split" not in columns):
            raise ValueError(f"{path}: columns {columns}; needed are file, path or video, and split for {section!r}")
        return [row[column] for row in reader if section is None or row["split"] == section]


def expand_patterns(patterns: Sequence[str], base: str | Path = ".") -> list[str]:
    """Replace every ``@FILE`` or ``@FILE:SECTION`` by the entries of that list; ``base`` is what FILE is relative to."""
    expanded = []
    for pattern in patterns:
        if pattern.startswith("@"):
            file, _, section = pattern[1:].partition(":")
            expanded += read_list(Path(base) / file, section or None)
        else:
            expanded.append(pattern)
    return expanded


def find_files(data: str | Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """List one video, or videos and images of a folder (searched recursively) or of a list file (:func:`read_list`), sorted.

    Entries of a list file are relative to its folder. ``include`` and ``exclude`` are shell patterns on the path below
    that folder; without ``include`` everything counts. A pattern without wildcards that names no file is an error, so
    that a hold-out list with a spelling mistake does not leak into training.

    Raises:
        DataError: if nothing is found, or a named file is not there.
    """
    data = Path(data)
    if data.is_dir():
        root, names = data, find_media(data)
    elif data.is_file():
        root = data.parent
        names = [data.name] if is_media_name(data.name) else sorted(set(read_list(data)))
    else:
        raise DataError(f"data={str(data)!r} is neither a folder, a video nor a list file; check the path")
    known = set(names)
    for pattern in [*include, *exclude]:
        if not _is_wildcard(pattern) and pattern not in known:
            raise DataError(f"{pattern!r} is named by include, exclude or holdout, but is not in {str(data)!r}")
    included, excluded = NameMatcher(include), NameMatcher(exclude)
    kept = [name for name in names if (not include or included(name)) and not excluded(name)]
    if not kept:
        raise DataError(f"no video or image in {str(data)!r} ({len(known)} files before include and exclude)")
    return [str(root / name) for name in kept]


def _is_wildcard(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def distinct_names(files: Sequence[str]) -> list[str]:
    """Return a name for each file, to name others after: its stem, or its path where two files have the same stem."""
    stems = Counter(Path(file).stem for file in files)
    root = os.path.commonpath([os.path.dirname(file) or "." for file in files]) if files else "."

    def name(file: str) -> str:
        path = Path(file)
        return path.stem if stems[path.stem] == 1 else os.path.relpath(file, root).replace(os.sep, "_").replace(".", "_")

    names = [name(file) for file in files]
    # "a_b/c" and "a/b_c" could still meet.
    return names if len(set(names)) == len(names) else [f"{index:05d}_{name}" for index, name in enumerate(names)]


class NameMatcher:
    """Whether a name is in a list of names and shell patterns; names are looked up, for lists of any length."""

    def __init__(self, patterns: Sequence[str]):
        self._names = set(patterns)
        self._wildcards = [pattern for pattern in patterns if _is_wildcard(pattern)]

    def __call__(self, name: str) -> bool:
        return name in self._names or any(fnmatch.fnmatchcase(name, pattern) for pattern in self._wildcards)


# ------------------------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class Skip:
    """A file that was passed over: ``unreadable`` if it is broken, else because it does not fit the bucket."""

    path: str
    reason: str
    unreadable: bool

    @classmethod
    def of(cls, path: str, error: Exception) -> Skip:
        """What ``error`` says about the file."""
        if isinstance(error, UnsuitableError):
            return cls(path, f"{path} {error}", unreadable=False)
        return cls(path, str(error), unreadable=True)


# Decodes ``num_frames`` frames of a file from a start in seconds, resampled to a rate or not: (3, T, H, W) uint8.
FrameReader = Callable[[VideoInfo, int, Fraction, Fraction | None], torch.Tensor]


def _read_file(info: VideoInfo, num_frames: int, start: Fraction, rate: Fraction | None) -> torch.Tensor:
    options: dict[str, Any] = {} if info.kind == "image" else {"start_time": start, "fps": rate}
    return read_clip(info.path, num_frames=num_frames, dtype=torch.uint8, **options)


class UnsuitableError(ValueError):
    """A sound file that is too small or too short for a bucket."""


@dataclass(frozen=True)
class ClipReader:
    """Reads random clips: ``scale_jitter`` in [0, 1] and ``flip`` as in :class:`ClipDataset`."""

    scale_jitter: float = 0.0
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.scale_jitter <= 1:
            raise ValueError(f"scale_jitter={self.scale_jitter} must lie in [0, 1]")

    def clip(
        self, info: VideoInfo, bucket: Bucket, uniform: Sequence[float] | np.ndarray, read: FrameReader | None = None
    ) -> tuple[torch.Tensor, Fraction]:
        """Read one clip of a file.

        Args:
            info: of the file.
            bucket: the shape wanted.
            uniform: five numbers in [0, 1): scale, top, left, flip, start.
            read: what decodes the frames, from the file by default.

        Returns:
            the clip (3, T, H, W) in [-1, 1] and its start in seconds.

        Raises:
            UnsuitableError: if the file is too small or too short.
            VideoReadError: if it is broken.
        """
        reason = self.unsuitable(info, bucket)
        if reason is not None:
            raise UnsuitableError(reason)
        start = self.start(info, bucket, uniform[4])
        frames = (read or _read_file)(info, bucket.num_frames, start, self.rate(info, bucket))
        return self.cut(frames, bucket, uniform), start

    def unsuitable(self, info: VideoInfo, bucket: Bucket) -> str | None:
        """Return why the file cannot serve ``bucket``, or None."""
        if info.height < bucket.height or info.width < bucket.width:
            return f"is {info.height}x{info.width} (height x width), smaller than {bucket.height}x{bucket.width}"
        if bucket.num_frames == 1:
            return None
        if info.kind == "image":
            return "is an image"
        if info.duration is None:
            return "does not state its duration"
        if info.duration < self._span(info, bucket):
            return f"lasts {float(info.duration):.2f} s, shorter than {float(self._span(info, bucket)):.2f} s"
        return None

    def rate(self, info: VideoInfo, bucket: Bucket) -> Fraction | None:
        """Return the rate to resample to; None keeps every frame. A slower video keeps its own: repeats teach nothing."""
        wanted = Fraction(bucket.fps)
        return wanted if 0 < wanted < info.fps else None

    def _span(self, info: VideoInfo, bucket: Bucket) -> Fraction:
        return (bucket.num_frames - 1) / (self.rate(info, bucket) or info.fps) + 1 / info.fps

    def start(self, info: VideoInfo, bucket: Bucket, uniform: float) -> Fraction:
        """Return the start in seconds: a frame of the source, such that the clip fits."""
        if info.duration is None or info.kind == "image":
            return Fraction(0)
        room = max(info.duration - self._span(info, bucket), Fraction(0))
        return math.floor(uniform * (int(room * info.fps) + 1)) / info.fps

    def cut(self, frames: torch.Tensor, bucket: Bucket, uniform: Sequence[float] | np.ndarray) -> torch.Tensor:
        """Crop (3, T, H, W) uint8 at random, resize to the bucket, flip, convert to [-1, 1].

        The window is ``s`` times the bucket's size, ``s`` log-uniform between the largest that fits and that to the
        power of ``1 - scale_jitter``. Antialiased bilinear resizing.
        """
        height, width = frames.shape[-2:]
        largest = min(height / bucket.height, width / bucket.width)
        scale = largest ** (1 - self.scale_jitter * uniform[0])
        rows, columns = (min(round(side * scale), most) for side, most in ((bucket.height, height), (bucket.width, width)))
        top, left = round(uniform[1] * (height - rows)), round(uniform[2] * (width - columns))
        # Contiguous, because interpolate rounds differently for other strides, as decoded and cached frames have.
        clip = from_uint8(frames[..., top : top + rows, left : left + columns].contiguous())
        if (rows, columns) != (bucket.height, bucket.width):
            size = (bucket.height, bucket.width)
            clip = F.interpolate(clip.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)
        return (clip.flip(-1) if self.flip and uniform[3] < 0.5 else clip).contiguous()


class ClipDataset(Dataset[dict]):
    """Reads the clip that a :class:`ClipRequest` asks for; use with :class:`ClipBatchSampler` and :func:`collate`.

    Every bucket goes through all files in an order of its own, shuffled anew each epoch. Buckets of one frame take
    images and frames of videos, others videos only. A file that cannot be read, or is too small or too short for the
    bucket, is reported in the item's ``skipped`` and the next candidate (again a function of the request) is tried.

    Args:
        files: paths of videos and images.
        buckets: those of the plan.
        seed: that of the plan.
        scale_jitter: 0 crops from the whole short side; 1 from anything down to native pixels, log-uniform between.
        flip: mirror half of the clips.
        cache_in_memory: keep every file's frames as uint8 once decoded; per loader worker.
        cache_short_side: shrink frames to this short side for the cache.

    Raises:
        DataError: from ``[]``, if 100 candidates in a row do not serve.
    """

    def __init__(
        self,
        files: Sequence[str],
        buckets: Sequence[Bucket],
        seed: int,
        *,
        scale_jitter: float = 0.0,
        flip: bool = True,
        cache_in_memory: bool = False,
        cache_short_side: int | None = None,
    ):
        largest = max(max(bucket.height, bucket.width) for bucket in buckets)
        if cache_short_side is not None and cache_short_side < largest:
            raise ValueError(f"cache_short_side={cache_short_side} must be at least {largest}, the largest bucket's side")
        self.buckets, self.seed = list(buckets), seed
        self.reader = ClipReader(scale_jitter, flip)
        self.cache_in_memory, self.cache_short_side = cache_in_memory, cache_short_side
        self._all = list(files)
        self._videos = [file for file in files if Path(file).suffix.lower() not in IMAGE_SUFFIXES]
        if not self._videos and any(bucket.num_frames > 1 for bucket in buckets):
            raise DataError("there are only images, but buckets of more than one frame; name videos, or take frames=1")
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._infos: dict[str, VideoInfo] = {}
        self._cache: dict[str, tuple[torch.Tensor, list[Fraction]]] = {}

    def __getitem__(self, request: ClipRequest) -> dict:
        bucket = self.buckets[request.bucket_index]
        skipped: list[Skip] = []
        for attempt in range(MAX_ATTEMPTS):
            path = self._candidate(request, attempt)
            try:
                uniform = clip_numbers(self.seed, request, attempt)
                read = self._read_cached if self.cache_in_memory else None
                clip, start = self.reader.clip(self._info(path), bucket, uniform, read)
            except (VideoReadError, UnsuitableError) as error:
                skipped.append(Skip.of(path, error))
            else:
                return clip_item(clip, f"{path} from {float(start):.3f} s", bucket, self.seed, request, skipped)
        raise no_candidate(bucket, skipped)

    def _candidate(self, request: ClipRequest, attempt: int) -> str:
        index, ordinal = request.bucket_index, request.ordinal
        pool = self._all if self.buckets[index].num_frames == 1 else self._videos
        if attempt > 0:
            return pool[counter_rng(self.seed, STREAM_FILE, index, ordinal, attempt).integers(len(pool))]
        epoch, place = divmod(ordinal, len(pool))
        if index not in self._orders or self._orders[index][0] != epoch:
            order = counter_rng(self.seed, STREAM_EPOCH, index, epoch).permutation(len(pool))
            self._orders[index] = (epoch, order)
        return pool[self._orders[index][1][place]]

    def _info(self, path: str) -> VideoInfo:
        if path not in self._infos:
            self._infos[path] = probe(path)
        return self._infos[path]

    def _read_cached(self, info: VideoInfo, num_frames: int, start: Fraction, rate: Fraction | None) -> torch.Tensor:
        frames, times = self._decoded(info)
        moments = [start + k / (rate or info.fps) for k in range(num_frames)]
        indices = _on_screen(times, 1 / info.fps, moments)
        if rate is None:
            indices = list(range(indices[0], indices[0] + num_frames))
        if indices[-1] >= len(times) or moments[-1] >= times[-1] + 1 / info.fps:
            problem = f"ends at {float(times[-1]):.3f} s, before the clip from {float(start):.3f} s does"
            raise VideoReadError(info.path, problem, "Its header states another duration; remux it.")
        return frames[:, indices]

    def _decoded(self, info: VideoInfo) -> tuple[torch.Tensor, list[Fraction]]:
        if info.path not in self._cache:
            short = self.cache_short_side
            resize = short if short is not None and short < min(info.height, info.width) else None
            with VideoReader(info.path, resize=resize, dtype=torch.uint8, threads=1) as reader:
                chunks, times = zip(*reader.timed_chunks(), strict=True)
            self._cache[info.path] = (torch.cat(chunks, dim=1), [time for part in times for time in part])
        return self._cache[info.path]


def clip_numbers(seed: int, request: ClipRequest, attempt: int) -> np.ndarray:
    """The five random numbers of :meth:`ClipReader.clip` for the ``attempt``-th candidate of a request."""
    return counter_rng(seed, STREAM_CLIP, request.bucket_index, request.ordinal, attempt).random(5)


def clip_item(clip: torch.Tensor, name: str, bucket: Bucket, seed: int, request: ClipRequest, skipped: list[Skip]) -> dict:
    """What a dataset returns for one request, for :func:`collate`."""
    return {
        "video": clip,
        "clip": name,
        "bucket": bucket,
        "noise_seed": noise_seed(seed, request.bucket_index, request.ordinal),
        "skipped": skipped,
    }


def no_candidate(bucket: Bucket, skipped: Sequence[Skip]) -> DataError:
    """The error for a bucket that nothing serves."""
    told = [reason for reason, _ in Counter(skip.reason for skip in skipped).most_common(3)]
    if not all(skip.unreadable for skip in skipped):
        told.append("give --buckets with fewer or smaller frames, or other videos")
    return DataError(f"none of {len(skipped)} files in a row serves bucket {bucket}: {'; '.join(told)}")


def _on_screen(times: Sequence[Fraction], period: Fraction, moments: Sequence[Fraction]) -> list[int]:
    """Return which of the frames shown from ``times`` on is on screen at each moment, by :class:`VideoReader`'s rule.

    In fractions, because ties are common (30 to 24 fps).
    """
    takeovers = [after - TIME_TOLERANCE * min(period, after - before) for before, after in itertools.pairwise(times)]
    return [bisect.bisect_right(takeovers, moment) for moment in moments]


def collate(items: Sequence[dict]) -> dict:
    """Stack clips of one bucket: ``video`` (B, 3, T, H, W), lists ``clips``, ``noise_seeds`` and ``skipped``."""
    return {
        "video": torch.stack([item["video"] for item in items]),
        "bucket": items[0]["bucket"],
        "clips": [item["clip"] for item in items],
        "noise_seeds": [item["noise_seed"] for item in items],
        "skipped": [skip for item in items for skip in item["skipped"]],
    }


def as_is(batch: dict) -> dict:
    """``collate_fn`` for a loader whose dataset yields whole batches."""
    return batch


def quiet_worker(worker_id: int) -> None:
    """Let the main process alone answer Ctrl-C (``worker_init_fn`` of a DataLoader)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def clip_loader(dataset: Dataset, num_workers: int, device: torch.device, **options) -> DataLoader:
    """A DataLoader that starts without a draw from the random state that a checkpoint restored."""
    if num_workers > (processors := usable_processors()):
        logger.warning("--num_workers is %d, more than the processors (%d): fewer are as fast", num_workers, processors)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the same, twice and longer
    return DataLoader(
        dataset,
        num_workers=num_workers,
        worker_init_fn=quiet_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        **options,
    )


class ReadHealth:
    """Counts what was read and what was passed over, logs each reason once, and stops a run that mostly fails to read."""

    _MIN_FILES = 20

    def __init__(self, max_unreadable: float):
        self.max_unreadable = max_unreadable
        self.read = self.unreadable = self.unsuitable = 0
        self._seen: set[str] = set()

    def add(self, batch: dict) -> None:
        """Count one batch of :func:`collate`.

        Raises:
            DataError: when more than ``max_unreadable`` of the files tried (20 at least) could not be read.
        """
        self.read += len(batch["clips"])
        for skip in batch["skipped"]:
            self.unreadable += skip.unreadable
            self.unsuitable += not skip.unreadable
            if skip.reason not in self._seen:
                self._seen.add(skip.reason)
                logger.warning("skipped %s", skip.reason)
        tried = self.read + self.unreadable
        if tried >= self._MIN_FILES and self.unreadable > self.max_unreadable * tried:
            raise DataError(
                f"{self.unreadable} of {tried} reads failed, more than max_unreadable={self.max_unreadable}; "
                "the log names each file and its reason"
            )


def validation_clip(path: str, num_frames: int, size: int) -> torch.Tensor:
    """Read the first frames at the video's own rate, short side to ``size``, centre crop: (3, T, size, size).

    Raises:
        VideoReadError: if the file cannot be read or is too short.
    """
    return read_clip(path, num_frames=num_frames, resize=size, crop=size)
