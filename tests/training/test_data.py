"""Which clips a step trains on, and what is read of them."""

import logging
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from video_files import encode, frame_numbers, numbered_frames

from vc_vae_diffusers.training import clip_plan
from vc_vae_diffusers.training import data as vdata
from vc_vae_diffusers.video import VideoReadError, from_uint8, read_clip

SIZE = "size=48x64"  # that of the test videos: nothing is cropped or resized


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """Three readable videos at 24, 30 and 12 fps that spell their frame numbers."""
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered_frames(60)
    return [str(encode(folder / f"{rate}fps.mp4", frames, rate=rate, options={"crf": "12"})) for rate in (24, 30, 12)]


def requests_of(buckets: list[clip_plan.Bucket], steps: int, **kwargs) -> list[list[clip_plan.ClipRequest]]:
    return list(clip_plan.ClipBatchSampler(clip_plan.ClipPlan(buckets, seed=3), 0, steps, **kwargs))


# ---------------------------------------------------------------------------------------------------------- buckets


def test_bucket_lines_multiply_out_and_share_their_weight():
    buckets = clip_plan.parse_buckets(
        ["size=128,256 frames=8,40 fps=8,12.5 weight=2 batch=8 micro=4", "size=48x64 frames=1 fps=0 batch=2"]
    )
    assert len(buckets) == 9
    assert {(b.height, b.num_frames, b.fps) for b in buckets[:8]} == {
        (s, f, r) for s in (128, 256) for f in (8, 40) for r in (8, 12.5)
    }
    assert [b.weight for b in buckets] == [0.25] * 8 + [1.0]
    assert (buckets[8].height, buckets[8].width, buckets[8].micro_batch_size) == (48, 64, 2)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("size=128 frames=8 fps=8 batch=8 wieght=2", "unknown keys"),
        ("size=128 frames=8 fps=8", "missing keys"),
        ("size=128 frames=eight fps=8 batch=8", "numbers"),
        ("size=128 frames=8 fps=8 batch=0", "positive"),
        ("size=128 frames=8 fps=-1 batch=2", "fps >= 0"),
    ],
)
def test_malformed_buckets_are_refused(line, complaint):
    with pytest.raises(ValueError, match=complaint):
        clip_plan.parse_buckets([line])


def test_the_share_of_a_process_must_be_whole():
    (bucket,) = clip_plan.parse_buckets(["size=64 frames=8 fps=8 batch=6 micro=4"])
    assert bucket.micro_batches(1) == 2
    assert bucket.micro_batches(2) == 1
    with pytest.raises(ValueError, match="divisible by the 4 processes"):
        bucket.micro_batches(4)
    (bucket,) = clip_plan.parse_buckets(["size=64 frames=8 fps=8 batch=7 micro=4"])
    with pytest.raises(ValueError, match="divides 7"):
        bucket.micro_batches(1)


# ------------------------------------------------------------------------------------------------- plan and sampler


@pytest.fixture
def mixed() -> list[clip_plan.Bucket]:
    lines = ["size=64 frames=8 fps=8 weight=6 batch=4", "size=32 frames=4 fps=8 weight=3 batch=8 micro=2"]
    return clip_plan.parse_buckets([*lines, "size=32 frames=1 fps=0 weight=0.001 batch=4"])


def test_buckets_come_in_proportion_to_their_weights(mixed):
    plan = clip_plan.ClipPlan(mixed, seed=0)
    for block in range(3):
        counts = Counter(plan.bucket_of(step)[0] for step in range(1000 * block, 1000 * (block + 1)))
        assert counts[2] == 1
        assert abs(counts[0] - 666) <= 1
        assert abs(counts[1] - 333) <= 1
    orders = [[plan.bucket_of(1000 * block + i)[0] for i in range(1000)] for block in range(2)]
    assert orders[0] != orders[1]


def test_shares_are_exact_over_a_thousand_steps_and_no_bucket_loses_its_only_one():
    even = clip_plan.ClipPlan(clip_plan.parse_buckets(["size=32 frames=4,8 fps=0 batch=1"]), seed=0)
    assert Counter(even.bucket_of(step)[0] for step in range(1000)) == {0: 500, 1: 500}
    lines = ["size=32 frames=4 fps=0 batch=1 weight=1", "size=32 frames=8,12,16 fps=0 batch=1 weight=1e-9"]
    rare = clip_plan.ClipPlan(clip_plan.parse_buckets(lines), seed=0)
    assert Counter(rare.bucket_of(step)[0] for step in range(1000)) == {0: 997, 1: 1, 2: 1, 3: 1}


