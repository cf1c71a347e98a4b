"""What a visitor may ask of the app: said in words before any work starts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from os import PathLike

from ..video import ReadLimits


@dataclass(frozen=True)
class UploadLimits(ReadLimits):
    """Those of reading, in words for visitors, who set no variables of this machine."""

    def check(self, path: str | PathLike[str], what: str, value: int | Fraction) -> None:
        """Raises ValueError if a file has more than this of `what` ("pixels", "frames" or "seconds")."""
        if value > (limit := getattr(self, what)):
            raise ValueError(f"The file has {value:,.0f} {what}, this app takes up to {limit:,}: make it smaller first.")


@dataclass(frozen=True)
class Limits:
    """How much one request may take.

    Args:
        frames: of a clip.
        side: of a frame's longer side, pixels, after resizing.
        seconds: that one request may work; estimated after the first group of frames, so that nobody waits in vain.
        megabytes: of an upload.
        megapixels: of an upload's pictures, before resizing: a file of few bytes may hold large ones.
        gigabytes: of all visitors' uploads and results together.
    """

    frames: int = 256
    side: int = 1280
    seconds: int = 900
    megabytes: int = 200
    megapixels: int = 36
    gigabytes: int = 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--max-{name}: {value} must be at least 1.")

    def check_size(self, num_frames: int | None, width: int, height: int) -> None:
        """Raises ValueError for a clip that is too long or too large, and says what would do."""
        if num_frames is not None and num_frames > self.frames:
            raise ValueError(
                f"{num_frames} frames are more than the {self.frames} that this app takes: choose fewer frames."
            )
        longer, shorter = max(width, height), min(width, height)
        if longer > self.side:
            fitting = max(8, shorter * self.side // longer)
            raise ValueError(
                f"Frames of {width}x{height} are larger than this app takes ({self.side} pixels on the longer side): choose "
                f"a short side of at most {fitting} pixels."
            )

    def reading(self) -> UploadLimits:
        """What a file may hold, asked before its pictures are decoded."""
        default = ReadLimits.default()
        return UploadLimits(min(self.megapixels * 10**6, default.pixels), default.frames, default.seconds)

    def check_upload(self, size: int) -> None:
        """Raises ValueError for a file of too many bytes."""
        if size > self.megabytes * 10**6:
            raise ValueError(f"The file has {size / 10**6:.0f} MB, this app takes up to {self.megabytes} MB: cut it first.")

    def check_room(self, taken: int) -> None:
        """Raises ValueError where the files of all visitors take too many bytes."""
        if taken > self.gigabytes * 10**9:
            raise ValueError(
                f"The files of all visitors take {taken / 10**9:.0f} GB, as many as this app keeps: try again later. Each "
                "goes when its visitor leaves, or after an hour."
            )

    def check_time(self, seconds: float) -> None:
        """Raises ValueError for work that will take too long."""
        if seconds > self.seconds:
            raise ValueError(
                f"This would take about {seconds / 60:.0f} minutes here, and the app stops at {self.seconds / 60:.0f}: "
                "choose fewer frames or a smaller size, or run `vcvae reconstruct`, which has no limit."
            )
