"""Files as real tools and people leave them: odd names, lists, times, ends, stills, limits, truncation."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import add_tone, audio_packets, encode, frame_numbers, numbered_frames

from vc_vae_diffusers.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    WRITABLE_VIDEO_SUFFIXES,
    ReadLimits,
    VideoReader,
    VideoReadError,
    VideoWriter,
    find_media,
    list_lines,
    probe,
    read_clip,
    write_image,
)

SHARED = Path(__file__).parents[3] / "shared" / "cases" / "video"


def read(path: Path, **options) -> tuple[torch.Tensor, list[Fraction], VideoReader]:
    with VideoReader(path, dtype=torch.uint8, threads=1, **options) as reader:
        pieces = list(reader.timed_chunks())
    return torch.cat([chunk for chunk, _ in pieces], dim=1), [time for _, times in pieces for time in times], reader


# ------------------------------------------------------------------------------------------------ names and lists


def test_one_table_of_suffixes(tmp_path):
    assert {".webm", ".gif"} <= WRITABLE_VIDEO_SUFFIXES
    assert WRITABLE_VIDEO_SUFFIXES | {".mts", ".m2ts", ".vob", ".mxf", ".3gp", ".y4m"} <= VIDEO_SUFFIXES
    assert {".avif", ".heic"} <= IMAGE_SUFFIXES
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("b.MTS", "a.mp4", "._a.mp4", ".git/x.mp4", "sub/c.avif", "notes.txt", "sub/._c.avif"):
        (tmp_path / name).touch()
    assert find_media(tmp_path) == ["a.mp4", "b.MTS", "sub/c.avif"]


def test_lines_of_a_list(tmp_path):
    text = "\ufeff# a comment\nfirst.mp4\n\n cat #shorts.mp4 \nd.mp4 # a dog\n[part] # of it\nx*\t#why\n"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    assert list_lines(tmp_path / "list.txt") == [
        *((2, "first.mp4"), (4, "cat #shorts.mp4"), (5, "d.mp4"), (6, "[part]"), (7, "x*")),
    ]


@pytest.mark.parametrize("name", ["12:30.mp4", "cat #shorts.mkv", "a%d.mp4", "pipe:1.webm", "file:x.gif"])
def test_a_file_is_a_file_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = torch.from_numpy(numbered_frames(6)).permute(3, 0, 1, 2)
    with VideoWriter(name, 25, threads=1) as writer:
        writer.write(frames)
    assert os.listdir(tmp_path) == [name]
    assert frame_numbers(read(Path(name))[0]) == list(range(6))


def test_audio_of_a_file_whose_name_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_tone(encode(tmp_path / "silent.mp4", numbered_frames(6)), tmp_path / "talkie.mp4").rename("12:30.mp4")
    with VideoWriter("12:31.mp4", 25, audio_from="12:30.mp4", threads=1) as writer:
        writer.write(torch.from_numpy(numbered_frames(6)).permute(3, 0, 1, 2))
    assert probe("12:31.mp4").has_audio


# ------------------------------------------------------------------------------------------------ numbers and times


def test_b_frames_in_avi_have_their_times(tmp_path):
    path = encode(tmp_path / "a.avi", numbered_frames(40), options={"bf": "3", "g": "12", "x264-params": "b-adapt=0"})
    frames, times, _ = read(path)
    assert frame_numbers(frames) == list(range(40))
    assert times == [Fraction(k, 25) for k in range(40)]
    assert frame_numbers(read(path, fps=12.5)[0]) == list(range(0, 40, 2))
    for number in (1, 9, 30):
        assert frame_numbers(read_clip(path, start_time=Fraction(number, 25), num_frames=1)) == [number]


def test_240_frames_a_second_in_milliseconds(tmp_path):
    path = encode(tmp_path / "a.mkv", numbered_frames(40), rate=240)
    for number in range(40):
        assert frame_numbers(read_clip(path, start_time=Fraction(number, 240), num_frames=1)) == [number]
    assert frame_numbers(read(path, fps=120)[0]) == list(range(0, 40, 2))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs a file that only an interlaced broadcast gives (../shared/cases)")
def test_a_packet_may_be_a_field():
    def numbers(path: Path, **options) -> list[int]:  # their blocks are wider than those of numbered_frames
        frames = read(path, **options)[0].float()
        return [sum(1 << b for b in range(8) if frames[:, t, 8, b * 12 + 6].mean() > 120) for t in range(frames.shape[1])]

    path = SHARED / "paff_field_packets.mkv"
    assert numbers(path) == list(range(20))
    assert numbers(path, start=6, num_frames=2) == [6, 7]


def test_leading_pictures_that_refer_to_nothing_are_not_missed(tmp_path):
    """A cut at an open group of pictures: the packets that come before its keyframe on screen are dropped."""
    whole = encode(tmp_path / "whole.mkv", numbered_frames(60), options={"bf": "3", "x264-params": "keyint=12:open-gop=1"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        begin = [k for k, packet in enumerate(packets) if packet.is_keyframe][2]
        first = packets[begin].pts
        expected = sorted(packet.pts for packet in packets).index(first)
        assert any(packet.pts < first for packet in packets[begin:])
        for packet in packets[begin:]:
            packet.pts += 1000 - first
            packet.dts = None if packet.dts is None else packet.dts + 1000 - first
            packet.stream = stream
            out.mux(packet)
    frames, _, _ = read(tmp_path / "cut.mkv")
    assert frame_numbers(frames) == list(range(expected, 60))
    assert frame_numbers(read_clip(tmp_path / "cut.mkv", start_frame=7, num_frames=3)) == [expected + k for k in (7, 8, 9)]


@pytest.mark.parametrize("suffix", sorted(WRITABLE_VIDEO_SUFFIXES))
def test_times_and_the_last_frames_duration_are_kept(suffix, tmp_path):
    """A recording with pauses in units of 1/90000 s whose last frame stays for long."""
    times = [Fraction(round(t * 90000), 90000) for t in (0, 0.0333, 0.0667, 8.5, 8.54, 8.58, 8.8)]
    end = Fraction(13)
    frames = torch.from_numpy(numbered_frames(7)).permute(3, 0, 1, 2)
    with VideoWriter(tmp_path / f"a{suffix}", Fraction(3330000, 828031), end_time=lambda: end, threads=1) as writer:
        writer.write(frames[:, :3], times[:3])
        writer.write(frames[:, 3:], times[3:])
    read_frames, stamps, reader = read(tmp_path / f"a{suffix}")
    tick = {".gif": Fraction(1, 100), ".mkv": Fraction(1, 1000), ".webm": Fraction(1, 1000)}.get(suffix, Fraction(1, 90000))
    assert frame_numbers(read_frames) == list(range(7))
    assert max(abs(a - b) for a, b in zip(stamps, times, strict=True)) <= tick / 2
    assert abs(reader.end_time - end) <= Fraction(1, 1000)
    assert abs(reader.info.duration - end) <= Fraction(1, 1000)
    shown = read(tmp_path / f"a{suffix}", fps=2)[0]
    assert frame_numbers(shown) == [0] + [2] * 16 + [3] + [6] * 8


def test_the_frame_on_screen_at_the_start_begins_there(tmp_path):
    """Pictures stay in step with the audio when a range begins while a frame is held."""
    path = encode(tmp_path / "a.mkv", numbered_frames(4), milliseconds=[0, 100, 1100, 1200])
    source = add_tone(path, tmp_path / "b.mkv")
    assert read(source, start_time=0.6)[1] == [Fraction(6, 10), Fraction(11, 10), Fraction(12, 10)]
    with (
        VideoReader(source, start_time=0.6, stop_time=1.15) as reader,
        VideoWriter(tmp_path / "c.mkv", reader.fps, audio_from=source, audio_start=0.6, audio_stop=1.15) as writer,
    ):
        for chunk, times in reader.timed_chunks():
            writer.write(chunk, times)
    _, times, _ = read(tmp_path / "c.mkv")
    assert times == [0, Fraction(1, 2)]
    sound = {payload: time for time, payload in audio_packets(source)}
    first, payload = audio_packets(tmp_path / "c.mkv")[0]
    assert abs(float(sound[payload] - Fraction(6, 10) - first)) < 0.03


def test_a_held_frame_fills_its_time_up_to_the_stop(tmp_path):
    path = encode(tmp_path / "a.mkv", numbered_frames(3), milliseconds=[0, 100, 4000])
    assert frame_numbers(read(path, fps=10, stop_time=1)[0]) == [0] + [1] * 9


# ------------------------------------------------------------------------------------------------ pictures


def test_deep_grey_is_full_range(tmp_path):
    codes = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(16, 0)
    expected = torch.from_numpy((codes / 257).round().astype(np.uint8))
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(codes).save(tmp_path / name)
        assert torch.equal(read(tmp_path / name)[0][1, 0], expected), name
    for pix_fmt, bits in (("gray10le", 10), ("gray16le", 16)):
        path = tmp_path / f"{pix_fmt}.mkv"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 16, pix_fmt
            out.mux(stream.encode(av.VideoFrame.from_ndarray(codes >> (16 - bits), format=pix_fmt)))
            out.mux(stream.encode())
        assert (read(path)[0][1, 0].int() - expected.int()).abs().max() <= 1
        assert probe(path).color_range == "full"


def test_tiff_as_pillow_reads_it(tmp_path):
    rgb = numbered_frames(1)[0]
    for compression in ("jpeg", "tiff_lzw", "tiff_deflate", None):
        Image.fromarray(rgb).save(tmp_path / "a.tif", compression=compression)
        expected = torch.from_numpy(np.array(Image.open(tmp_path / "a.tif").convert("RGB"))).movedim(-1, 0)
        assert torch.equal(read(tmp_path / "a.tif")[0][:, 0], expected), compression
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(4, 0)).save(tmp_path / "f.tif")
    with pytest.raises(VideoReadError, match="holds floating-point numbers, of which none is named as white"):
        probe(tmp_path / "f.tif")


def test_deep_tiff_that_pillow_reads_wrongly(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    codes = np.random.default_rng(0).integers(0, 65536, (8, 12)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", codes, photometric="miniswhite")
    expected = torch.from_numpy(((65535 - codes.astype(np.float32)) / 257).round())
    assert (read(tmp_path / "a.tif")[0][:, 0].float() - expected).abs().max() <= 1
    tifffile.imwrite(tmp_path / "b.tif", np.stack([codes] * 3), photometric="rgb", planarconfig="separate")
    with pytest.raises(VideoReadError, match=r"deep channels one after the other.*Convert it"):
        probe(tmp_path / "b.tif")


def test_sixteen_bit_colour_keeps_its_precision(tmp_path):
    codes = np.random.default_rng(0).integers(0, 65536, (8, 12, 3)).astype(np.uint16)
    for name, codec, pix_fmt in (("a.png", "png", "rgb48be"), ("a.tif", "tiff", "rgb48le"), ("a.ppm", "ppm", "rgb48be")):
        encoder = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 12, 8, pix_fmt, Fraction(1)
        frame = av.VideoFrame.from_ndarray(codes, format=pix_fmt)
        frame.pts = 0
        (tmp_path / name).write_bytes(b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)]))
        with VideoReader(tmp_path / name) as reader:
            values = (next(iter(reader))[:, 0] + 1) / 2 * 65535
        assert (values - torch.from_numpy(codes.astype(np.float32)).movedim(-1, 0)).abs().max() < 0.02, name


def test_avif_is_one_picture_whatever_its_suffix(tmp_path):
    rgb = numbered_frames(1)[0]
    write_image(tmp_path / "a.avif", torch.from_numpy(rgb).movedim(-1, 0))
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "a.avif").convert("RGB"))).movedim(-1, 0)
    assert torch.equal(read(tmp_path / "a.avif")[0][:, 0], expected)
    (tmp_path / "a.avif").rename(tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").kind == "image"
    assert torch.equal(read(tmp_path / "a.mp4")[0][:, 0], expected)


def test_tiles_of_heic_are_one_picture(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif, of the extra heic")
    rgb = np.array(Image.fromarray(numbered_frames(1, 96, 128)[0]).resize((1100, 900)))
    write_image(tmp_path / "a.heic", torch.from_numpy(rgb).movedim(-1, 0))
    frame = read(tmp_path / "a.heic")[0][:, 0]
    assert frame.shape == (3, 900, 1100)
    assert (frame.float() - torch.from_numpy(rgb).movedim(-1, 0)).abs().mean() < 4


def test_alpha_tag_in_capitals(tmp_path):
    rgba = np.zeros((4, 32, 32, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[:, :16, :, 3] = 0
    path = encode(tmp_path / "a.webm", rgba, "libvpx-vp9", "yuva420p", array_format="rgba")
    data = path.read_bytes()
    # libavformat writes the tag in lower case; remuxing, mkvmerge and browsers in capitals.
    path.write_bytes(data.replace(b"alpha_mode", b"ALPHA_MODE"))
    assert read(path, background=(10, 200, 30))[0][:, 0, 2, 2].tolist() == [10, 200, 30]


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("name", "least"), [("a.webm", 33), ("a.gif", 30)])
def test_webm_and_gif_are_written(name, least, tmp_path):
    y, x = np.mgrid[0:48, 0:64]
    waves = [128 + 90 * np.sin(x / 15 + k / 4) * np.cos(y / 12) for k in range(20)]
    frames = torch.from_numpy(np.stack([np.stack([w, w * 0.8 + 20, 255 - w], -1) for w in waves]).astype(np.uint8))
    frames = frames.permute(3, 0, 1, 2)
    with VideoWriter(tmp_path / name, 25, threads=1) as writer:
        writer.write(frames)
    result, times, _ = read(tmp_path / name)
    assert times == [Fraction(k, 25) for k in range(20)]
    error = (result.float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > least
    if name == "a.webm":
        with VideoWriter(tmp_path / name, 25, codec="lossless", threads=1) as writer:
            writer.write(frames[..., :47, :63])
        assert torch.equal(read(tmp_path / name)[0], frames[..., :47, :63])


def test_what_gif_cannot_hold_is_refused(tmp_path):
    for options in ({"fps": 60}, {"fps": 25, "codec": "lossless"}, {"fps": 25, "audio_from": "x.mp4"}):
        with pytest.raises(ValueError, match="is a GIF, which holds 256 colours, at most 50 frames/s"):
            VideoWriter(tmp_path / "a.gif", **options)


# ------------------------------------------------------------------------------------------------ limits and damage


def test_limits(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(20))
    for limits, problem in [
        (ReadLimits(pixels=48 * 64 - 1), "has 3072 pixels, more than the limit of 3071"),
        (ReadLimits(frames=19), "has 20 frames, more than the limit of 19"),
    ]:
        with pytest.raises(VideoReadError, match=problem):
            read(path, limits=limits)
    read(path, limits=ReadLimits(pixels=48 * 64, frames=20, seconds=1))
    slow = encode(tmp_path / "slow.mkv", numbered_frames(2), milliseconds=[0, 90_000])
    with pytest.raises(VideoReadError, match=r"seconds, more than the limit of 60\. Set VCVAE_MAX_SECONDS or pass limits="):
        read(slow, fps=24, limits=ReadLimits(seconds=60))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    monkeypatch.setenv("VCVAE_MAX_PIXELS", "3000")
    for name in ("a.png", "a.mp4"):
        with pytest.raises(VideoReadError, match="limit of 3000"):
            probe(tmp_path / name)
    monkeypatch.setenv("VCVAE_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="VCVAE_MAX_PIXELS: 'many' must be a positive integer"):
        probe(path)


def test_a_header_of_gigabytes_is_refused_before_it_is_allocated(tmp_path):
    resource = pytest.importorskip("resource", reason="measures memory as POSIX systems do")
    screen = struct.pack("<HHBBB", 40_000, 30_000, 0xF0, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, 40_000, 30_000, 0) + b"\x02\x02\x44\x01\x00;"
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + screen + image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoReadError, match=r"1\.2e\+09 pixels, more than the limit"):
        probe(tmp_path / "a.gif")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_pillows_own_errors_are_ours(tmp_path, monkeypatch):
    data = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(data, "PNG")
    broken = bytearray(data.getvalue())
    at = broken.index(b"IDAT")
    broken[at : at + 4] = b"\x00DAT"  # Pillow: SyntaxError
    (tmp_path / "a.png").write_bytes(bytes(broken))
    with pytest.raises(VideoReadError, match="cannot be decoded as an image"):
        probe(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "b.png").write_bytes(data.getvalue())
    with pytest.raises(VideoReadError, match="too large for Pillow"):
        probe(tmp_path / "b.png")


TRUNCATED = {
    "a.gif": ("gif", "rgb8", {}),
    "a.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "a.mkv": ("libx264", "yuv420p", {}),
    "live.mkv": ("libx264", "yuv420p", {"live": "1"}),
    "a.ts": ("libx264", "yuv420p", {}),
    "a.flv": ("libx264", "yuv420p", {}),
    "a.avi": ("mpeg4", "yuv420p", {}),
    "a.mp4": ("libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "a.wmv": ("wmv2", "yuv420p", {}),
    "a.mxf": ("mpeg2video", "yuv420p", {}),
    "a.y4m": ("wrapped_avframe", "yuv420p", {}),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_file_is_never_a_shorter_one(name, tmp_path):
    codec, pix_fmt, options = TRUNCATED[name]
    muxing = {key: value for key, value in options.items() if key in ("live", "movflags")}
    coding = {key: value for key, value in options.items() if key not in muxing} | ({"g": "12"} if codec != "gif" else {})
    if codec == "wrapped_avframe":
        planes = bytes(range(200)) * 100
        data = b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420\n" + (b"FRAME\n" + planes[: 64 * 48 * 3 // 2]) * 30
        path = tmp_path / name
        path.write_bytes(data)
    else:
        path = encode(tmp_path / name, numbered_frames(30), codec, pix_fmt, options=coding, container_options=muxing)
        data = path.read_bytes()
    assert read(path)[0].shape[1] == 30
    rng = np.random.default_rng(0)
    for cut in rng.integers(len(data) // 3, len(data) - 8, 6):
        path.write_bytes(data[:cut])
        with pytest.raises(VideoReadError, match=r"truncated or damaged|cannot be opened|no decodable frame"):
            read(path)


def test_a_picture_that_asks_for_too_much_memory_is_refused(tmp_path, monkeypatch):
    """A damaged PNG's chunk claims gigabytes: Pillow asks for them (found by `tests/soak/media.py`)."""
    from PIL.PngImagePlugin import PngImageFile

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")

    def greedy(image):
        raise MemoryError

    monkeypatch.setattr(PngImageFile, "load_end", greedy)
    with pytest.raises(VideoReadError, match="asks for more memory than there is"):
        probe(tmp_path / "x.png")
