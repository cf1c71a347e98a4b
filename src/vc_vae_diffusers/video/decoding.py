"""Decoding one video file: its frames in presentation order with their times, seeking, damage. Not in the paper.

FFmpeg decides what a container and a codec hold. Here is only what it leaves to its caller: frames without times, what
counts as damage, and whether packets number the frames.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Disposition

from .containers import missing_end
from .gif import gif_pixels
from .info import ReadLimits, VideoReadError, check_machine
from .stills import check_file

# What FFmpeg would read as lists of other files and of addresses, whatever the file is called. A video holds its own frames.
_PLAYLISTS = frozenset({"concat", "dash", "hls", "imf", "sdp", "webm_dash_manifest"})
_FORMATS = ",".join(sorted(av.formats_available - _PLAYLISTS))
# Containers and codecs in which one packet is one presented frame, so that a scan of packet times numbers the frames.
_INDEXABLE_FORMATS = frozenset({"mov", "matroska"})
_INDEXABLE_CODECS = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "prores", "ffv1", "png", "dnxhd"})
# AVI has no presentation times. For them FFmpeg takes, in these codecs, the time of the packet that a frame came out with.
_REORDERED_IN_AVI = frozenset({"h264", "hevc", "vvc"})
# Codecs whose decoders do not wait for a keyframe: they make up what a picture refers to.
_UNWAITING = frozenset({"mpeg4", "h263", "flv1", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "rv10", "rv20"})


def file_url(path: Path) -> str:
    """The name under which FFmpeg opens a file and nothing else: `12:30.mp4` is no protocol."""
    return f"file:{os.fspath(path)}"


def open_container(path: Path) -> av.container.InputContainer:
    """Raises VideoReadError for anything that FFmpeg does not know as a media file, and for playlists."""
    check_file(path)
    try:
        return av.open(file_url(path), container_options={"format_whitelist": _FORMATS}, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        check_machine(path, error)
        problem = f"cannot be opened as a video ({error.strerror or error})"
        remedy = "The file is damaged, incomplete, of another kind or a list of other files; re-encode or download it again."
        raise VideoReadError(path, problem, remedy) from error


def picture_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The video streams that are no cover pictures."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


class Decoding:
    """One pass over the video stream of one file: opens it, seeks when asked, yields frames, notices damage."""

    def __init__(self, path: Path, threads: int, limits: ReadLimits):
        self.path = path
        self.container = open_container(path)
        try:
            self._open_stream(threads, limits)
        except BaseException:
            self.container.close()
            raise

    def _open_stream(self, threads: int, limits: ReadLimits) -> None:
        streams = picture_streams(self.container)
        if not streams:
            kinds = sorted({stream.type for stream in self.container.streams}) or ["no"]
            problem = f"has no video stream ({', '.join(kinds)} only)"
            raise VideoReadError(self.path, problem, "Pass a file with pictures.")
        best = self.container.streams.best("video")
        self.stream = best if best in streams else streams[0]
        self.decoder = self.stream.codec_context
        if self.decoder is None:
            problem = "uses a codec that this FFmpeg cannot decode"
            raise VideoReadError(self.path, problem, "Re-encode it, e.g. to H.264.")
        limits.check(self.path, "pixels", self.decoder.width * self.decoder.height)
        if "gif" in self.container.format.name:  # whose size FFmpeg finds when it decodes
            limits.check(self.path, "pixels", gif_pixels(self.path))
        tags = {key.lower(): value for key, value in self.stream.metadata.items()}  # remuxing writes them in capitals
        if tags.get("alpha_mode") == "1" and self.decoder.name in ("vp8", "vp9"):
            # FFmpeg's own decoders drop the alpha plane, libvpx's keep it.
            self.decoder = av.CodecContext.create(f"libvpx{'-vp9' if self.decoder.name == 'vp9' else ''}", "r")
        self.decoder.options = {"max_pixels": str(limits.pixels)}
        self.decoder.thread_type = "AUTO"
        self.decoder.thread_count = threads
        self.formats = set(self.container.format.name.split(","))
        codec = self.stream.codec.canonical_name
        self._reordered = "avi" in self.formats and codec in _REORDERED_IN_AVI
        self._indexable = bool(self.formats & _INDEXABLE_FORMATS) and codec in _INDEXABLE_CODECS
        self._timed = True

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.container.close()

    @property
    def seekable(self) -> bool:
        """Whether seeking leads to times that count from the first frame, and to whole pictures; known after that frame.

        Not where the first frame has no time of its own, nor where the first packet alone holds the palette, nor in program
        streams (MPEG-PS), whose packets hold parts of pictures and few times: the others are counted from those before.
        """
        return self._timed and not self._reordered and self.decoder.pix_fmt != "pal8" and "mpeg" not in self.formats

    @property
    def rate(self) -> Fraction:
        """Frames per second on average.

        Raises:
            VideoReadError: if the file does not say.
        """
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        if not rate:
            raise VideoReadError(self.path, "states no frame rate", "Re-encode it, e.g. to H.264 in mp4.")
        return Fraction(rate)

    @property
    def stated_end(self) -> Fraction | None:
        """Seconds on the file's clock at which its video ends, last frame included; None where nothing exact is said."""
        stream, whole = self.stream, self.container.duration
        if "mov" in self.formats:
            if not stream.duration or any(entry.is_discard for entry in stream.index_entries):
                return None  # an edit list may cut a frame in two
            return (stream.start_time + stream.duration) * stream.time_base
        match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)\s*", stream.metadata.get("DURATION", ""))
        if match is None or "matroska" not in self.formats or not whole:
            return None
        hours, minutes, seconds = match.groups()
        end = int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        # A tag may have outlived a cut of the file.
        return end if end <= Fraction(whole, av.time_base) + Fraction(1, 10) else None

    def frames(self, seek: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames in presentation order, all with a `pts`, from the start or from a keyframe that the demuxer finds for the
        time `seek` (units of the stream's time base). None at all where that does not lead to a whole picture of known time.

        Raises:
            VideoReadError: at the first damaged frame, and at the end of a truncated file.
        """
        packets, count, interlaced, first = 0, 0, False, None
        frame: av.VideoFrame | None = None
        awaited: set[int] = set()
        try:
            if seek is not None:
                self.container.seek(seek, stream=self.stream)
                self.decoder.flush_buffers()
            for packet in self.container.demux(self.stream):
                if packet.size:
                    packets += 1
                    if not packet.is_discard and packet.pts is not None:
                        awaited.add(packet.pts)
                # Before a packet that was cut off: what reordering and threads keep inside the decoder is still good.
                for decoded in self.decoder.decode(None if packet.is_corrupt else packet):
                    if decoded.is_corrupt:
                        raise self._damaged(count, "the decoder had to conceal errors")
                    if frame is None and seek is not None and (decoded.pts is None or self._made_up(decoded)):
                        return
                    self._timed &= frame is not None or decoded.pts is not None
                    awaited.discard(decoded.pts)
                    first = decoded.pts if first is None else first
                    interlaced |= decoded.interlaced_frame
                    decoded.pts = self._time(decoded, frame)
                    count, frame = count + 1, decoded
                    yield decoded
                if packet.is_corrupt:
                    raise self._damaged(count, "a packet is incomplete")
        except av.FFmpegError as error:
            check_machine(self.path, error)
            raise self._damaged(count, error.strerror or str(error)) from error
        if seek is not None:
            return
        if frame is None:
            raise VideoReadError(self.path, "holds no decodable frame", "Re-encode or replace the file.")
        # PyAV drops an error that comes behind a good frame of the same packet. Pictures before the first one refer to
        # some that a cut took away; interlaced streams may have a packet for each field.
        lost = {time for time in awaited if first is not None and time > first}
        if lost and self._indexable and not interlaced:
            raise self._damaged(count, f"{len(lost)} frames could not be decoded")
        self._check_complete(packets, count)

    def _made_up(self, first: av.VideoFrame) -> bool:
        """Whether the first frame after seeking may refer to what was never decoded."""
        return self.stream.codec.canonical_name in _UNWAITING and not first.key_frame

    def _time(self, frame: av.VideoFrame, before: av.VideoFrame | None) -> int:
        """When a frame appears, as FFmpeg's tools have it: by its own time if that comes after the last frame's, else when
        the frame before it has been shown."""
        time = frame.dts if self._reordered or frame.pts is None else frame.pts
        if before is None:
            return time or 0
        if time is None or time <= before.pts:
            time = before.pts + max(1, before.duration or round(1 / self.rate / self.stream.time_base))
        return time

    def _damaged(self, count: int, reason: str) -> VideoReadError:
        return VideoReadError(
            self.path,
            f"is truncated or damaged after {count} readable frames of this pass ({reason})",
            "Download or re-encode it, or read only the good part with a frame range.",
        )

    def _check_complete(self, packets: int, count: int) -> None:
        promised = len(self.stream.index_entries) if "mov" in self.formats else 0
        if packets < promised:
            raise self._damaged(count, f"{packets} of {promised} packets are there")
        lack = missing_end(self.path, self.formats)
        if lack is not None:
            raise self._damaged(count, lack)

    def packet_times(self) -> list[int] | None:
        """Presentation times of all frames, sorted, from the packets alone; None where these do not number the frames."""
        if not self._indexable:
            return None
        try:
            packets = self.container.demux(self.stream)
            times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        except av.FFmpegError:
            return None  # decoding from the start finds the damage and says where it is
        if any(time is None for time in times) or len(set(times)) < len(times):
            return None
        # Pictures before the first keyframe may be dropped, and a packet may be half a frame.
        if not times or min(times) < times[0]:
            return None
        times.sort()
        return None if "matroska" in self.formats and self._holds_fields(times) else times

    def _holds_fields(self, times: list[int]) -> bool:
        period = 1 / self.rate / self.stream.time_base
        return any(after - before < Fraction(3, 5) * period for before, after in itertools.pairwise(times))


@functools.lru_cache(maxsize=256)
def frame_index(path: str, size: int, modified: int, limits: ReadLimits) -> list[int] | None:
    """`Decoding.packet_times` of a file; `size` and `modified` (ns) key the cache: a file that changes is scanned again."""
    with Decoding(Path(path), threads=1, limits=limits) as decoding:
        return decoding.packet_times()
