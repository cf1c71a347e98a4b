"""Training clips streamed from webdataset shards (tar files), for collections of millions: Kinetics-600 and larger.

A shard is read from its beginning to its end, wherever it lies (a file, an URL, a ``pipe:`` command), and split by
process and loader worker: no two of them read the same shard in an epoch. Which bucket a step uses, and the crop of each
clip, follow from the :class:`~vc_vae_diffusers.training.clip_plan.ClipPlan`, as for files. Which clips it gets follows from
where each stream stands; batches carry that position, a checkpoint keeps it, and a resumed run reads at most one shard
again per stream to stand where it stood.

Not in the paper.
"""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..extras import install_hint
from ..video import VideoReadError, is_media_name, probe
from .clip_plan import STREAM_SHARDS, STREAM_SHUFFLE, ClipBatchSampler, ClipPlan, ClipRequest, counter_rng
from .data import (
    MAX_ATTEMPTS,
    ClipReader,
    DataError,
    NameMatcher,
    Skip,
    UnsuitableError,
    clip_item,
    clip_numbers,
    collate,
    no_candidate,
)

logger = logging.getLogger(__name__)


def list_shards(data: str) -> list[str]:
    """Expand braces, and wildcards of local paths, to shard addresses.

    Raises:
        ImportError: without the webdataset package.
        DataError: if a wildcard matches nothing.
    """
    _require_webdataset()
    from webdataset.shardlists import expand_urls

    shards = []
    for url in expand_urls(data):
        is_pattern = "://" not in url and not url.startswith("pipe:") and glob.has_magic(url)
        found = sorted(glob.glob(url)) if is_pattern else [url]
        if not found:
            raise DataError(f"data={data!r}: {url!r} matches no shard")
        shards += found
    return shards


def _require_webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ImportError(f"shards need webdataset: {install_hint('train')}") from error


@dataclass(frozen=True)
class Position:
    """Where a stream stands: shards finished since the run began, and samples taken from the one being read."""

    shards: int = 0
    taken: int = 0


