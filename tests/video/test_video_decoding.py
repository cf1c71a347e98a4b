"""Decoding: exact colour, frame accuracy after seeking, orientation, alpha, image sequences, damage."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from video_files import add_tone, encode, frame_numbers, numbered_frames

from vc_vae_diffusers.video import VideoReader, VideoReadError, colour, decoding, probe, read_clip


def read_all(path: Path, **options) -> torch.Tensor:
    with VideoReader(path, dtype=options.pop("dtype", torch.uint8), **options) as reader:
        return torch.cat(list(reader), dim=1)


# ------------------------------------------------------------------------------------------------ colour

LUMA = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def yuv_frame(planes: np.ndarray, pix_fmt: str, matrix: int, full: bool) -> av.VideoFrame:
    """A 4:4:4 frame with exactly these planes (3, H, W)."""
    frame = av.VideoFrame(planes.shape[2], planes.shape[1], pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // values.dtype.itemsize), values.dtype)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    return frame


def exact_rgb(planes: np.ndarray, bits: int, matrix: int, full: bool) -> np.ndarray:
    """ITU-T H.273 in float64, (3, H, W) in [0, 255]."""
    (kr, kb), unit = LUMA[matrix], 2 ** (bits - 8)
    y, cb, cr = planes.astype(np.float64)
    if full:
        y, cb, cr = y / (2**bits - 1), (cb - 128 * unit) / (2**bits - 1), (cr - 128 * unit) / (2**bits - 1)
    else:
        y, cb, cr = (y - 16 * unit) / (219 * unit), (cb - 128 * unit) / (224 * unit), (cr - 128 * unit) / (224 * unit)
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue]), 0, 1) * 255


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize(("pix_fmt", "bits", "tolerance"), [("yuv444p", 8, 0.52), ("yuv444p10le", 10, 1e-3)])
def test_matrix_and_range(pix_fmt, bits, tolerance, matrix, full):
    rng = np.random.default_rng(0)
    planes = rng.integers(16 << (bits - 8), 236 << (bits - 8), (3, 32, 48)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = yuv_frame(planes, pix_fmt, matrix, full)
    rgb = colour.frame_to_rgb(frame, colour.VideoReformatter())
    assert np.abs(rgb.numpy() - exact_rgb(planes, bits, matrix, full)).max() <= tolerance
    # The check can fail: the other matrix and the other range are far away.
    assert np.abs(rgb.numpy() - exact_rgb(planes, bits, 6 if matrix == 1 else 1, full)).max() > 5
    assert np.abs(rgb.numpy() - exact_rgb(planes, bits, matrix, not full)).max() > 5


@pytest.mark.parametrize(("width", "height", "matrix"), [(1024, 576, 6), (1280, 16, 1), (16, 578, 1)])
def test_untagged_matrix_follows_the_size(width, height, matrix):
    rng = np.random.default_rng(1)
    planes = rng.integers(16, 236, (3, height, width)).astype(np.uint8)
    rgb = colour.frame_to_rgb(yuv_frame(planes, "yuv444p", 2, False), colour.VideoReformatter())
    assert np.abs(rgb.numpy() - exact_rgb(planes, 8, matrix, False)).max() <= 0.52


def test_subsampled_chroma_is_interpolated(tmp_path):
    """A linear ramp of chroma at half resolution reads back as a linear ramp, not as steps of two equal pixels."""
    frame = av.VideoFrame(128, 16, "yuv420p")
    for plane, values in zip(frame.planes, (np.full(128, 128), *([np.linspace(64, 192, 64).round()] * 2)), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = 1, 1
    red = colour.frame_to_rgb(frame, colour.VideoReformatter())[0, 8, 4:-4].float()
    assert red.diff().min() >= 1  # steps of two equal pixels would have a difference of 0 at every other pixel
    ideal = torch.linspace(red[0], red[-1], len(red))
    assert (red - ideal).abs().max() < 2.5


def test_ten_bits_survive_in_float_and_are_rounded_in_uint8(tmp_path):
    ramp = np.tile(np.linspace(16 * 256, 235 * 256, 128).round().astype(np.uint16), (16, 1))
    with av.open(str(tmp_path / "deep.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 16, "yuv420p10le"
        frame = av.VideoFrame(128, 16, "yuv420p10le")
        for index, plane in enumerate(frame.planes):
            rows = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
            if index == 0:
                rows[:, :128] = ramp // 64
            plane.update(rows.tobytes())
        frame.color_range = 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(tmp_path / "deep.mkv")
    assert (info.bit_depth, info.pixel_format) == (10, "yuv420p10le")
    deep = (read_all(tmp_path / "deep.mkv", dtype=torch.float32)[0, 0] + 1) * 127.5
    exact = torch.from_numpy((ramp // 64 - 64) / 876 * 255)
    assert (deep - exact).abs().max() < 1e-3
    assert (deep - deep.round()).abs().max() > 0.4  # precision beyond 8 bits is there
    assert torch.equal(read_all(tmp_path / "deep.mkv")[0, 0], exact.float().round().to(torch.uint8))


# ------------------------------------------------------------------------------------------------ seeking

OPEN_GOP = {"bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0"}
SEEKABLE = {
    "b_frames.mp4": ("libx264", "yuv420p", {"bf": "3", "g": "12"}),
    "open_gop.mp4": ("libx264", "yuv420p", OPEN_GOP),
    "open_gop.mkv": ("libx264", "yuv420p", OPEN_GOP),
    "intra_refresh.mp4": ("libx264", "yuv420p", {"x264-params": "intra-refresh=1:keyint=12"}),
    "altref.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "auto-alt-ref": "1", "cpu-used": "8", "deadline": "realtime"}),
    "intra.mov": ("prores_ks", "yuv422p10le", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "stream.ts": ("libx264", "yuv420p", {"g": "12", "bf": "3"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "4"}),
}


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_is_frame_accurate(name, tmp_path, monkeypatch):
    codec, pix_fmt, options = SEEKABLE[name]
    path = encode(tmp_path / name, numbered_frames(90), codec, pix_fmt, options=options)
    whole = read_all(path)
    assert frame_numbers(whole) == list(range(90))
    decoded = []
    frames = decoding.Decoding.frames

    def counted(self, seek=None):
        for frame in frames(self, seek):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoding.Decoding, "frames", counted)
    for start in (1, 11, 12, 13, 37, 60, 86):
        by_number = read_clip(path, start_frame=start, num_frames=4, dtype=torch.uint8)
        assert torch.equal(by_number, whole[:, start : start + 4]), start
        by_time = read_clip(path, start_time=Fraction(start, 25), num_frames=4, dtype=torch.uint8)
        assert torch.equal(by_time, whole[:, start : start + 4]), start
    if name in ("b_frames.mp4", "open_gop.mkv", "altref.webm", "intra.mov"):
        # Each clip costs the probe's frame, at most a group of pictures, and its own frames: seeking did happen.
        assert len(decoded) <= 14 * (1 + 12 + 4 + 2)


def test_a_changed_file_is_indexed_again(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(20))
    assert frame_numbers(read_clip(path, start_frame=5, num_frames=2)) == [5, 6]
    encode(path, numbered_frames(30)[10:], milliseconds=[50 * n for n in range(20)])
    assert frame_numbers(read_clip(path, start_frame=5, num_frames=2)) == [15, 16]


def test_variable_frame_rate_by_number_and_by_time(tmp_path):
    times = [0, 40, 80, 500, 540, 1000, 1010, 1020, 1500, 1540]
    path = encode(tmp_path / "vfr.mkv", numbered_frames(10), milliseconds=times, options={"bf": "2", "g": "4"})
    with VideoReader(path, start=3, stop=8) as reader:
        (chunk, stamps), *rest = list(reader.timed_chunks())
    assert not rest
    assert frame_numbers(chunk) == [3, 4, 5, 6, 7]
    assert [float(stamp) for stamp in stamps] == [0.5, 0.54, 1.0, 1.01, 1.02]
    # 0.7 s shows frame 4, which stays until 1.0 s.
    assert frame_numbers(read_clip(path, start_time=0.7, num_frames=3)) == [4, 5, 6]
    assert frame_numbers(read_all(path, start_time=0.7, stop_time=1.015)) == [4, 5, 6]


def test_start_beyond_the_end(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(10))
    with pytest.raises(VideoReadError, match="has 10 frames, none at 10"):
        read_all(path, start=10)
    with pytest.raises(VideoReadError, match=r"ends at 0\.400 s"):
        read_all(path, start_time=5)
    avi = encode(tmp_path / "a.avi", numbered_frames(10), "mpeg4")
    with pytest.raises(VideoReadError, match="has 10 frames, none at 12"):
        read_all(avi, start=12)


# ------------------------------------------------------------------------------------------------ orientation, alpha


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_display_matrix_is_applied(degrees, flipped, tmp_path):
    source = numbered_frames(3, 48, 80)
    plain = read_all(encode(tmp_path / "plain.mp4", source))
    turned = encode(tmp_path / "turned.mp4", source, rotation=(degrees, flipped))
    expected = torch.rot90(plain, degrees // 90, dims=(2, 3))  # counter-clockwise
    expected = expected.flip(3) if flipped else expected  # the mirror comes after the rotation
    info = probe(turned)
    assert (info.height, info.width) == tuple(expected.shape[2:])
    assert torch.equal(read_all(turned), expected)


def test_odd_angles_are_refused(tmp_path):
    path = encode(tmp_path / "skew.mp4", numbered_frames(2), rotation=(30, False))
    with pytest.raises(VideoReadError, match="no rotation by a multiple of 90"):
        probe(path)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "qtrle", "argb"), ("a.mkv", "ffv1", "bgra")],
)
def test_alpha_is_composited_on_the_background(name, codec, pix_fmt, tmp_path):
    rgba = np.zeros((4, 32, 32, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    rgba[:, :, :16, 3] = 255
    rgba[:, :, 16:, 3] = 64
    path = encode(tmp_path / name, rgba, codec, pix_fmt, array_format="rgba")
    assert probe(path).has_alpha
    colour, tolerance = torch.tensor([200.0, 100.0, 50.0]), 6 if codec == "libvpx-vp9" else 0.51
    for background in ((0, 0, 0), (0, 255, 90)):
        frames = read_all(path, background=background).float()
        mixed = colour * 64 / 255 + torch.tensor(background) * (1 - 64 / 255)
        assert (frames[:, 2, 16, 4] - colour).abs().max() <= tolerance
        assert (frames[:, 2, 16, 28] - mixed).abs().max() <= tolerance


# ------------------------------------------------------------------------------------------------ images


def test_image_kinds_equal_pillow(tmp_path):
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (17, 23, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb).save(tmp_path / "a.bmp")
    Image.fromarray(rgb).save(tmp_path / "a.tif")
    Image.fromarray(rgb).save(tmp_path / "a.jpg", quality=90)
    Image.fromarray(rgb).save(tmp_path / "a.webp", quality=90)
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(rgb).quantize(16).save(tmp_path / "palette.png")
    for path in sorted(tmp_path.iterdir()):
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)
        info = probe(path)
        assert (info.kind, info.num_frames, info.width, info.height) == ("image", 1, 23, 17), path
        assert torch.equal(read_all(path)[:, 0], expected), path


def test_sixteen_bit_png_keeps_its_precision(tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = read_all(tmp_path / "deep.png", dtype=torch.float32)[0, 0]
    assert (read - torch.from_numpy(values / 32767.5 - 1)).abs().max() < 1e-6


def test_image_alpha(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 51
    for name in ("a.png", "a.webp"):
        Image.fromarray(rgba).save(tmp_path / name, lossless=True)
        frame = read_all(tmp_path / name, background=(0, 100, 0))[:, 0]
        assert frame[:, 2, 3].tolist() == [40, 80, 0], name


@pytest.mark.parametrize("suffix", [".webp", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_pillow(orientation, suffix, tmp_path):
    stored = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    stored.save(path, lossless=True, exif=exif)
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == orientation
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).movedim(-1, 0)
    assert torch.equal(read_all(path)[:, 0], expected)


def write_sequence(folder: Path, pattern: str, count: int) -> None:
    folder.mkdir()
    for number, frame in enumerate(numbered_frames(count)):
        Image.fromarray(frame).save(folder / (pattern % number))


def test_image_sequences(tmp_path):
    write_sequence(tmp_path / "f", "img%d.png", 12)  # 10 and 11 sort behind 9 only in natural order
    for path in (tmp_path / "f", tmp_path / "f" / "img%d.png", tmp_path / "f" / "img*.png"):
        info = probe(path, sequence_fps=10)
        assert (info.kind, info.num_frames, info.fps, info.duration) == ("sequence", 12, 10, Fraction(12, 10))
        assert frame_numbers(read_all(path)) == list(range(12))
        assert frame_numbers(read_all(path, start=3, stop=5)) == [3, 4]
        assert frame_numbers(read_all(path, sequence_fps=10, start_time=0.55, stop_time=0.8)) == [5, 6, 7]
    assert frame_numbers(read_all(tmp_path / "f", sequence_fps=10, fps=5)) == [0, 2, 4, 6, 8, 10]


def test_image_sequence_errors(tmp_path):
    write_sequence(tmp_path / "f", "img_%03d.png", 4)
    (tmp_path / "f" / "img_002.png").unlink()
    with pytest.raises(VideoReadError, match="frame number 2 is missing"):
        probe(tmp_path / "f" / "img_%03d.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "f" / "img_002.png")
    with pytest.raises(VideoReadError, match="changes size at"):
        read_all(tmp_path / "f" / "img_%03d.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoReadError, match="folder without images"):
        probe(tmp_path / "empty")
    for pattern in ("f/none_%d.png", "f/none*.png", "nowhere/%d.png"):
        with pytest.raises(VideoReadError, match="matches no file"):
            probe(tmp_path / pattern)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    with pytest.raises(VideoReadError, match="animation of 2 frames"):
        probe(tmp_path / "a.webp")


# ------------------------------------------------------------------------------------------------ damage


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.mp4").write_text("this is no video " * 100)
    (tmp_path / "text.jpg").write_text("this is no image " * 100)
    (tmp_path / "text.png").write_text("this is no image " * 100)
    for name, problem in {
        "missing.mp4": "does not exist",
        "missing.png": "does not exist",
        "empty.mp4": r"is empty \(0 bytes\)",
        "empty.jpg": r"is empty \(0 bytes\)",
        "text.mp4": "cannot be opened as a video",
        "text.jpg": "cannot be decoded",
        "text.png": "cannot be decoded",
    }.items():
        with pytest.raises(VideoReadError, match=problem) as caught:
            probe(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
    ],
)
def test_a_file_cannot_name_another(name, text, tmp_path):
    """FFmpeg would open the other one, so that an upload would show a server's own files."""
    encode(tmp_path / "secret.mp4", numbered_frames(10))
    (tmp_path / name).write_text(text)
    with av.open(str(tmp_path / name)) as container:
        assert next(container.decode(video=0)).width > 0
    with pytest.raises(VideoReadError, match=r"cannot be opened as a video .* a list of other files"):
        probe(tmp_path / name)