def test_a_share_that_is_not_whole_is_told_before_the_first_step(mixed):
    with pytest.raises(ValueError, match="divisible by the 3 processes"):
        clip_plan.ClipBatchSampler(clip_plan.ClipPlan(mixed, seed=0), 0, 1, num_processes=3)


def test_every_clip_of_a_bucket_has_an_ordinal_of_its_own_without_gaps(mixed):
    plan = clip_plan.ClipPlan(mixed, seed=0)
    seen: dict[int, list[int]] = {}
    for step in range(2500):
        for request in plan.requests(step):
            seen.setdefault(request.bucket_index, []).append(request.ordinal)
    for ordinals in seen.values():
        assert ordinals == list(range(len(ordinals)))


def test_a_step_is_the_same_whenever_the_plan_was_made(mixed):
    unbroken = requests_of(mixed, 1500)
    plan = clip_plan.ClipPlan(mixed, seed=3)
    resumed = list(clip_plan.ClipBatchSampler(plan, 1203, 1500))
    assert unbroken[-len(resumed) :] == resumed
    assert resumed[0][0].step == 1203
    assert [r for batch in resumed for r in batch] != [
        r for batch in clip_plan.ClipBatchSampler(clip_plan.ClipPlan(mixed, seed=4), 1203, 1500) for r in batch
    ]


def test_processes_share_a_step_of_one_bucket(mixed):
    whole = requests_of(mixed, 60)
    parts = [requests_of(mixed, 60, rank=rank, num_processes=2) for rank in range(2)]

    def by_step(batches):
        steps: dict[int, list] = {}
        for batch in batches:
            assert len({(r.step, r.bucket_index) for r in batch}) == 1
            assert len(batch) <= mixed[batch[0].bucket_index].micro_batch_size
            steps.setdefault(batch[0].step, []).extend(batch)
        return steps

    first, second, together = by_step(parts[0]), by_step(parts[1]), by_step(whole)
    assert set(first) == set(second) == set(together) == set(range(60))
    for step in range(60):
        assert first[step] + second[step] == together[step]
        assert len({r.bucket_index for r in first[step] + second[step]}) == 1


# ------------------------------------------------------------------------------------------------------------ files


def test_lists_with_sections_csv_and_patterns(tmp_path):
    (tmp_path / "list.txt").write_text("# all\n[train]\na.mp4\nb.mp4  # good\n\n[holdout]\nc.mp4\n")
    (tmp_path / "list.csv").write_text("id,file,split\n1,a.mp4,train\n2,c.mp4,holdout\n")
    assert vdata.read_list(tmp_path / "list.txt", "train") == ["a.mp4", "b.mp4"]
    assert vdata.read_list(tmp_path / "list.txt") == ["a.mp4", "b.mp4", "c.mp4"]
    assert vdata.read_list(tmp_path / "list.csv", "holdout") == ["c.mp4"]
    assert vdata.expand_patterns(["x*", "@list.txt:holdout"], tmp_path) == ["x*", "c.mp4"]
    with pytest.raises(ValueError, match=r"no section \[test\]"):
        vdata.read_list(tmp_path / "list.txt", "test")


def test_a_csv_file_needs_a_column_of_files_and_one_of_sections(tmp_path):
    (tmp_path / "names.csv").write_text("name,split\na.mp4,train\n")
    (tmp_path / "files.csv").write_text("file\na.mp4\n")
    assert vdata.read_list(tmp_path / "files.csv") == ["a.mp4"]
    for name, section in (("names.csv", None), ("names.csv", "train"), ("files.csv", "train")):
        with pytest.raises(ValueError, match="needed are file, path or video, and split"):
            vdata.read_list(tmp_path / name, section)


