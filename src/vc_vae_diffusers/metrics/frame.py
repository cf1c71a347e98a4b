"""Metrics of single frames and of neighbouring frames: PSNR, SSIM, flicker, temporal-difference PSNR, curves.

All functions compare a reconstruction with its source, both (B, C, T, H, W), and return one value per clip and frame.
``data_range=(low, high)`` is the interval the values live in, e.g. ``(-1.0, 1.0)`` or ``(0.0, 1.0)``: an interval and
not a width, because SSIM changes when values are shifted. Values outside it are an error, never clipped in silence.

The temporal metrics look one frame back. A long video may be measured in pieces that overlap by one frame; the values
concatenate to those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def psnr(reconstruction: torch.Tensor, source: torch.Tensor, *, data_range: tuple[float, float]) -> torch.Tensor:
    """Peak signal-to-noise ratio of every frame, in dB.

    The squared error is averaged over C, H and W of one frame. Averages over frames and videos are taken of the
    decibels afterwards (:func:`mean_over_videos`); pooling the squared error over frames first is another number.

    Args:
        reconstruction: (B, C, T, H, W), values in ``data_range``.
        source: (B, C, T, H, W), values in ``data_range``.
        data_range: lowest and highest possible value.

    Returns:
        (B, T) float32; ``inf`` where a frame is identical to its source.

    Raises:
        ValueError: for shapes that differ or are not 5-D, for a wrong range, for values outside it.

    Not in the paper: which average is meant. Per frame, then per video, is what the field's scripts compute.
    """
    x, y, low, high = checked_pair(reconstruction, source, data_range)
    mse = (x - y).square().mean(dim=(1, 3, 4))
    return _decibels(mse, high - low)


def ssim(reconstruction: torch.Tensor, source: torch.Tensor, *, data_range: tuple[float, float]) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) of every frame.

    11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, population covariance, window positions inside the frame
    only, each colour channel on its own, mean over positions and channels; float32 throughout.

    Args:
        reconstruction: (B, C, T, H, W), values in ``data_range``.
        source: (B, C, T, H, W), values in ``data_range``.
        data_range: lowest and highest possible value; values are shifted so that ``low`` is 0.

    Returns:
        (B, T) float32, at most 1.

    Raises:
        ValueError: as :func:`psnr`, and for frames smaller than the window.
    """
    x, y, low, high = checked_pair(reconstruction, source, data_range)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"reconstruction has frames of {x.shape[-2]}x{x.shape[-1]} pixels, but SSIM needs at least "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}; measure larger frames"
        )
    window = _gaussian_window()
    # One frame at a time: the five moment maps of a whole clip would be the largest tensors of an evaluation.
    per_frame = [
        _ssim_of_frame((x[:, :, t] - low) / (high - low), (y[:, :, t] - low) / (high - low), window)
        for t in range(x.shape[2])
    ]
    return torch.stack(per_frame, dim=1)


def flicker(reconstruction: torch.Tensor, source: torch.Tensor, *, data_range: tuple[float, float]) -> torch.Tensor:
    """Change from frame to frame that the source does not have: mean |(x_t - x_{t-1}) - (y_t - y_{t-1})|.

    Args:
        reconstruction: (B, C, T, H, W), values in ``data_range``.
        source: (B, C, T, H, W), values in ``data_range``.
        data_range: lowest and highest possible value; the result is in units of its width.

    Returns:
        (B, T - 1) float32, entry ``t - 1`` for the step into frame t; empty for one frame. 0 is best.

    Raises:
        ValueError: as :func:`psnr`.

    Not in the paper: the metric. Differences run along T; code that slices (B, T, C, H, W) tensors as if they were
    (B, C, T, H, W) measures the difference of colour channels instead.
    """
    x, y, low, high = checked_pair(reconstruction, source, data_range)
    error = x.diff(dim=2) - y.diff(dim=2)
    return error.abs().mean(dim=(1, 3, 4)) / (high - low)


def temporal_difference_psnr(
    reconstruction: torch.Tensor, source: torch.Tensor, *, data_range: tuple[float, float]
) -> torch.Tensor:
    """PSNR of the frame-to-frame differences, in dB: how well motion is kept, whatever the still error is.

    The peak is the width of ``data_range``, as for :func:`psnr`, so that both are read on one scale.

    Args:
        reconstruction: (B, C, T, H, W), values in ``data_range``.
        source: (B, C, T, H, W), values in ``data_range``.
        data_range: lowest and highest possible value.

    Returns:
        (B, T - 1) float32, entry ``t - 1`` for the step into frame t; ``inf`` where the steps are equal.

    Raises:
        ValueError: as :func:`psnr`.

    Not in the paper: the metric.
    """
    x, y, low, high = checked_pair(reconstruction, source, data_range)
    mse = (x.diff(dim=2) - y.diff(dim=2)).square().mean(dim=(1, 3, 4))
    return _decibels(mse, high - low)


@dataclass(frozen=True)
class FiniteMean:
    """Mean of the finite values, and how many values were infinite (identical frames) and so left out of it.

    ``mean`` is ``inf`` when every value was infinite, and ``nan`` when there was none or one was ``nan``.
    """

    mean: float
    num_finite: int
    num_infinite: int