class ShardStream(IterableDataset):
    """Micro-batches of one process, from ``start_step`` up to and without ``end_step``, collated.

    Use with ``DataLoader(stream, batch_size=None, num_workers=N)``. Every batch has, besides what
    :func:`~vc_vae_diffusers.training.data.collate` returns, ``stream`` (its number) and ``position`` (shards, taken) after
    it.

    Args:
        shards: addresses of tar files; at least one for each process and worker.
        plan: buckets and seed.
        start_step, end_step: the steps to deliver.
        rank, num_processes: of this process.
        num_workers: of the DataLoader.
        positions: where each stream of this process stood at ``start_step``; from the beginning if empty.
        batches_done: micro-batches that this process has had before ``start_step``.
        shuffle_buffer: samples of a shard that are held to be drawn from at random.
        exclude: sample keys, or shell patterns of them, that are never delivered (a hold-out).
        reader: crop, scale and flip.

    Raises:
        DataError: for fewer shards than streams; and from iterating, if 100 samples in a row do not serve.
    """

    def __init__(
        self,
        shards: Sequence[str],
        plan: ClipPlan,
        start_step: int,
        end_step: int,
        *,
        rank: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        positions: Sequence[Position] = (),
        batches_done: int = 0,
        shuffle_buffer: int = 256,
        exclude: Sequence[str] = (),
        reader: ClipReader | None = None,
    ):
        self.num_streams = max(num_workers, 1)
        consumers = num_processes * self.num_streams
        if len(shards) < consumers:
            raise DataError(
                f"{len(shards)} shards for {num_processes} processes with {self.num_streams} streams each; "
                f"use fewer workers, or at least {consumers} shards"
            )
        if positions and len(positions) != self.num_streams:
            raise DataError(
                f"the checkpoint has the positions of {len(positions)} streams a process, not {self.num_streams}; "
                "resume shards with the number of workers that the run began with"
            )
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")
        self.shards, self.plan = list(shards), plan
        self.start_step, self.end_step = start_step, end_step
        self.rank, self.num_processes = rank, num_processes
        self.positions = list(positions) or [Position()] * self.num_streams
        self.batches_done, self.shuffle_buffer = batches_done, shuffle_buffer
        self._excluded = NameMatcher(exclude)
        self.reader = reader or ClipReader()

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if workers != self.num_streams:
            raise ValueError(f"the DataLoader has {workers} workers, but num_workers={self.num_streams} was given")
        # DataLoader asks worker 0 first: the stream whose turn it was at start_step.
        stream = (worker + self.batches_done) % workers
        samples = self._samples(stream)
        for number, requests in enumerate(self._micro_batches()):
            if number % workers == worker:
                yield self._batch(samples, stream, requests)

    def _micro_batches(self) -> Iterator[list[ClipRequest]]:
        return iter(ClipBatchSampler(self.plan, self.start_step, self.end_step, self.rank, self.num_processes))

    def _batch(self, samples: Iterator[_Sample], stream: int, requests: list[ClipRequest]) -> dict:
        items, position = [], self.positions[stream]
        for request in requests:
            item, position = self._item(samples, request)
            items.append(item)
        return {**collate(items), "stream": stream, "position": (position.shards, position.taken)}

    def _item(self, samples: Iterator[_Sample], request: ClipRequest) -> tuple[dict, Position]:
        bucket = self.plan.buckets[request.bucket_index]
        skipped: list[Skip] = []
        for attempt in range(MAX_ATTEMPTS):
            sample = next(samples)
            if sample.error is not None:
                skipped.append(Skip(sample.name, sample.error, unreadable=True))
                continue
            uniform = clip_numbers(self.plan.seed, request, attempt)
            with tempfile.NamedTemporaryFile(suffix=sample.suffix) as file:
                file.write(sample.content)
                file.flush()
                try:
                    clip, start = self.reader.clip(probe(file.name), bucket, uniform)
                except (VideoReadError, UnsuitableError) as error:
                    skip = Skip.of(sample.name, error)
                    reason = skip.reason.replace(file.name, sample.name)
                    skipped.append(Skip(sample.name, reason, skip.unreadable))
                    continue
            name = f"{sample.name} from {float(start):.3f} s"
            return clip_item(clip, name, bucket, self.plan.seed, request, skipped), sample.position
        raise no_candidate(bucket, skipped)

    def _samples(self, stream: int) -> Iterator[_Sample]:
        """Samples of one stream without end, from its position on."""
        consumer, consumers = self.rank * self.num_streams + stream, self.num_processes * self.num_streams
        begun = self.positions[stream]
        number, idle = begun.shards, 0
        while True:
            shard = self._shard_of(consumer, consumers, number)
            rng = counter_rng(self.plan.seed, STREAM_SHUFFLE, consumer, number)
            taken = 0
            for sample in _shuffled(self._read_shard(shard), self.shuffle_buffer, rng):
                taken, idle = taken + 1, 0
                if number > begun.shards or taken > begun.taken:
                    yield sample.at(Position(number, taken))
            number, idle = number + 1, idle + 1
            if idle > len(self.shards):
                raise DataError(f"{idle} shards in a row hold no video or image outside of exclude")

    def _shard_of(self, consumer: int, consumers: int, number: int) -> str:
        """The ``number``-th shard of a consumer: each epoch deals all shards out in an order of its own."""
        mine = len(range(consumer, len(self.shards), consumers))
        epoch, place = divmod(number, mine)
        order = counter_rng(self.plan.seed, STREAM_SHARDS, epoch).permutation(len(self.shards))
        return self.shards[order[consumer + place * consumers]]

    def _read_shard(self, shard: str) -> Iterator[_Sample]:
        """The videos and images of one shard; what breaks off its reading comes as a sample that says so."""
        from webdataset.tariterators import tarfile_samples

        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True

        for content in tarfile_samples([{"url": shard}], handler=note):
            for field, value in content.items():
                # A key of several parts: clip.left.mp4 is the sample "clip" with the field "left.mp4".
                suffix = Path(f"x.{field}").suffix.lower()
                if is_media_name(f"{content['__key__']}.{field}") and not self._excluded(content["__key__"]):
                    yield _Sample(f"{shard}:{content['__key__']}.{field}", suffix, value)
        for error in errors:
            yield _Sample(
                shard, "", b"", error=f"{shard}: the rest cannot be read ({error.args[0] if error.args else error!r})"
            )


@dataclass(frozen=True)
class _Sample:
    """One file of a shard; with ``error``, the report that the shard's reading broke off."""

    name: str
    suffix: str
    content: bytes
    error: str | None = None
    position: Position = Position()

    def at(self, position: Position) -> _Sample:
        return _Sample(self.name, self.suffix, self.content, self.error, position)


def _shuffled(samples: Iterator[_Sample], size: int, rng: np.random.Generator) -> Iterator[_Sample]:
    """Draw from a buffer of ``size`` samples at random, refill it, and empty it at the end."""
    buffer: list[_Sample] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) >= size:
            yield buffer.pop(int(rng.integers(len(buffer))))
    while buffer:
        yield buffer.pop(int(rng.integers(len(buffer))))