def test_files_of_a_folder_and_of_a_list(tmp_path):
    for name in ("a.mp4", "b.MP4", "deep/c.mkv", "deep/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = lambda files: [Path(file).relative_to(tmp_path).as_posix() for file in files]  # noqa: E731
    assert names(vdata.find_files(tmp_path)) == ["a.mp4", "b.MP4", "deep/c.mkv", "deep/d.png"]
    assert names(vdata.find_files(tmp_path, include=["*.mp4", "deep/*"], exclude=["deep/d.png"])) == ["a.mp4", "deep/c.mkv"]
    (tmp_path / "list.txt").write_text("deep/c.mkv\na.mp4\n")
    assert names(vdata.find_files(tmp_path / "list.txt", exclude=["a.mp4"])) == ["deep/c.mkv"]


def test_a_misspelt_holdout_is_an_error(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(vdata.DataError, match=r"'aa.mp4' is named by"):
        vdata.find_files(tmp_path, exclude=["aa.mp4"])
    with pytest.raises(vdata.DataError, match="no video or image"):
        vdata.find_files(tmp_path, exclude=["*.mp4"])


# ------------------------------------------------------------------------------------------------------------ clips


def test_clips_are_consecutive_frames_from_anywhere(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=0 batch=1"])
    dataset = vdata.ClipDataset(videos[:1], buckets, seed=0, flip=False)
    starts = []
    for ordinal in range(40):
        numbers = frame_numbers(dataset[clip_plan.ClipRequest(0, 0, ordinal)]["video"])
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        starts.append(numbers[0])
    assert min(starts) < 8
    assert max(starts) > 44
    assert len(set(starts)) > 20


def test_rates_are_resampled_by_timestamps_and_slow_videos_keep_their_own(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=10 batch=1"])
    for path, fps in ((videos[0], 24), (videos[1], 30), (videos[2], 12)):
        item = vdata.ClipDataset([path], buckets, seed=0, flip=False)[clip_plan.ClipRequest(0, 0, 0)]
        numbers = frame_numbers(item["video"])
        times = [number / fps for number in numbers]
        # The frame on screen: late by less than a frame, early by a quarter of one at most.
        lateness = times[0] + 0.1 * np.arange(8) - times
        assert lateness.min() >= -0.25 / fps - 1e-9
        assert lateness.max() <= 0.75 / fps + 1e-9
    fast = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=24 batch=1"])
    numbers = frame_numbers(vdata.ClipDataset([videos[2]], fast, 0, flip=False)[clip_plan.ClipRequest(0, 0, 0)]["video"])
    assert list(np.diff(numbers)) == [1] * 7


def test_cached_clips_equal_decoded_ones(videos):
    buckets = clip_plan.parse_buckets(["size=32 frames=6 fps=24,10,8 batch=1", f"{SIZE} frames=9 fps=0 batch=1"])
    decoded = vdata.ClipDataset(videos, buckets, 0, scale_jitter=1.0)
    cached = vdata.ClipDataset(videos, buckets, 0, scale_jitter=1.0, cache_in_memory=True)
    for index in range(4):
        for ordinal in range(12):
            request = clip_plan.ClipRequest(0, index, ordinal)
            first, second = decoded[request], cached[request]
            assert first["clip"] == second["clip"]
            assert torch.equal(first["video"], second["video"])


def test_a_cached_clip_that_would_go_beyond_the_last_frame_is_an_error(videos):
    buckets = clip_plan.parse_buckets(["size=32 frames=2 fps=0 batch=1"])
    dataset = vdata.ClipDataset(videos, buckets, seed=0, cache_in_memory=True)
    info = dataset._info(videos[0])
    last = info.duration - 1 / info.fps
    assert dataset._read_cached(info, 1, last, info.fps).shape[1] == 1
    with pytest.raises(VideoReadError, match="before the clip from"):
        dataset._read_cached(info, 2, last, info.fps)


def test_the_cache_can_hold_smaller_frames(videos):
    buckets = clip_plan.parse_buckets(["size=32 frames=6 fps=24 batch=1"])
    small = vdata.ClipDataset(videos, buckets, 0, cache_in_memory=True, cache_short_side=32)
    whole = vdata.ClipDataset(videos, buckets, 0)
    request = clip_plan.ClipRequest(0, 0, 0)
    assert small[request]["video"].shape == (3, 6, 32, 32)
    assert (small[request]["video"] - whole[request]["video"]).abs().mean() < 0.1
    assert not torch.equal(small[request]["video"], whole[request]["video"])
    with pytest.raises(ValueError, match="cache_short_side=31"):
        vdata.ClipDataset(videos, buckets, 0, cache_in_memory=True, cache_short_side=31)


def test_an_epoch_takes_every_file_once_and_in_another_order_next_time(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=4 fps=0 batch=3"])
    files = [*videos, *videos[:1]]
    dataset = vdata.ClipDataset(files, buckets, 0)
    epochs = [
        [dataset[clip_plan.ClipRequest(0, 0, 4 * e + i)]["clip"].split(" from ")[0] for i in range(4)] for e in range(6)
    ]
    assert all(sorted(epoch) == sorted(files) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_crops_without_jitter_span_the_short_side_and_with_it_go_down_to_native_pixels():
    (bucket,) = clip_plan.parse_buckets(["size=16 frames=1 fps=0 batch=1"])
    rows = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 96)
    frames = torch.stack([rows, torch.arange(96, dtype=torch.uint8).expand(64, 96), rows])[:, None]

    def extent(jitter: float, uniform: list[float]) -> tuple[float, float]:
        clip = (vdata.ClipReader(jitter, flip=False).cut(frames, bucket, uniform) + 1) * 127.5
        return (clip[0, 0, -1, 0] - clip[0, 0, 0, 0]).item(), clip[1, 0, 0, 0].item()

    whole, left = extent(0.0, [1.0, 0.0, 0.0, 1.0])
    assert abs(whole - 60) < 1  # 16 samples, 4 rows apart
    assert left < 3
    assert abs(extent(1.0, [0.0, 0.0, 0.0, 1.0])[0] - 60) < 1
    assert extent(1.0, [1.0, 0.5, 1.0, 1.0]) == pytest.approx((15, 80), abs=1e-4)  # native pixels at the right edge
    assert abs(extent(1.0, [0.5, 0.0, 0.0, 1.0])[0] - 30) < 1  # half way, logarithmically


def test_flip_mirrors_half_of_the_clips(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=2 fps=0 batch=1"])
    plain = vdata.ClipDataset(videos, buckets, 0, flip=False)
    flipped = vdata.ClipDataset(videos, buckets, 0, flip=True)
    mirrored = 0
    for ordinal in range(60):
        request = clip_plan.ClipRequest(0, 0, ordinal)
        a, b = plain[request]["video"], flipped[request]["video"]
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        mirrored += torch.equal(a.flip(-1), b)
    assert 18 <= mirrored <= 42


def test_images_are_clips_of_one_frame(tmp_path, videos):
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=1 fps=0 batch=1", f"{SIZE} frames=4 fps=0 batch=1"])
    dataset = vdata.ClipDataset([str(tmp_path / "a.png"), videos[0]], buckets, 0, flip=False)
    kinds = Counter()
    for ordinal in range(8):
        item = dataset[clip_plan.ClipRequest(0, 0, ordinal)]
        assert item["video"].shape == (3, 1, 48, 64)
        kinds[Path(item["clip"].split(" from ")[0]).suffix] += 1
        if item["clip"].startswith(str(tmp_path / "a.png")):
            assert torch.equal(item["video"][:, 0], from_uint8(torch.from_numpy(picture).movedim(-1, 0)))
        assert ".mp4" in dataset[clip_plan.ClipRequest(0, 1, ordinal)]["clip"]
    assert kinds == {".png": 4, ".mp4": 4}
    with pytest.raises(vdata.DataError, match="only images"):
        vdata.ClipDataset([str(tmp_path / "a.png")], buckets, 0)


def test_workers_change_nothing(videos):
    buckets = clip_plan.parse_buckets(["size=32 frames=4 fps=24,8 batch=2"])
    dataset = vdata.ClipDataset(videos, buckets, 0, scale_jitter=1.0)

    def batches(workers: int) -> list[dict]:
        sampler = clip_plan.ClipBatchSampler(clip_plan.ClipPlan(buckets, 0), 0, 6)
        options = {"collate_fn": vdata.collate, "num_workers": workers, "worker_init_fn": vdata.quiet_worker}
        return list(DataLoader(dataset, batch_sampler=sampler, **options))

    for alone, parallel in zip(batches(0), batches(2), strict=True):
        assert alone["clips"] == parallel["clips"]
        assert alone["noise_seeds"] == parallel["noise_seeds"]
        assert torch.equal(alone["video"], parallel["video"])
        assert len(set(alone["noise_seeds"])) == 2


# ------------------------------------------------------------------------------------------------- what cannot be read


@pytest.fixture
def broken(tmp_path, videos) -> list[str]:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video" * 100)
    whole = Path(videos[0]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return [str(tmp_path / name) for name in ("empty.mp4", "text.mp4", "cut.mp4")]


def test_unreadable_videos_are_logged_counted_and_skipped(videos, broken, caplog):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=0 batch=2"])
    dataset = vdata.ClipDataset([*videos, *broken], buckets, 0)
    health = vdata.ReadHealth(max_unreadable=0.9)
    with caplog.at_level(logging.WARNING):
        for requests in requests_of(buckets, 12):
            batch = vdata.collate([dataset[request] for request in requests])
            assert all(clip.split(" from ")[0] in videos for clip in batch["clips"])
            health.add(batch)
    assert health.read == 24
    assert health.unreadable >= 12  # four epochs, three broken files in each
    for path in broken:
        assert sum(path in message for message in caplog.messages) == 1
    assert any("0 bytes" in message for message in caplog.messages)


def test_a_mostly_unreadable_run_stops(videos, broken):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=0 batch=1"])
    dataset = vdata.ClipDataset([videos[0], *broken], buckets, 0)
    health = vdata.ReadHealth(max_unreadable=0.5)

    def train() -> None:
        for ordinal in range(40):
            health.add(vdata.collate([dataset[clip_plan.ClipRequest(0, 0, ordinal)]]))

    with pytest.raises(vdata.DataError, match=r"reads failed, more than max_unreadable=0.5"):
        train()
    assert health.read < 20
    with pytest.raises(vdata.DataError, match="none of 100 files"):
        vdata.ClipDataset(broken, buckets, 0)[clip_plan.ClipRequest(0, 0, 0)]


def test_files_that_do_not_fit_a_bucket_are_passed_over_but_are_not_unreadable(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=55 fps=24 batch=1", "size=64 frames=4 fps=0 batch=1"])
    dataset = vdata.ClipDataset(videos, buckets, 0, flip=False)
    health = vdata.ReadHealth(0.0)
    for ordinal in range(6):  # at 24 fps, 60 frames of the 30 fps video are 48
        item = dataset[clip_plan.ClipRequest(0, 0, ordinal)]
        assert videos[1] not in item["clip"]
        health.add(vdata.collate([item]))
    assert health.unreadable == 0
    assert health.unsuitable >= 2
    with pytest.raises(vdata.DataError, match=r"48x64 \(height x width\), smaller than 64x64"):
        dataset[clip_plan.ClipRequest(0, 1, 0)]


@pytest.mark.parametrize("jitter", [-0.1, 1.1])
def test_jitter_lies_between_nothing_and_all(jitter):
    with pytest.raises(ValueError, match=r"scale_jitter=.* must lie in \[0, 1\]"):
        vdata.ClipReader(jitter)


def test_a_skip_does_not_depend_on_what_was_read_before(videos, broken):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=0 batch=2"])
    files = [*videos, *broken]
    early = vdata.ClipDataset(files, buckets, 0)
    for ordinal in range(9):
        early[clip_plan.ClipRequest(0, 0, ordinal)]
    late = vdata.ClipDataset(files, buckets, 0)
    for ordinal in range(9, 15):
        a, b = early[clip_plan.ClipRequest(0, 0, ordinal)], late[clip_plan.ClipRequest(0, 0, ordinal)]
        assert a["clip"] == b["clip"]
        assert torch.equal(a["video"], b["video"])


def test_validation_clips_are_the_first_frames_centred(videos):
    clip = vdata.validation_clip(videos[0], 5, 32)
    assert torch.equal(clip, read_clip(videos[0], num_frames=5, resize=32, crop=32))
    assert clip.shape == (3, 5, 32, 32)


def test_starts_are_exact_source_frames(videos):
    buckets = clip_plan.parse_buckets([f"{SIZE} frames=60 fps=0 batch=1"])
    item = vdata.ClipDataset(videos, buckets, 0, flip=False)[clip_plan.ClipRequest(0, 0, 0)]
    assert item["clip"].endswith("from 0.000 s")
    assert frame_numbers(item["video"]) == list(range(60))
    info = vdata.probe(videos[1])
    reader = vdata.ClipReader()
    (bucket,) = clip_plan.parse_buckets([f"{SIZE} frames=8 fps=10 batch=1"])
    starts = {reader.start(info, bucket, u) for u in np.linspace(0, 0.9999, 200)}
    assert min(starts) == 0
    assert all((start * 30).denominator == 1 for start in starts)
    assert max(starts) + Fraction(7, 10) < 2 <= max(starts) + Fraction(7, 10) + Fraction(2, 30)


def test_pictures_need_no_rate():
    (bucket,) = clip_plan.parse_buckets(["size=64 frames=1 batch=2"])
    assert (bucket.num_frames, bucket.fps) == (1, 0)
    with pytest.raises(ValueError, match=r"missing keys \['fps'\]"):
        clip_plan.parse_buckets(["size=64 frames=1,8 batch=2"])


def test_names_tell_files_apart():
    assert vdata.distinct_names(["v/a.mp4", "v/b.mp4"]) == ["a", "b"]
    assert vdata.distinct_names(["v/p/a.mp4", "v/q/a.mp4", "v/b.mp4"]) == ["p_a_mp4", "q_a_mp4", "b"]
    assert vdata.distinct_names(["a.mp4", "a.mkv"]) == ["a_mp4", "a_mkv"]
    assert len(set(vdata.distinct_names(["v/p/q_a.mp4", "v/p_q/a.mp4", "v/x/q_a.mp4", "v/x/a.mp4"]))) == 4
    assert vdata.distinct_names([]) == []