def mean_over_frames(values: torch.Tensor | Iterable[float]) -> FiniteMean:
    """Mean of the per-frame values of one video, identical frames reported apart.

    Args:
        values: (T,) values as the metrics of this module return them for one clip.

    Returns:
        The mean in float64 and the counts of frames that entered it and that did not.
    """
    flat = torch.as_tensor(values if isinstance(values, torch.Tensor) else list(values), dtype=torch.float64).flatten()
    infinite = flat.isinf()
    finite = flat[~infinite]
    num_infinite = int(infinite.sum())
    if finite.numel() == 0:
        return FiniteMean(math.inf if num_infinite else math.nan, 0, num_infinite)
    return FiniteMean(float(finite.mean()), finite.numel(), num_infinite)


def mean_over_videos(videos: Iterable[torch.Tensor | Iterable[float]]) -> FiniteMean:
    """Mean over videos of the mean over frames: every video weighs the same, however long it is.

    Args:
        videos: one (T_i,) sequence of per-frame values per video; lengths may differ.

    Returns:
        The mean over the videos that have a finite value, with the counts of *frames* that entered it or did not.
    """
    means = [mean_over_frames(values) for values in videos]
    over_videos = mean_over_frames([video.mean for video in means])
    return FiniteMean(over_videos.mean, sum(video.num_finite for video in means), sum(video.num_infinite for video in means))


def frame_index_curve(videos: Iterable[torch.Tensor | Iterable[float]]) -> list[FiniteMean]:
    """Mean over videos of a per-frame metric, for every frame index (Fig. 4b; entry 0 is Table 6's first frame).

    Args:
        videos: one (T_i,) sequence of per-frame values per video; an index counts the videos that reach it.

    Returns:
        One entry per frame index, as long as the longest video.
    """
    by_index: list[list[float]] = []
    for values in videos:
        for index, value in enumerate(values.tolist() if isinstance(values, torch.Tensor) else values):
            if index == len(by_index):
                by_index.append([])
            by_index[index].append(float(value))
    return [mean_over_frames(values) for values in by_index]


def checked_pair(
    reconstruction: torch.Tensor, source: torch.Tensor, data_range: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """What every metric asks of its arguments: equal 5-D shapes, a range, values inside it.

    Args:
        reconstruction: (B, C, T, H, W), values in ``data_range``.
        source: (B, C, T, H, W), values in ``data_range``.
        data_range: lowest and highest possible value.

    Returns:
        Both videos in float32, detached, and the two ends of the range.

    Raises:
        ValueError: for shapes that differ or are not 5-D, for a wrong range, for values outside it.
    """
    if reconstruction.ndim != 5:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)}, but videos are (B, C, T, H, W); "
            "add the missing dimensions"
        )
    if reconstruction.shape != source.shape:
        raise ValueError(
            f"source has shape {tuple(source.shape)}, but it must equal the reconstruction's "
            f"{tuple(reconstruction.shape)}; crop or resize before measuring"
        )
    if not isinstance(data_range, tuple | list) or len(data_range) != 2 or not data_range[0] < data_range[1]:
        raise ValueError(
            f"data_range is {data_range!r}, but it is the interval (low, high) of the values, e.g. (-1.0, 1.0) or (0.0, 1.0)"
        )
    low, high = float(data_range[0]), float(data_range[1])
    x, y = reconstruction.detach().float(), source.detach().float()
    slack = 1e-4 * (high - low)
    for name, values in (("reconstruction", x), ("source", y)):
        if values.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, but nothing can be measured on no pixels")
        smallest, largest = (float(v) for v in values.aminmax())
        if smallest < low - slack or largest > high + slack:
            raise ValueError(
                f"{name} has values in [{smallest:.4g}, {largest:.4g}], outside data_range ({low:g}, {high:g}); "
                f"pass the range the values have, or {name}.clamp({low:g}, {high:g}) for an unclamped decoder output"
            )
    return x, y, low, high


def _decibels(mse: torch.Tensor, peak: float) -> torch.Tensor:
    return 10.0 * torch.log10(peak**2 / mse)


def _gaussian_window() -> list[float]:
    offsets = [index - (SSIM_WINDOW - 1) / 2 for index in range(SSIM_WINDOW)]
    weights = [math.exp(-(offset**2) / (2 * SSIM_SIGMA**2)) for offset in offsets]
    return [weight / sum(weights) for weight in weights]


def _ssim_of_frame(x: torch.Tensor, y: torch.Tensor, window: list[float]) -> torch.Tensor:
    """SSIM of frames (B, C, H, W) in [0, 1], (B,)."""
    # Second moments are taken about 0.5 (they do not depend on it): E[x^2] - E[x]^2 of bright flat areas about 0
    # cancels more of the digits that float32 has.
    x, y = x - 0.5, y - 0.5
    maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, C, H, W)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _filter_valid(maps, window)
    var_x, var_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def _filter_valid(maps: torch.Tensor, window: list[float]) -> torch.Tensor:
    """Separable Gaussian of (..., H, W) at the positions where the window fits, (..., H - 10, W - 10).

    A sum of shifted slices: no autocast and no TF32 setting can lower its precision, as they would a convolution's,
    and on a CPU it is far faster than a convolution with one channel.
    """
    for dim in (-2, -1):
        length = maps.shape[dim] - len(window) + 1
        filtered = maps.narrow(dim, 0, length) * window[0]
        for shift, weight in enumerate(window[1:], start=1):
            filtered.add_(maps.narrow(dim, shift, length), alpha=weight)
        maps = filtered
    return maps
