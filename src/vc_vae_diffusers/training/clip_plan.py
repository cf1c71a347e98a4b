"""What a training run reads at which step: buckets, and the plan that draws them.

Everything random is a function of ``(seed, counters)``, never of a generator's history: the bucket of a step, the file,
the start, the crop and the flip of a clip follow from the step and the clip's place in the batch. So a resumed run sees
what an unbroken one sees, two processes see together what one process with twice the batch sees, and loader workers
change nothing.

A :class:`ClipPlan` turns a step into :class:`ClipRequest` objects, and a :class:`ClipBatchSampler` hands every process its
share.

Not in the paper: how the mix of Table 7 is drawn. Here every step draws one bucket, and all processes use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

# One stream of random numbers per purpose, so that adding a draw to one never shifts another.
STREAM_BUCKET, STREAM_EPOCH, STREAM_FILE, STREAM_CLIP, STREAM_NOISE = range(5)
STREAM_SHARDS, STREAM_SHUFFLE = 100, 101
STREAM_CACHE = 100  # of whole clips, never beside shards

# Steps over which the buckets' shares are exact. A bucket of weight below 1/1000 of the sum still gets one step.
_BLOCK = 1000


def counter_rng(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """Return the generator that belongs to ``(seed, stream, counters)``; at most three counters, each below 2**64."""
    padded = (0, *counters, *(0,) * (3 - len(counters)))
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=padded))


def noise_seed(seed: int, bucket_index: int, ordinal: int) -> int:
    """Return the seed of the posterior noise of one clip: the same in whichever process the clip is trained on."""
    return int(counter_rng(seed, STREAM_NOISE, bucket_index, ordinal).integers(2**63))


# ---------------------------------------------------------------------------------------------------------- buckets


@dataclass(frozen=True)
class Bucket:
    """One shape of clip: ``height`` x ``width`` pixels, ``num_frames`` frames at ``fps`` (0: the video's own).

    ``batch_size`` is the number of clips of a step over all processes and micro-batches (Table 7's total batch),
    ``micro_batch_size`` the most that one process puts through the model at once. ``weight`` is the bucket's share of
    the steps.
    """

    height: int
    width: int
    num_frames: int
    fps: float
    weight: float
    batch_size: int
    micro_batch_size: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}@{self.fps:g}"

    def micro_batches(self, num_processes: int) -> int:
        """Return the number of micro-batches that every process runs at a step of this bucket."""
        share, rest = divmod(self.batch_size, num_processes)
        if rest:
            raise ValueError(
                f"bucket {self}: batch={self.batch_size} must be divisible by the {num_processes} processes; "
                "change batch= or the number of processes"
            )
        count = math.ceil(share / self.micro_batch_size)
        if share % count:
            raise ValueError(
                f"bucket {self}: {share} clips a process must split into equal micro-batches of at most "
                f"micro={self.micro_batch_size}; choose a micro= that divides {share}"
            )
        return count

    def clips_at_once(self, num_processes: int) -> int:
        """Return the number of clips in a micro-batch of one process."""
        return self.batch_size // num_processes // self.micro_batches(num_processes)


def parse_buckets(lines: Sequence[str]) -> list[Bucket]:
    """Read buckets from lines such as ``size=128,256 frames=8,40 fps=8,24 weight=2 batch=8 micro=4``.

    Lists multiply out and share the line's ``weight`` (default 1) equally. ``size`` is one side of a square or
    ``HEIGHTxWIDTH``; ``fps=0`` keeps the video's own rate; ``micro`` defaults to ``batch``; ``frames=1`` makes images, and
    needs no ``fps``.

    Raises:
        ValueError: for unknown, missing or malformed keys.
    """
    buckets = []
    for line in lines:
        fields = dict(token.partition("=")[::2] for token in line.split())
        unknown = set(fields) - {"size", "frames", "fps", "weight", "batch", "micro"}
        if fields.get("frames") == "1":
            fields.setdefault("fps", "0")  # a picture has no rate
        missing = {"size", "frames", "fps", "batch"} - set(fields)
        if unknown or missing:
            wrong = [f"{what} keys {sorted(keys)}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys]
            raise ValueError(
                f"--buckets: {line!r} has {', '.join(wrong)}; "
                "write each in quotes, 'size=256 frames=16 fps=24 batch=8', with weight= and micro= if wanted"
            )
        try:
            sizes = [tuple(int(side) for side in size.split("x")) for size in fields["size"].split(",")]
            shapes = [
                (size[0], size[-1], int(frames), float(fps))
                for size in sizes
                for frames in fields["frames"].split(",")
                for fps in fields["fps"].split(",")
            ]
            batch = int(fields["batch"])
            micro = int(fields.get("micro", batch))
            weight = float(fields.get("weight", 1))
        except ValueError as error:
            raise ValueError(
                f"--buckets: {line!r}: {error}; numbers and commas only, as in size=128,256 frames=8"
            ) from error
        if min(batch, micro, *(min(shape[:3]) for shape in shapes)) < 1 or not weight > 0 or min(s[3] for s in shapes) < 0:
            raise ValueError(f"--buckets: {line!r}: sizes, frames, batch, micro and weight must be positive, fps >= 0")
        buckets += [Bucket(*shape, weight / len(shapes), batch, min(micro, batch)) for shape in shapes]
    if not buckets:
        raise ValueError("buckets is empty; give at least one, as in size=256 frames=16 fps=24 batch=8")
    return buckets


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class ClipRequest:
    """One clip to read: the ``ordinal``-th of its bucket since the run began, for step ``step``."""

    step: int
    bucket_index: int
    ordinal: int


class ClipPlan:
    """Which clips a step trains on, computed from the step alone.

    Within every block of 1,000 steps each bucket occurs in proportion to its weight (largest remainder, at least
    once), in an order shuffled by ``(seed, block)``.
    """

    def __init__(self, buckets: Sequence[Bucket], seed: int):
        self.buckets = list(buckets)
        self.seed = seed
        shares = np.array([bucket.weight for bucket in buckets], dtype=np.float64)
        if len(shares) > _BLOCK:
            raise ValueError(f"{len(shares)} buckets; at most {_BLOCK} are possible")
        ideal = shares / shares.sum() * _BLOCK
        counts = np.maximum(np.floor(ideal), 1).astype(int)
        while counts.sum() != _BLOCK:
            # Move the bucket that is furthest from its share, without taking a bucket's only step.
            gap = ideal - counts
            index = int(np.argmax(gap)) if counts.sum() < _BLOCK else int(np.argmin(np.where(counts > 1, gap, np.inf)))
            counts[index] += int(np.sign(_BLOCK - counts.sum()))
        self._counts = counts
        self._block = lru_cache(maxsize=2)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.repeat(np.arange(len(self.buckets)), self._counts)
        order = counter_rng(self.seed, STREAM_BUCKET, block).permutation(order)
        earlier = np.zeros(_BLOCK, dtype=np.int64)
        for index in range(len(self.buckets)):
            hits = order == index
            earlier[hits] = np.arange(int(hits.sum()))
        return order, earlier

    def bucket_of(self, step: int) -> tuple[int, int]:
        """Return the bucket's index at ``step`` (from 0) and how often that bucket occurred before."""
        block, offset = divmod(step, _BLOCK)
        order, earlier = self._block(block)
        index = int(order[offset])
        return index, block * int(self._counts[index]) + int(earlier[offset])

    def requests(self, step: int) -> list[ClipRequest]:
        """Return the clips of ``step`` over all processes, in the order in which they are shared out."""
        index, occurrence = self.bucket_of(step)
        size = self.buckets[index].batch_size
        return [ClipRequest(step, index, occurrence * size + i) for i in range(size)]


class ClipBatchSampler(Sampler[list[ClipRequest]]):
    """Micro-batches of one process, from ``start_step`` up to and without ``end_step``.

    Process ``rank`` takes a contiguous share of every step's clips, so that the processes together see the clips that
    a single one would see.
    """

    def __init__(self, plan: ClipPlan, start_step: int, end_step: int, rank: int = 0, num_processes: int = 1):
        self.plan, self.start_step, self.end_step = plan, start_step, end_step
        self.rank, self.num_processes = rank, num_processes
        for bucket in plan.buckets:
            bucket.micro_batches(num_processes)

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        for step in range(self.start_step, self.end_step):
            requests = self.plan.requests(step)
            bucket = self.plan.buckets[requests[0].bucket_index]
            share, size = bucket.batch_size // self.num_processes, bucket.clips_at_once(self.num_processes)
            mine = requests[self.rank * share : (self.rank + 1) * share]
            yield from (mine[first : first + size] for first in range(0, share, size))
