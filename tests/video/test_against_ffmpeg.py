"""Frame numbers, times and pictures of what real tools write, against the answer of the `ffmpeg` program.

The files are made by `ffmpeg` itself, small and from the same numbered frames. Their colour is the same all over a frame,
because versions of FFmpeg interpolate subsampled chroma differently; wrong matrices, ranges and depths show all the same.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import BLOCK, frame_numbers

from vc_vae_diffusers.video import VideoReader, read_clip

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg program")

COUNT, HEIGHT, WIDTH = 32, 64, 96


@dataclass(frozen=True)
class Made:
    """How a file is made.

    Args:
        options: of ffmpeg's output.
        rate: of the source frames.
        source: another file to make it from instead of the numbered frames, without re-encoding.
        before: options of ffmpeg's input.
        lossy: too lossy, or too short a cut, for the numbers in the pictures to be read back as 0, 1, 2, ...
    """

    options: str
    rate: str = "25"
    source: str | None = None
    before: str = ""
    lossy: bool = False


H264 = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 12 -bf 3 -x264-params scenecut=0:b-adapt=0"
OPEN = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 12 -bf 3 -x264-params open-gop=1:scenecut=0:b-adapt=0"
FIELDS = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 12 -flags +ilme+ildct -x264-params tff=1"
HEVC = "-c:v libx265 -preset ultrafast -pix_fmt yuv420p -x265-params keyint=12:bframes=3:log-level=none:pools=1:open-gop="
MPEG2 = "-c:v mpeg2video -pix_fmt yuv420p -g 12 -bf 2 -q:v 3"
MPEG4 = "-c:v mpeg4 -g 12 -bf 2 -q:v 3"
VP8 = "-c:v libvpx -g 12 -auto-alt-ref 1 -lag-in-frames 10 -cpu-used 8 -deadline realtime -b:v 2M -pix_fmt yuv420p"
VP9 = "-c:v libvpx-vp9 -g 12 -auto-alt-ref 1 -lag-in-frames 10 -cpu-used 8 -deadline realtime -b:v 2M -pix_fmt yuv420p"
PAUSES = "-vf setpts=(N+10*floor(N/7)+30*gt(N\\,20))/25/TB -fps_mode passthrough"

FILES = {
    # one H.264 stream with B-frames, in every container
    **{f"h264.{suffix}": Made(H264) for suffix in ("mp4", "mov", "m4v", "3gp", "mkv", "avi", "ts", "m2ts", "mts", "flv")},
    "h264.mpg": Made(H264),
    "fragments.mp4": Made(f"{H264} -movflags frag_keyframe+empty_moov"),
    "packet_fragments.mp4": Made(f"{H264} -movflags frag_every_frame+empty_moov+delay_moov"),
    "no_b_frames.avi": Made(f"{H264} -bf 0"),
    # structures of groups of pictures
    "open_gop.mp4": Made(OPEN),
    "open_gop.mkv": Made(OPEN),
    "open_gop.ts": Made(OPEN),
    "open_gop.avi": Made(OPEN),
    "refresh.mp4": Made("-c:v libx264 -preset ultrafast -pix_fmt yuv420p -x264-params intra-refresh=1:keyint=12"),
    "one_keyframe.mkv": Made(f"{H264} -g 300"),
    "intra.mkv": Made("-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 1"),
    "fields.mp4": Made(FIELDS),
    "fields.mkv": Made(FIELDS),
    "fields.ts": Made(FIELDS),
    # cuts without re-encoding
    "cut.mp4": Made("-c copy", source="open_gop.mp4", before="-ss 0.7", lossy=True),
    "cut.mkv": Made("-c copy", source="open_gop.mkv", before="-ss 0.7", lossy=True),
    "cut.ts": Made("-c copy", source="open_gop.ts", before="-ss 0.7", lossy=True),
    "cut_closed.mp4": Made("-c copy", source="h264.mp4", before="-ss 0.7", lossy=True),
    "cut.mpg": Made("-c copy", source="h264.mpg", before="-ss 0.7", lossy=True),
    "cut.vob": Made("-c copy", source="no_b_frames.vob", before="-ss 0.3", lossy=True),
    "cut.ogv": Made("-c copy", source="theora.ogv", before="-ss 0.3", lossy=True),
    "cut_end.mp4": Made("-c copy -t 0.9", source="h264.mp4", lossy=True),
    "cut_hevc.mp4": Made("-c copy", source="hevc_open.mp4", before="-ss 0.7", lossy=True),
    "cut_hevc.mkv": Made("-c copy", source="hevc_open.mp4", before="-ss 0.7", lossy=True),
    "before_zero.mkv": Made(f"{H264} -output_ts_offset -0.5 -avoid_negative_ts disabled"),
    "remuxed.mkv": Made("-c copy", source="h264.ts"),
    "remuxed.mp4": Made("-c copy", source="h264.mkv"),
    # other codecs
    "hevc.mp4": Made(f"{HEVC}0"),
    "hevc_open.mp4": Made(f"{HEVC}1"),
    "hevc.mkv": Made("-c copy", source="hevc_open.mp4"),
    "hevc.ts": Made("-c copy", source="hevc_open.mp4"),
    "mpeg1.mpg": Made("-c:v mpeg1video -g 12 -bf 2 -q:v 3"),
    "mpeg2.mpg": Made(MPEG2),
    "mpeg2.vob": Made(f"{MPEG2} -f vob"),
    "no_b_frames.vob": Made("-c:v mpeg2video -pix_fmt yuv420p -g 4 -q:v 12 -f vob", lossy=True),
    "no_b_frames.mpg": Made("-c:v mpeg1video -g 3 -q:v 12", lossy=True),
    "mpeg2.ts": Made(MPEG2),
    "mpeg2.mkv": Made(MPEG2),
    "mpeg2.mxf": Made(MPEG2),
    "mpeg4.avi": Made(MPEG4),
    "mpeg4.mp4": Made(MPEG4),
    "mpeg4.mkv": Made(MPEG4),
    "mpeg4.ts": Made(MPEG4),
    "no_b_frames.ts": Made("-c:v mpeg4 -g 12 -q:v 3"),
    "wmv2.wmv": Made("-c:v wmv2 -q:v 3"),
    "flv1.flv": Made("-c:v flv -q:v 3"),
    "vp8.webm": Made(VP8),
    "vp9.webm": Made(VP9),
    "vp9.mp4": Made(VP9),
    "live.webm": Made(f"{VP9} -live 1"),
    "av1.mp4": Made("-c:v libaom-av1 -cpu-used 8 -usage realtime -g 12 -b:v 2M -pix_fmt yuv420p"),
    "av1.mkv": Made("-c:v libaom-av1 -cpu-used 8 -usage realtime -g 12 -b:v 2M -pix_fmt yuv420p"),
    "theora.ogv": Made("-c:v libtheora -g 12 -q:v 8"),
    "mjpeg.avi": Made("-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
    "mjpeg.mov": Made("-c:v mjpeg -q:v 2 -pix_fmt yuvj444p"),
    "prores.mov": Made("-c:v prores_ks"),
    "raw.y4m": Made("-pix_fmt yuv420p"),
    "raw.avi": Made("-c:v rawvideo -pix_fmt bgr24"),
    "palette.avi": Made("-c:v rawvideo -pix_fmt pal8"),
    "huffyuv.avi": Made("-c:v huffyuv -pix_fmt yuv422p"),
    "png.mov": Made("-c:v png -pix_fmt rgb24"),
    "qtrle.mov": Made("-c:v qtrle -pix_fmt rgb24"),
    "animation.gif": Made("-filter_complex split[a][b];[a]palettegen[p];[b][p]paletteuse"),
    # pixel formats, depths and ranges
    **{
        f"ffv1_{name}.mkv": Made(f"-c:v ffv1 -pix_fmt {name}")
        for name in (
            *("yuv420p", "yuv422p", "yuv444p", "gray", "bgr0", "yuv420p10le", "yuv444p12le", "yuv422p16le"),
            *("gray10le", "gray16le", "gbrp10le", "gbrp16le"),
        )
    },
    "full_range.mp4": Made(f"{H264} -vf scale=out_range=full -color_range pc"),
    "full_range_10.mkv": Made("-c:v ffv1 -pix_fmt yuv420p10le -vf scale=out_range=full -color_range pc"),
    "bt709.mp4": Made(f"{H264} -vf scale=out_color_matrix=bt709 -colorspace bt709"),
    "bt2020_10.mkv": Made("-c:v ffv1 -pix_fmt yuv444p10le -vf scale=out_color_matrix=bt2020 -colorspace bt2020nc"),
    # rates
    **{f"ntsc.{suffix}": Made(H264, rate="30000/1001") for suffix in ("mp4", "mkv", "avi", "ts", "flv")},
    "film.mkv": Made(H264, rate="24000/1001"),
    "fast.mkv": Made(H264, rate="240"),
    "fast.mp4": Made(H264, rate="240"),
    "slow.mp4": Made(H264, rate="1"),
    **{f"pauses.{suffix}": Made(f"{H264} {PAUSES}") for suffix in ("mp4", "mkv", "ts", "avi")},
    "pauses.webm": Made(f"{VP9} {PAUSES}"),
}


def tinted_frames() -> np.ndarray:
    """(COUNT, HEIGHT, WIDTH, 3) uint8: moving waves of grey, the number in blocks, tinted by the number."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = []
    for number in range(COUNT):
        grey = 125 + 50 * np.sin(x / 9 + number / 3) + 25 * np.cos(y / 7 - number / 5)
        for bit in range(8):
            grey[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 215 if number >> bit & 1 else 40
        frames.append(np.stack([grey + 12 + number // 2, grey - 4, grey - 20 + number // 3], axis=-1))
    return np.stack(frames).round().astype(np.uint8)


def run(*arguments: str) -> bytes:
    command = ["ffmpeg", "-nostdin", "-y", "-v", "error", "-threads", "1", *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ffmpeg")
    (folder / "frames.rgb").write_bytes(tinted_frames().tobytes())
    return folder


def made(folder: Path, name: str) -> Path:
    """The file of this name; made if it is not there."""
    path, how = folder / name, FILES[name]
    if path.exists():
        return path
    if how.source is not None:
        source = ["-i", str(made(folder, how.source))]
    else:
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", how.rate]
        source += ["-i", str(folder / "frames.rgb")]
    try:
        run(*how.before.split(), *source, *how.options.split(), str(path))
    except subprocess.CalledProcessError as error:
        path.unlink(missing_ok=True)
        pytest.skip(f"this ffmpeg cannot make {name}: {error.stderr.decode().splitlines()[:1]}")
    return path


def ffmpeg_frames(path: Path) -> tuple[torch.Tensor, list[Fraction]]:
    """All frames as (3, T, H, W) uint8 and their times in seconds from the first one, as the program has them."""
    times = path.with_suffix(path.suffix + ".times")
    sws = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
    raw = run(
        *("-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough", "-sws_flags", sws, "-pix_fmt", "rgb24"),
        *("-f", "rawvideo", "-", "-map", "0:v:0", "-fps_mode", "passthrough", "-enc_time_base", "-1"),
        *("-f", "framehash", "-hash", "adler32", str(times)),
    )
    frames = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3).copy()).permute(3, 0, 1, 2)
    lines = times.read_text().splitlines()
    base = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb 0"))
    stamps = [int(line.split(",")[2]) * base for line in lines if not line.startswith("#")]
    return frames, [stamp - stamps[0] for stamp in stamps]


@pytest.mark.parametrize("name", FILES)
def test_equals_ffmpeg(name, folder):
    path, how = made(folder, name), FILES[name]
    expected, times = ffmpeg_frames(path)
    with VideoReader(path, dtype=torch.uint8, threads=1) as reader:
        pieces = list(reader.timed_chunks())
    frames, stamps = torch.cat([chunk for chunk, _ in pieces], dim=1), [time for _, part in pieces for time in part]
    assert frames.shape == expected.shape
    assert reader.info.duration is None or reader.info.duration > 0
    if all(before < after for before, after in itertools.pairwise(times)):
        assert stamps == times
    else:  # ffmpeg 5 shows two frames of a program stream at once
        assert stamps == [number / Fraction(how.rate) for number in range(COUNT)]
    # Versions of swscale round differently, and all of them round 16 bits twice on their way to 8.
    assert (frames.int() - expected.int()).abs().max() <= 2
    if not how.lossy:
        assert frame_numbers(frames) == list(range(COUNT))
    # Which picture a time belongs to hangs on where packets of a program stream begin, which is anywhere. Seeking in a
    # transport stream leads anywhere, too.
    few = (min(9, frames.shape[1] - 2), frames.shape[1] - 3)
    for start in range(1, frames.shape[1] - 2) if path.suffix in (".mpg", ".vob", ".ogv", ".ts") else few:
        for where in ({"start_frame": start}, {"start_time": stamps[start]}):
            clip = read_clip(path, num_frames=2, dtype=torch.uint8, **where)
            assert torch.equal(clip, frames[:, start : start + 2]), where
