"""Copying the audio of a source beside written video, packet by packet. Not in the paper."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from .decoding import open_container
from .info import VideoReadError
from .sources import first_frame_time


class AudioCopy:
    """The audio packets of a source, re-timed to the written video and handed over in step with it.

    Packets are kept or dropped whole, so a cut is accurate to one of them (about 20 ms).
    """

    def __init__(self, path: Path, start: Fraction, stop: Fraction | None):
        self.path, self._start, self._stop = path, start, stop
        origin = first_frame_time(path)
        self._source = open_container(path)
        if not self._source.streams.audio:
            self._source.close()
            raise VideoReadError(path, "has no audio to copy", "Pass another audio_from or none.")
        self._shift = origin + start
        if start > 0 and self._source.format.name != "mpeg":  # see `Decoding.seekable`
            self._source.seek(int(self._shift * av.time_base))
        self._streams: dict[int, av.AudioStream] = {}
        self._packets = self._kept()
        self._pending = next(self._packets, None)

    def _kept(self) -> Iterator[av.Packet]:
        for packet in self._source.demux(self._source.streams.audio):
            if packet.pts is None or packet.dts is None:
                continue  # the demuxer's end marker
            begin = packet.pts * packet.time_base - self._shift
            if self._start > 0 and begin + (packet.duration or 0) * packet.time_base <= 0:
                continue
            if self._stop is not None and begin >= self._stop - self._start:
                continue
            offset = round(self._shift / packet.time_base)
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            yield packet

    def attach(self, container: av.container.OutputContainer) -> None:
        """Add the source's audio streams to the output."""
        self._container = container
        for stream in self._source.streams.audio:
            codec = stream.codec.canonical_name
            if codec not in container.supported_codecs:
                raise ValueError(
                    f"audio_from: {container.format.name} cannot hold the {codec} audio of {self.path} without re-encoding "
                    "it; write .mkv, or no audio."
                )
            self._streams[stream.index] = container.add_stream_from_template(stream)

    def copy_until(self, time: Fraction | None) -> None:
        """Hand over packets that begin up to `time` seconds of the written video; all with None."""
        while self._pending is not None:
            packet = self._pending
            if time is not None and packet.pts * packet.time_base > time:
                return
            packet.stream = self._streams[packet.stream_index]
            self._container.mux(packet)
            self._pending = next(self._packets, None)

    def close(self) -> None:
        self._source.close()
