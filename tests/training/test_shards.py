"""Streaming from webdataset shards."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from video_files import encode, frame_numbers, numbered_frames

from vc_vae_diffusers.training import clip_plan, shards
from vc_vae_diffusers.training import data as vdata
from vc_vae_diffusers.video.suffixes import is_shards

pytest.importorskip("webdataset")

BUCKETS = ["size=48x64 frames=4 fps=0 batch=4", "size=48x64 frames=2 fps=0 batch=4"]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    path = encode(tmp_path_factory.mktemp("video") / "v.mp4", numbered_frames(12), options={"crf": "12"})
    return path.read_bytes()


def write_shard(path: Path, contents: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


@pytest.fixture
def collection(tmp_path, video) -> list[str]:
    """Eight shards of five videos, beside their captions."""
    return [
        write_shard(
            tmp_path / f"s-{shard}.tar",
            {f"{shard}{i}.{suffix}": content for i in range(5) for suffix, content in (("mp4", video), ("txt", b"a"))},
        )
        for shard in range(8)
    ]


def stream(paths: list[str], steps: tuple[int, int], **options) -> shards.ShardStream:
    plan = clip_plan.ClipPlan(clip_plan.parse_buckets(BUCKETS), seed=1)
    return shards.ShardStream(paths, plan, *steps, shuffle_buffer=3, reader=vdata.ClipReader(flip=False), **options)


def load(dataset: shards.ShardStream, workers: int = 0) -> list[dict]:
    options = {"batch_size": None, "collate_fn": vdata.as_is, "num_workers": workers}
    return list(DataLoader(dataset, **options, worker_init_fn=vdata.quiet_worker))


def keys(batches: list[dict]) -> list[str]:
    return [clip.split(" from ")[0].split(":")[-1] for batch in batches for clip in batch["clips"]]


def same(first: list[dict], second: list[dict]) -> bool:
    return [b["clips"] for b in first] == [b["clips"] for b in second] and all(
        torch.equal(a["video"], b["video"]) and a["noise_seeds"] == b["noise_seeds"]
        for a, b in zip(first, second, strict=True)
    )


def test_addresses(tmp_path, collection):
    assert is_shards("s3/x-{000..127}.tar")
    assert is_shards("pipe:cat a.tar")
    assert not is_shards(str(tmp_path))
    assert shards.list_shards(str(tmp_path / "s-{2..4}.tar")) == collection[2:5]
    assert shards.list_shards(str(tmp_path / "s-*.tar")) == collection
    with pytest.raises(vdata.DataError, match="matches no shard"):
        shards.list_shards(str(tmp_path / "t-*.tar"))


def test_an_epoch_delivers_every_sample_once_over_processes_and_workers(collection):
    seen = Counter()
    for rank in range(2):
        # 40 samples, two processes of two streams: ten steps of two clips a process and step
        seen.update(keys(load(stream(collection, (0, 10), rank=rank, num_processes=2, num_workers=2), workers=2)))
    assert len(seen) == 40
    assert set(seen.values()) == {1}


def test_samples_are_shuffled_within_and_between_shards_and_anew_each_epoch(collection):
    names = keys(load(stream(collection, (0, 20))))
    first, second = names[:40], names[40:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)
    assert [name[1] for name in first[:5]] != list("01234")


def test_every_shard_is_shuffled_by_itself(collection):
    names = keys(load(stream(collection, (0, 20))))
    orders = [[name[1] for name in names[first : first + 5]] for first in range(0, 80, 5)]
    assert all(sorted(order) == list("01234") for order in orders)  # shard by shard
    assert len({tuple(order) for order in orders[:8]}) > 4
    assert len({tuple(order) for order in orders}) > 8
    shards_read = [names[first][0] for first in range(0, 80, 5)]
    assert len(set(shards_read[:8])) == len(set(shards_read[8:])) == 8
    assert shards_read[:8] != shards_read[8:]


def test_clips_and_buckets_are_those_of_the_plan(collection):
    dataset = stream(collection, (0, 12))
    for batch, step in zip(load(dataset), range(12), strict=True):
        bucket = dataset.plan.buckets[dataset.plan.bucket_of(step)[0]]
        assert batch["video"].shape == (4, 3, bucket.num_frames, 48, 64)
        for clip in batch["video"]:
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + bucket.num_frames))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_resumed_stream_goes_on_exactly(collection, video, tmp_path, workers):
    broken = {"90.mp4": b"no video", "91.mp4": video[:800], "92.mp4": video, "93.mp4": b""}
    paths = [*collection, write_shard(tmp_path / "bad.tar", broken)]
    whole = load(stream(paths, (0, 24), num_workers=workers), workers)
    assert sum(len(batch["skipped"]) for batch in whole) > 0
    for stop in (1, 7, 13):
        positions = [(0, 0)] * max(workers, 1)
        for batch in whole[:stop]:
            positions[batch["stream"]] = batch["position"]
        rest = stream(
            paths,
            (stop, 24),
            num_workers=workers,
            positions=[shards.Position(*position) for position in positions],
            batches_done=stop,
        )
        assert same(load(rest, workers), whole[stop:])


def test_resuming_with_other_workers_is_refused(collection):
    with pytest.raises(vdata.DataError, match="positions of 2 streams a process, not 1"):
        stream(collection, (4, 8), positions=[shards.Position(1, 2)] * 2)
    with pytest.raises(ValueError, match="the DataLoader has 1 workers"):
        next(iter(stream(collection, (0, 4), num_workers=2)))


def test_what_cannot_be_read_is_reported_by_name(collection, tmp_path, video):
    with tarfile.open(collection[0]) as whole:
        third = whole.getmembers()[2]
    # Within a file: an archive cut between two files looks to tarfile as if it ended there.
    (tmp_path / "cut.tar").write_bytes(Path(collection[0]).read_bytes()[: third.offset_data + third.size // 2])
    dataset = stream([str(tmp_path / "cut.tar"), str(tmp_path / "missing.tar"), collection[1]], (0, 12))
    skipped = {skip.reason for batch in load(dataset) for skip in batch["skipped"]}
    assert any("cut.tar: the rest cannot be read" in reason for reason in skipped)
    assert any("missing.tar: the rest cannot be read" in reason for reason in skipped)
    assert all("/tmp" not in reason.replace(str(tmp_path), "") for reason in skipped)


def test_held_out_keys_are_never_delivered(collection):
    names = keys(load(stream(collection, (0, 20), exclude=["03", "2*"])))
    assert len(names) == 80
    assert not [name for name in names if name.startswith("2") or name == "03.mp4"]


def test_too_few_shards_and_shards_without_videos_are_errors(collection, tmp_path):
    with pytest.raises(vdata.DataError, match="3 shards for 2 processes with 2 streams"):
        stream(collection[:3], (0, 1), num_processes=2, num_workers=2)
    empty = write_shard(tmp_path / "empty.tar", {"a.txt": b"only text"})
    with pytest.raises(vdata.DataError, match="no video or image"):
        load(stream([empty], (0, 1)))
