"""Video files made with PyAV itself, independent of the package's writer, for the tests of reading and writing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BLOCK = 8


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(count, H, W, 3) uint8: eight blocks of the top row spell the frame number in binary, the rest moves."""
    y, x = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        for channel, speed in enumerate((3, 5, 7)):
            frames[number, :, :, channel] = (2 * x + 3 * y + speed * number) // (channel + 1) % 200 + 20
        for bit in range(8):
            frames[number, :BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frames


def frame_numbers(clip) -> list[int]:
    """The numbers that the blocks of a (3, T, H, W) clip in [-1, 1] or [0, 255] spell."""
    clip = np.asarray(clip, dtype=np.float64)
    threshold = 128 if clip.max() > 2 else 0
    centre = BLOCK // 2
    return [
        sum(1 << bit for bit in range(8) if clip[:, t, centre, bit * BLOCK + centre].mean() > threshold)
        for t in range(clip.shape[1])
    ]


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 25,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    milliseconds: list[int] | None = None,
    rotation: tuple[int, bool] | None = None,
    array_format: str = "rgb24",
) -> Path:
    """Encode (T, H, W, C) uint8; `milliseconds` are the frames' times, `rotation` (degrees, flipped) the display matrix."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.thread_count = 1
        if milliseconds is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=array_format)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def add_tone(path: Path, out: Path, codec: str = "aac", seconds: float = 2.0) -> Path:
    """Remux a video with a tone beside it."""
    samples = (np.sin(np.arange(int(seconds * 44100)) * 0.05) * 12000).astype(np.int16)
    with av.open(str(path)) as source, av.open(str(out), "w") as container:
        video = container.add_stream_from_template(source.streams.video[0])
        audio = container.add_stream(codec, rate=44100, layout="mono")
        packets = [packet for packet in source.demux(video=0) if packet.size]
        size = audio.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=audio.format.name, layout="mono", rate=44100, frame_size=size)
        tone = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        tone.sample_rate, tone.pts = 44100, 0
        for packet in packets:
            packet.stream = video
            container.mux(packet)
        for frame in [*resampler.resample(tone), *resampler.resample(None)]:
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return out


def audio_packets(path: Path) -> list[tuple[Fraction, bytes]]:
    """(seconds, payload) of every audio packet."""
    with av.open(str(path)) as container:
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(audio=0) if p.size]
