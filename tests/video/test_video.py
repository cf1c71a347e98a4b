"""Reading in chunks, sizes, rates and ranges; writing: exactness, colour, odd sizes, audio, whole files or none."""

from __future__ import annotations

import weakref
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import add_tone, audio_packets, encode, frame_numbers, numbered_frames

from vc_vae_diffusers.video import (
    VideoReader,
    VideoReadError,
    VideoWriteError,
    VideoWriter,
    colour,
    decoding,
    from_uint8,
    probe,
    read_clip,
    resize_and_crop,
    sources,
    to_uint8,
    write_image,
)
from vc_vae_diffusers.video.samples import moving_pattern


def read_all(path: Path, **options) -> torch.Tensor:
    with VideoReader(path, dtype=options.pop("dtype", torch.uint8), **options) as reader:
        return torch.cat(list(reader), dim=1)


def numbered(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.from_numpy(numbered_frames(count, height, width)).permute(3, 0, 1, 2).contiguous()


# ------------------------------------------------------------------------------------------------ value range


def test_uint8_and_float_are_inverse_and_rounding_is_to_nearest():
    values = torch.arange(256, dtype=torch.uint8)
    assert from_uint8(values).min() == -1
    assert from_uint8(values).max() == 1
    assert torch.equal(to_uint8(from_uint8(values)), values)
    for shift in (-0.45, 0.45):  # truncation would turn -0.45 into the value below
        assert torch.equal(to_uint8(from_uint8(values) + shift / 127.5), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            to_uint8(torch.tensor([0.0, bad]))


# ------------------------------------------------------------------------------------------------ reading


def test_chunks_are_shaped_and_complete(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(19))
    with VideoReader(path, chunk_frames=8) as reader:
        chunks = list(reader)
        assert reader.expected_frames == 19
        assert (reader.fps, reader.height, reader.width) == (25, 48, 64)
        again = list(reader)  # every iteration is a pass of its own
    assert [tuple(chunk.shape) for chunk in chunks] == [(3, 8, 48, 64), (3, 8, 48, 64), (3, 3, 48, 64)]
    assert all(torch.equal(a, b) for a, b in zip(chunks, again, strict=True))
    assert chunks[0].dtype == torch.float32
    assert -1 <= torch.cat(chunks, 1).min() < -0.9 < 0.9 < torch.cat(chunks, 1).max() <= 1
    assert torch.equal(to_uint8(torch.cat(chunks, 1)), read_all(path))
    with VideoReader(path, chunk_frames=8, batch_dim=True) as reader:
        assert next(iter(reader)).shape == (1, 3, 8, 48, 64)


def test_only_one_chunk_of_frames_is_alive(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(96))
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    finish = VideoReader._finish

    def counted(self, picture):
        nonlocal most
        frame = finish(self, picture)
        alive.add(frame)
        most = max(most, len(alive))
        return frame

    monkeypatch.setattr(VideoReader, "_finish", counted)
    with VideoReader(path, chunk_frames=4, dtype=torch.uint8, threads=1) as reader:
        seen = sum(chunk.shape[1] for chunk in reader)
    assert seen == 96
    assert 4 <= most <= 8  # those of the chunk being filled, and of the one before until it is replaced


def test_a_pass_decodes_no_more_than_it_is_asked_for(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(96), options={"g": "12", "bf": "0"})
    converted = []
    convert = sources.frame_to_rgb
    monkeypatch.setattr(sources, "frame_to_rgb", lambda frame, *a: converted.append(frame.pts) or convert(frame, *a))
    with VideoReader(path, chunk_frames=4, threads=1) as reader:
        chunks = iter(reader)
        next(chunks)
        assert len(converted) == 4
    with pytest.raises(StopIteration):
        next(chunks)  # closing the reader closed the pass
    converted.clear()
    read_all(path, fps=5)
    assert len(converted) == 20  # frames that resampling skips are decoded but not converted


def test_closing_the_reader_closes_the_file(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(40))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    reader = VideoReader(path, chunk_frames=2, threads=1)
    chunk = iter(reader.timed_chunks())
    next(chunk)
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    reader.close()
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_range_and_argument_errors(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(20))
    assert frame_numbers(read_all(path, start=3, stop=9)) == [3, 4, 5, 6, 7, 8]
    assert frame_numbers(read_all(path, start=3, num_frames=2)) == [3, 4]
    assert frame_numbers(read_all(path, start_time=0.2, stop_time=0.36)) == [5, 6, 7, 8]
    for options, message in {
        (("start", 3), ("stop", 3)): "stop: 3",
        (("start", -1),): "start: -1",
        (("start", 1), ("start_time", 1.0)): "exclude each other",
        (("start_time", -1.0),): "start_time: -1.0",
        (("stop_time", 0.0),): "stop_time: 0.0",
        (("fps", 0),): "fps: 0",
        (("fps", 1e-9),): "fps: 1e-09",
        (("fps", float("inf")),): "fps: inf",
        (("start_time", float("nan")),): "start_time: nan",
        (("stop_time", float("inf")),): "stop_time: inf",
        (("resize", 10**10),): "resize: 10000000000 makes frames of",
        (("chunk_frames", 0),): "chunk_frames: 0",
        (("num_frames", 0),): "num_frames: 0",
        (("resize", 0),): "resize: 0",
        (("crop", (3, -1)),): "crop:",
        (("crop", 64),): "larger than the frame",
        (("dtype", torch.float16),): "dtype: torch.float16",
    }.items():
        with pytest.raises(ValueError, match=message):
            VideoReader(path, **dict(options))


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (30, 30, list(range(30))),
        (30, 15, list(range(0, 30, 2))),
        (60, 15, list(range(0, 30, 4))),
        (30, 24, [k * 30 // 24 for k in range(24)]),
        (30, 60, [k // 2 for k in range(60)]),
        (Fraction(30000, 1001), Fraction(30000, 1001), list(range(30))),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "mkv"])  # mkv rounds times to milliseconds
def test_fps_resampling(rate, fps, expected, container, tmp_path):
    path = encode(tmp_path / f"a.{container}", numbered_frames(30), rate=rate)
    with VideoReader(path, fps=fps) as reader:
        assert reader.fps == fps
        assert reader.expected_frames == len(expected)
        pieces = list(reader.timed_chunks())
    assert frame_numbers(torch.cat([chunk for chunk, _ in pieces], dim=1)) == expected
    assert [t for _, times in pieces for t in times] == [Fraction(k) / fps for k in range(len(expected))]


def test_fps_resampling_of_a_variable_rate_holds_and_drops(tmp_path):
    times = [0, 100, 110, 120, 130, 500, 1000]
    path = encode(tmp_path / "vfr.mkv", numbered_frames(7), milliseconds=times)
    assert frame_numbers(read_all(path, fps=10))[:11] == [0, 1, 4, 4, 4, 5, 5, 5, 5, 5, 6]
    assert frame_numbers(read_clip(path, start_time=0.45, num_frames=2, fps=2)) == [4, 5]
    assert frame_numbers(read_clip(path, start_time=0.45, num_frames=3, fps=20)) == [4, 5, 5]


def test_read_clip_is_exact_or_an_error(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(50))
    clip = read_clip(path, start_frame=10, num_frames=8, fps=12.5, resize=24, crop=(16, 24))
    assert clip.shape == (3, 8, 16, 24)
    assert frame_numbers(read_clip(path, start_frame=10, num_frames=8, fps=12.5)) == list(range(10, 26, 2))
    with pytest.raises(VideoReadError, match="only 5 of 8 frames from frame 45 on"):
        read_clip(path, start_frame=45, num_frames=8)
    with pytest.raises(VideoReadError, match=r"only 5 of 8 frames from 1\.600 s on at 12\.5 fps"):
        read_clip(path, start_time=1.6, num_frames=8, fps=12.5)


# ------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(("resize", "size"), [(32, (32, 42)), (24, (24, 32)), ((20, 60), (20, 60)), (96, (96, 128))])
def test_resizing_equals_pillow(resize, size, tmp_path):
    source = numbered_frames(1)[0]
    Image.fromarray(source).save(tmp_path / "a.png")
    expected = Image.fromarray(source).resize(size[::-1], Image.Resampling.BILINEAR)  # antialiased
    read = read_all(tmp_path / "a.png", resize=resize)[:, 0]
    assert read.shape == (3, *size)
    assert (read.int() - torch.from_numpy(np.array(expected)).movedim(-1, 0).int()).abs().max() <= 1
    exact = (read_all(tmp_path / "a.png", resize=resize, dtype=torch.float32)[:, 0] + 1) * 127.5
    assert (exact - read).abs().max() <= 0.5001


def test_centre_crop_takes_the_centre():
    frames = torch.arange(3 * 2 * 7 * 10).reshape(3, 2, 7, 10).to(torch.uint8)
    assert torch.equal(resize_and_crop(frames, crop=3), frames[..., 2:5, 4:7])
    assert torch.equal(resize_and_crop(frames, crop=(7, 4)), frames[..., 3:7])
    assert resize_and_crop(frames, resize=14, crop=14).shape == (3, 2, 14, 14)
    with pytest.raises(ValueError, match="crop: 8x8"):
        resize_and_crop(frames, crop=8)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_lossless_round_trip_is_bit_exact(suffix, tmp_path):
    frames = torch.randint(0, 256, (3, 11, 33, 47), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rate = Fraction(30000, 1001)
    with VideoWriter(tmp_path / f"a{suffix}", rate, codec="lossless", threads=1) as writer:
        writer.write(frames[:, :4])
        writer.write(from_uint8(frames[None, :, 4:]))
    info = probe(tmp_path / f"a{suffix}")
    assert (info.fps, info.width, info.height, info.color_matrix) == (rate, 47, 33, "rgb")
    assert torch.equal(read_all(tmp_path / f"a{suffix}"), frames)


def color_bars(bar: int = 16) -> torch.Tensor:
    """(3, 4, 64, 8 * bar): the eight corners of the RGB cube, and their half-bright versions below."""
    corners = torch.tensor([[red, green, blue] for red in (0, 255) for green in (0, 255) for blue in (0, 255)])
    top = corners.T[:, None, :].repeat_interleave(bar, 2).expand(3, 32, -1)
    return torch.cat([top, 64 + top // 2], dim=1)[:, None].expand(-1, 4, -1, -1).to(torch.uint8)


@pytest.mark.parametrize(("crf", "bound"), [(0, 2), (16, 5)])
@pytest.mark.parametrize("width", [128, 127])  # 4:2:0, and 4:4:4 for the odd size
def test_color_bars_through_h264(crf, bound, width, tmp_path):
    bars = color_bars()[..., :width]
    with VideoWriter(tmp_path / "a.mp4", 25, crf=crf, threads=1) as writer:
        writer.write(bars)
    info = probe(tmp_path / "a.mp4")
    assert (info.color_matrix, info.color_range) == ("bt709", "limited")
    assert info.pixel_format == ("yuv420p" if width == 128 else "yuv444p")
    error = (read_all(tmp_path / "a.mp4").int() - bars.int()).abs()
    if width == 127 and crf == 0:
        assert error.max() <= bound  # full chroma: exact up to the edges
    inside = error.reshape(3, 4, 2, 32, width)[..., 8:24, :]
    assert max(inside[..., bar * 16 + 6 : bar * 16 + 10].max() for bar in range(7)) <= bound
    # The tags matter: read by the other matrix the bars are wrong.
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        frame.colorspace = 6
        wrong = colour.frame_to_rgb(frame, colour.VideoReformatter())
    assert (wrong.int() - bars[:, 0].int()).abs()[:, 8:24, 38:42].max() > 10


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_colour_stays_in_its_place(suffix, tmp_path):
    """Slopes of pure colour: chroma half a pixel beside its place changes them by half of their step, 1.6 levels of 3.2."""
    across = torch.linspace(-0.8, 0.8, 64).expand(3, 2, 64, 64) * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    for name, slope in (("across", across), ("down", across.mT)):
        path = tmp_path / f"{name}{suffix}"
        with VideoWriter(path, 25, crf=4, threads=1) as writer:
            writer.write(slope)
        off = (read_clip(path, num_frames=2) - slope)[..., 8:-8, 8:-8].mean(dim=(1, 2, 3)) * 127.5
        assert off.abs().max() < 0.5, (name, off)


@pytest.mark.parametrize(("policy", "size"), [("yuv444p", (33, 47)), ("pad", (34, 48))])
def test_odd_sizes(policy, size, tmp_path):
    frames = numbered(5, 33, 47)
    with VideoWriter(tmp_path / "a.mp4", 25, crf=4, odd_size=policy, threads=1) as writer:
        writer.write(frames)
    read = read_all(tmp_path / "a.mp4")
    assert read.shape == (3, 5, *size)
    assert (read[..., :33, :47].float() - frames.float()).abs().mean() < 4
    if policy == "pad":
        assert (read[..., 33, :].float() - read[..., 32, :].float()).abs().mean() < 4


def test_variable_times_are_kept(tmp_path):
    times = [Fraction(n, 1000) for n in (250, 290, 330, 800, 840, 1300)]
    for name in ("a.mp4", "a.mkv"):
        with VideoWriter(tmp_path / name, 25, threads=1) as writer:
            writer.write(numbered(6)[:, :4], times[:4])
            writer.write(numbered(6)[:, 4:], times[4:])
        with VideoReader(tmp_path / name) as reader:
            read = [time for _, stamps in reader.timed_chunks() for time in stamps]
        assert [round(float(t), 3) for t in read] == [float(t - times[0]) for t in times]
    for rate in (Fraction(30000, 1001), Fraction(24000, 1001), Fraction(24)):
        for name in ("source.mkv", "source.mp4"):  # Matroska's milliseconds come back as the exact rate
            source = encode(tmp_path / name, numbered_frames(40), rate=rate)
            with VideoReader(source) as reader, VideoWriter(tmp_path / "copy.mp4", reader.fps, threads=1) as writer:
                for chunk, stamps in reader.timed_chunks():
                    writer.write(chunk, stamps)
            assert (reader.fps, probe(tmp_path / "copy.mp4").fps) == (rate, rate)
            with VideoReader(tmp_path / "copy.mp4") as reader:
                assert reader.count_frames() == 40
                stamps = [time for _, stamps in reader.timed_chunks() for time in stamps]
            assert stamps == [n / rate for n in range(40)]
    with pytest.raises(ValueError, match="does not come after"), VideoWriter(tmp_path / "b.mp4", 25) as writer:
        writer.write(numbered(2), [Fraction(1), Fraction(1)])
    writer = VideoWriter(tmp_path / "b.mp4", 25)
    writer.write(numbered(1), [Fraction(0)])
    with pytest.raises(ValueError, match="with every call or with none"), writer:
        writer.write(numbered(1))


def test_pixel_aspect_ratio_is_kept(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 25, sample_aspect_ratio=Fraction(16, 15), threads=1) as writer:
        writer.write(numbered(2))
    assert probe(tmp_path / "a.mp4").sample_aspect_ratio == Fraction(16, 15)


def fail_after(path: Path, frames: torch.Tensor, failure: BaseException) -> None:
    with VideoWriter(path, 25, threads=1, preset="ultrafast") as writer:
        writer.write(frames)
        raise failure


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 25, threads=1, preset="ultrafast") as writer:
        writer.write(numbered(60))
        partial = list(tmp_path.iterdir())  # in the same folder, hidden; the name itself only once the file is whole
        assert len(partial) == 1
        assert partial[0].name.startswith(".a.")
    good = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    for failure in (RuntimeError("the model failed"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            fail_after(path, numbered(60), failure)
        assert path.read_bytes() == good
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(VideoWriteError, match="no frame was written"), VideoWriter(path, 25):
        pass
    with pytest.raises(ValueError, match="NaN"), VideoWriter(path, 25, threads=1) as writer:
        writer.write(torch.full((3, 2, 16, 16), float("nan")))
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_clear_error(tmp_path):
    writer = VideoWriter(tmp_path / "a.mkv", 25, codec="lossless")
    writer._partial.symlink_to("/dev/full")
    noise = torch.randint(0, 256, (3, 160, 64, 64), dtype=torch.uint8)
    with pytest.raises(VideoWriteError, match="No space left"), writer:
        writer.write(noise)
    assert list(tmp_path.iterdir()) == []


def test_the_same_frames_make_the_same_file(tmp_path):
    """Reconstructions are compared to the byte. Twelve runs of x264 gave eight different files with AVX-512."""
    frames = torch.stack(list(moving_pattern(8)), dim=1)
    made = set()
    for number in range(6):
        with VideoWriter(tmp_path / f"{number}.mp4", 25, crf=10) as writer:
            writer.write(frames)
        made.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(made) == 1


def test_writer_argument_errors(tmp_path):
    with pytest.raises(ValueError, match=r"folder of .* does not exist"):
        VideoWriter(tmp_path / "no" / "a.mp4", 25)
    for name, options, message in [
        ("a.avi", {}, "no suffix that video is written to"),
        ("a.mp4", {"codec": "vp9"}, "codec: 'vp9'"),
        ("a.mp4", {"crf": 60}, "crf: 60"),
        ("a.mp4", {"preset": "quick"}, "preset: 'quick'"),
        ("a.mp4", {"odd_size": "crop"}, "odd_size: 'crop'"),
    ]:
        with pytest.raises(ValueError, match=message):
            VideoWriter(tmp_path / name, 25, **options)
    with pytest.raises(ValueError, match="fps: 0"):
        VideoWriter(tmp_path / "a.mp4", 0)
    writer = VideoWriter(tmp_path / "a.mp4", 25, threads=1)
    writer.write(numbered(1))
    with pytest.raises(ValueError, match="keep one size"), writer:
        writer.write(numbered(1, 48, 66))
    with pytest.raises(ValueError, match="is neither"), VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(torch.zeros(2, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="1 of them for 2 frames"), VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(numbered(2), [Fraction(0)])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ audio


@pytest.fixture
def talkie(tmp_path) -> Path:
    return add_tone(encode(tmp_path / "silent.mp4", numbered_frames(50)), tmp_path / "talkie.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_audio_is_copied_packet_by_packet(talkie, suffix, tmp_path):
    with (
        VideoReader(talkie, chunk_frames=8) as reader,
        VideoWriter(tmp_path / f"out{suffix}", reader.fps, audio_from=talkie, threads=1) as writer,
    ):
        for chunk in reader:
            writer.write(chunk)
    source, copy = audio_packets(talkie), audio_packets(tmp_path / f"out{suffix}")
    assert len(source) > 80
    assert [payload for _, payload in copy] == [payload for _, payload in source]
    assert max(abs(float(a - b)) for (a, _), (b, _) in zip(source, copy, strict=True)) < 0.03
    assert frame_numbers(read_all(tmp_path / f"out{suffix}")) == list(range(50))


def test_audio_follows_a_range(talkie, tmp_path):
    with (
        VideoReader(talkie, start_time=0.4, stop_time=1.2) as reader,
        VideoWriter(
            tmp_path / "out.mkv", reader.fps, audio_from=talkie, audio_start=0.4, audio_stop=1.2, threads=1
        ) as writer,
    ):
        for chunk in reader:
            writer.write(chunk)
    source = {payload: float(time) for time, payload in audio_packets(talkie)}
    copy = audio_packets(tmp_path / "out.mkv")
    assert 30 <= len(copy) <= 37  # 0.8 s of 1,024 samples at 44.1 kHz
    offset = copy[0][0]  # Matroska has no negative times: a packet that begins before the cut shifts everything
    assert 0 <= offset <= 0.03
    for time, payload in copy:
        assert abs(source[payload] - 0.4 - float(time)) < 0.03
    assert frame_numbers(read_all(tmp_path / "out.mkv")) == list(range(10, 30))


def test_audio_errors(talkie, tmp_path):
    silent = tmp_path / "silent.mp4"
    with pytest.raises(VideoReadError, match="no audio to copy"):
        VideoWriter(tmp_path / "out.mp4", 25, audio_from=silent)
    odd = add_tone(silent, tmp_path / "odd.mkv", codec="pcm_u8")
    with (
        pytest.raises(ValueError, match="cannot hold the pcm_u8 audio"),
        VideoWriter(tmp_path / "out.mp4", 25, audio_from=odd, threads=1) as writer,
    ):
        writer.write(numbered(2))
    assert not (tmp_path / "out.mp4").exists()
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


# ------------------------------------------------------------------------------------------------ images


def test_write_image(tmp_path):
    image = numbered(1)
    write_image(tmp_path / "a.png", image)
    assert torch.equal(read_all(tmp_path / "a.png"), image)
    write_image(tmp_path / "b.png", from_uint8(image[:, 0]))
    assert torch.equal(read_all(tmp_path / "b.png"), image)
    write_image(tmp_path / "a.jpg", image)
    assert (read_all(tmp_path / "a.jpg").float() - image.float()).abs().mean() < 3
    for target, shape, message in [("a.mp4", (3, 8, 8), "no image suffix"), ("c.png", (3, 2, 8, 8), "is neither")]:
        with pytest.raises(ValueError, match=message):
            write_image(tmp_path / target, torch.zeros(shape))
    with pytest.raises(ValueError, match="does not exist"):
        write_image(tmp_path / "no" / "a.png", image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png", "b.png"]


def test_a_file_that_goes_away_or_is_closed_is_an_error_of_reading(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(20))
    with VideoReader(path, start=3, chunk_frames=2) as reader:
        path.rename(tmp_path / "b.mp4")
        with pytest.raises(VideoReadError, match=r"a\.mp4: cannot be read \(No such file or directory\)\. Check the path"):
            list(reader)
    path = tmp_path / "b.mp4"
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(VideoReadError, match=r"b\.mp4: cannot be read \(Permission denied\)"):
        VideoReader(path)


def test_a_machine_without_threads_or_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(4))
    no_thread = av.error.BlockingIOError(11, "Resource temporarily unavailable")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "frame_to_rgb", Mock(side_effect=no_thread))
        with pytest.raises(MemoryError, match=r"out of memory, as it seems: no memory or thread is left for .*a\.mp4"):
            read_all(path)
    with monkeypatch.context() as patch:
        patch.setattr(decoding.av, "open", Mock(side_effect=no_thread))
        with pytest.raises(MemoryError, match=r"left for .*a\.mp4"):
            read_all(path)
    writer = VideoWriter(tmp_path / "b.mp4", 25)
    monkeypatch.setattr(writer, "_write_frame", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    with pytest.raises(MemoryError, match=r"left for .*b\.mp4"), writer:
        writer.write(numbered(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