def test_files_without_pictures(tmp_path):
    with_sound = add_tone(encode(tmp_path / "v.mp4", numbered_frames(10)), tmp_path / "av.mp4")
    assert probe(with_sound).has_audio
    with av.open(str(with_sound)) as source, av.open(str(tmp_path / "a.m4a"), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    with pytest.raises(VideoReadError, match=r"no video stream \(audio only\)"):
        probe(tmp_path / "a.m4a")
    with av.open(str(tmp_path / "none.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.start_encoding()
    with pytest.raises(VideoReadError, match=r"no decodable frame|cannot be opened"):
        probe(tmp_path / "none.mkv")


@pytest.mark.parametrize("name", ["front.mp4", "back.mp4", "a.mkv", "a.avi", "fragments.mov"])
def test_truncated_files_raise_and_their_good_part_can_be_read(name, tmp_path):
    flags = {"front.mp4": {"movflags": "+faststart"}, "fragments.mov": {"movflags": "frag_keyframe+empty_moov"}}
    path = encode(tmp_path / name, numbered_frames(60), options={"g": "12"}, container_options=flags.get(name))
    assert frame_numbers(read_all(path)) == list(range(60))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    if name == "back.mp4":
        with pytest.raises(VideoReadError, match="cannot be opened as a video"):
            read_all(path)
        return
    with pytest.raises(VideoReadError, match="truncated or damaged after"):
        read_all(path)
    assert frame_numbers(read_all(path, stop=12)) == list(range(12))


def packets_of(path: Path) -> list[tuple[int, int]]:
    """(position, size) of every video packet of an mp4 file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def test_a_file_cut_between_two_packets_is_noticed(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(60), options={"bf": "0"}, container_options={"movflags": "+faststart"})
    position, _ = packets_of(path)[30]
    path.write_bytes(path.read_bytes()[:position])
    with pytest.raises(VideoReadError, match=r"after 30 readable frames of this pass \(30 of 60 packets are there\)"):
        read_all(path)


@pytest.mark.parametrize("damaged", [6, 24, 45])
@pytest.mark.parametrize("kept", [0.5, 0])
def test_damage_inside_a_file_is_found_at_its_frame(kept, damaged, tmp_path):
    """Half a packet of zeros makes the decoder conceal, a whole one makes it fail; neither passes as a good frame."""
    options = {"g": "12", "bf": "0", "crf": "2"}
    rng = np.random.default_rng(0)
    noisy = np.clip(numbered_frames(60).astype(int) + rng.integers(-20, 20, (60, 48, 64, 3)), 0, 255).astype(np.uint8)
    path = encode(tmp_path / "a.mp4", noisy, options=options, container_options={"movflags": "+faststart"})
    position, size = packets_of(path)[damaged]
    begin = max(4, int(size * kept))  # the first four bytes are the length of what follows
    data = bytearray(path.read_bytes())
    data[position + begin : position + size] = bytes(size - begin)
    path.write_bytes(bytes(data))
    assert frame_numbers(read_all(path, stop=damaged)) == list(range(damaged))
    with pytest.raises(VideoReadError, match=f"damaged after {damaged} readable frames"):
        read_all(path)


def test_raw_stream_without_timestamps(tmp_path):
    path = encode(tmp_path / "a.h264", numbered_frames(30), options={"g": "10", "bf": "2"})
    with VideoReader(path, start=4) as reader:
        chunks = list(reader.timed_chunks())
    assert frame_numbers(torch.cat([chunk for chunk, _ in chunks], dim=1)) == list(range(4, 30))
    times = [time for _, stamps in chunks for time in stamps]
    assert all(b - a == 1 / reader.fps for a, b in itertools.pairwise(times))
    assert frame_numbers(read_all(path, start_time=1)) == list(range(25, 30))


def test_a_size_change_inside_a_stream_is_an_error_unless_resized(tmp_path):
    small = encode(tmp_path / "s.h264", numbered_frames(5, 48, 64))
    large = encode(tmp_path / "l.h264", numbered_frames(5, 96, 128))
    (tmp_path / "both.h264").write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoReadError, match="changes size"):
        read_all(tmp_path / "both.h264")
    assert read_all(tmp_path / "both.h264", resize=(48, 64)).shape == (3, 10, 48, 64)


def test_edit_list_hides_frames_from_the_count(tmp_path):
    """mp4 files trimmed without re-encoding keep hidden samples; neither the count nor the frames may show them."""
    path = encode(tmp_path / "a.mp4", numbered_frames(24), options={"bf": "0", "g": "24"})
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4  # version/flags, entry count, then duration (ms), media time (1/12800 s), rate
    assert struct.unpack(">I", data[at + 4 : at + 8])[0] == 1
    data[at + 12 : at + 16] = struct.pack(">i", struct.unpack(">i", data[at + 12 : at + 16])[0] + 6 * 512)
    path.write_bytes(bytes(data))
    assert probe(path).num_frames == 18
    assert frame_numbers(read_all(path)) == list(range(6, 24))
    assert frame_numbers(read_clip(path, start_frame=2, num_frames=3)) == [8, 9, 10]
