"""Metrics of one clip, fed in chunks: memory does not depend on its length."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..metrics import frame
from .protocols import FRAME_METRICS
from .reconstructor import Reconstructor
from .results import mean_and_deviation

RANGE = (-1.0, 1.0)


@dataclass
class MetricNetworks:
    """The networks that a protocol's metrics need.

    Args:
        device: where they run.
        lpips: by metric name, from two (B, C, T, H, W) clips in [-1, 1] to (B, T) distances.
        video_features: from a (B, C, T, H, W) clip in [-1, 1] to (B, 400) features for the FVD.
        backends: by metric name, what computes it, for the result file.
    """

    device: torch.device
    lpips: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    video_features: Any = None
    backends: dict[str, str] = field(default_factory=dict)


class ClipScorer:
    """Collects the per-frame values of one clip.

    Args:
        metrics: of `protocols.METRICS`.
        networks: what they need.
        fvd_frames: at most so many frames go into the features.
    """

    _FRAME = {"psnr": frame.psnr, "ssim": frame.ssim}  # noqa: RUF012  (a constant table)
    _STEP = {"flicker": frame.flicker, "temporal_difference_psnr": frame.temporal_difference_psnr}  # noqa: RUF012

    def __init__(self, metrics: Iterable[str], networks: MetricNetworks, fvd_frames: int):
        self.metrics = tuple(metrics)
        self.networks = networks
        self.values: dict[str, list[float]] = {name: [] for name in self.metrics if name != "fvd"}
        self.num_frames = 0
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._to_keep = fvd_frames if "fvd" in self.metrics else 0

    def add(self, reconstruction: torch.Tensor, source: torch.Tensor) -> None:
        """Measure the next frames of the clip, both (1, C, t, H, W) in [-1, 1]."""
        reconstruction, source = (x.to(self.networks.device, torch.float32) for x in (reconstruction, source))
        for name, values in self.values.items():
            if name in self._FRAME:
                measured = self._FRAME[name](reconstruction, source, data_range=RANGE)
            elif name in self._STEP:
                measured = self._step(name, reconstruction, source)
            else:
                measured = self.networks.lpips[name](reconstruction, source)
            values.extend(measured[0].tolist())
        self._last = (reconstruction[:, :, -1:], source[:, :, -1:])
        kept = sum(pair[0].shape[2] for pair in self._kept)
        if kept < self._to_keep:
            self._kept.append((reconstruction[:, :, : self._to_keep - kept], source[:, :, : self._to_keep - kept]))
        self.num_frames += reconstruction.shape[2]

    def _step(self, name: str, reconstruction: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if self._last is not None:
            reconstruction = torch.cat([self._last[0], reconstruction], dim=2)
            source = torch.cat([self._last[1], source], dim=2)
        return self._STEP[name](reconstruction, source, data_range=RANGE)

    def features(self) -> dict[str, str] | None:
        """The FVD features of reconstruction and source, encoded for a journal; None if FVD is not measured."""
        if self._to_keep == 0:
            return None
        clips = [torch.cat(clip, dim=2) for clip in zip(*self._kept, strict=True)]
        reconstruction, source = (encode_features(self.networks.video_features(clip)[0]) for clip in clips)
        return {"reconstruction": reconstruction, "source": source}


def encode_features(features: torch.Tensor) -> str:
    """A float32 vector as text."""
    return base64.b64encode(features.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def decode_features(text: str) -> np.ndarray:
    """The vector that `encode_features` wrote, as float64."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def paired_chunks(
    model: Reconstructor,
    chunks: Iterable[torch.Tensor],
    generator: torch.Generator | None = None,
    num_frames: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Reconstruct a clip chunk by chunk and pair every piece with its source.

    Holds only the source frames whose reconstruction is still to come.

    Raises:
        ValueError: if the model returns fewer frames than it was given.
    """
    waiting: deque[torch.Tensor] = deque()

    def remembered() -> Iterator[torch.Tensor]:
        for chunk in chunks:
            waiting.append(chunk)
            yield chunk

    for reconstruction in model.reconstruct_stream(remembered(), generator, num_frames):
        source = _take(waiting, reconstruction.shape[2])
        if source is not None:
            yield reconstruction[:, :, : source.shape[2]], source
    if waiting:
        missing = sum(chunk.shape[2] for chunk in waiting)
        raise ValueError(f"{type(model).__name__} returned {missing} frames fewer than it was given")


def _take(waiting: deque[torch.Tensor], num_frames: int) -> torch.Tensor | None:
    """The next `num_frames` waiting frames, or as many as there are."""
    taken, count = [], 0
    while waiting and count < num_frames:
        chunk = waiting.popleft()
        wanted = num_frames - count
        if chunk.shape[2] > wanted:
            waiting.appendleft(chunk[:, :, wanted:].clone())
            chunk = chunk[:, :, :wanted]
        taken.append(chunk)
        count += chunk.shape[2]
    return torch.cat(taken, dim=2) if taken else None


def summarise_frames(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages of per-frame values: mean over frames, then over videos; curves by frame index; first frame apart.

    Args:
        records: of measured samples, with `per_frame` values and `first_frame_index`.

    Returns:
        By metric `value` (the mean), `std` over videos, `frames` and `identical_frames` counted; `curves` by metric;
        `first_frame` by metric where frame 0 of the clips was scored.
    """
    metrics, curves, first_frame = {}, {}, {}
    for name in records[0]["per_frame"]:
        videos = [record["per_frame"][name] for record in records if record["per_frame"][name]]
        total = frame.mean_over_videos(videos)
        means = [frame.mean_over_frames(values).mean for values in videos]
        finite = [value for value in means if value not in (float("inf"), float("-inf"))]
        metrics[name] = {
            "value": total.mean,
            "std": mean_and_deviation(finite)[1],
            "frames": total.num_finite,
            "identical_frames": total.num_infinite,
        }
        curve = frame.frame_index_curve(videos)
        curves[name] = [point.mean for point in curve]
        if records[0]["first_frame_index"] == 0 and name in FRAME_METRICS:
            first_frame[name] = curves[name][0]
    return {"metrics": metrics, "curves": curves, "first_frame": first_frame}
