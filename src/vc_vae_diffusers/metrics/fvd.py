"""Fréchet video distance (Unterthiner et al., 2019): I3D features, their statistics, and the distance, in float64.

Two numbers go by this name. :func:`fvd` compares two whole sets of clips. :func:`fvd_batch_mean` compares small batches
and averages, as the evaluation script of WF-VAE does, which almost surely is what Table 1 reports; the two differ by
orders of magnitude, so name the one you give.
"""

from __future__ import annotations

import logging
import math
import os

import torch
import torch.nn.functional as F

from .i3d import INPUT_SIZE, MIN_FRAMES, load_i3d

logger = logging.getLogger(__name__)

# Two samples of one distribution are 133 apart at 1,024 clips and 513 at 256.
MIN_CLIPS = 2048


def preprocess(video: torch.Tensor, *, data_range: tuple[float, float]) -> torch.Tensor:
    """Bring clips to what I3D reads: short side to 224 (bilinear, no antialias), centre crop, [-1, 1].

    Args:
        video: (B, 3, T, H, W), T >= 9, values in ``data_range``.
        data_range: lowest and highest possible value.

    Returns:
        (B, 3, T, 224, 224) float32.

    Raises:
        ValueError: for other shapes, fewer than 9 frames, a wrong range.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}, but FVD reads RGB clips (B, 3, T, H, W)")
    if video.shape[2] < MIN_FRAMES:
        raise ValueError(f"video has {video.shape[2]} frames, but I3D needs at least {MIN_FRAMES}; use longer clips for FVD")
    low, high = data_range
    if not low < high:
        raise ValueError(f"data_range is {data_range!r}, but it is the interval (low, high), e.g. (-1.0, 1.0)")
    height, width = video.shape[-2:]
    scale = INPUT_SIZE / min(height, width)
    # Rounded up, as the field's scripts do; only the crop of the long side depends on it.
    size = (INPUT_SIZE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), INPUT_SIZE)
    frames = video.detach().float().transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - INPUT_SIZE) // 2, (size[1] - INPUT_SIZE) // 2
    frames = frames[..., top : top + INPUT_SIZE, left : left + INPUT_SIZE]
    frames = 2 * (frames - low) / (high - low) - 1
    return frames.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


class FVDFeatures:
    """Computes the I3D features of clips: the 400 logits of Kinetics-400.

    Args:
        weights: weight file or folder, see :func:`vc_vae_diffusers.metrics.weights.find_weights`.
        device: where the network runs.
        clips_per_batch: how many clips pass the network at a time.

    Raises:
        MissingWeightsError: if the weights are missing.
    """

    def __init__(
        self,
        weights: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        clips_per_batch: int = 4,
    ):
        self.network = load_i3d(weights, device)
        self.device = torch.device(device)
        self.clips_per_batch = clips_per_batch

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, *, data_range: tuple[float, float]) -> torch.Tensor:
        """Features of a batch of clips.

        Args:
            video: (B, 3, T, H, W), T >= 9, values in ``data_range``, on any device.
            data_range: lowest and highest possible value.

        Returns:
            (B, 400) float64 on the CPU.

        Raises:
            ValueError: as :func:`preprocess`.
        """
        features = []
        for clips in video.split(self.clips_per_batch):
            clips = preprocess(clips.to(self.device), data_range=data_range)
            with torch.autocast(self.device.type, enabled=False):
                features.append(self.network(clips).double().cpu())
        return torch.cat(features)


class FeatureStatistics:
    """Mean and covariance of features, gathered in float64 while they stream by.

    Statistics of parts merge to those of the whole, so that processes and interrupted runs can share the work:
    exchange :meth:`state_dict`, then :meth:`merge`.

    Args:
        num_features: length of a feature vector.
    """

    def __init__(self, num_features: int = 400):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add feature vectors, (N, num_features) of any float type; ValueError where one is not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {tuple(features.shape)}, but these statistics are over (N, {len(self.mean)})"
            )
        _check_finite("features", features)
        if len(features) == 0:
            return
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(dim=0)
        centred = features - mean
        self._combine(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the vectors that ``other`` has seen."""
        self._combine(other.count, other.mean, other._scatter)

    def _combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        # Chan et al., 1979: sums of squares about two means, moved to the common mean.
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Sample covariance (divided by count - 1), (num_features, num_features) float64."""
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} feature vectors does not exist; gather at least 2")
        return self._scatter / (self.count - 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors to save or to send to another process."""
        return {"count": torch.tensor(self.count), "mean": self.mean.clone(), "scatter": self._scatter.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> FeatureStatistics:
        """The statistics that :meth:`state_dict` came from."""
        statistics = cls(len(state["mean"]))
        statistics._combine(int(state["count"]), state["mean"].double(), state["scatter"].double())
        return statistics


def fvd(reference: torch.Tensor, generated: torch.Tensor) -> float:
    """FVD of two sets of clips from their features. Logs a warning below 2,048 clips: the value is biased upwards.

    Args:
        reference: (N, 400) features of the source clips.
        generated: (M, 400) features of the reconstructed or sampled clips.

    Returns:
        The squared Fréchet distance of the two Gaussians, 0 for equal sets.

    Raises:
        ValueError: for other shapes or fewer than two clips.
    """
    _warn_if_few(len(reference), len(generated))
    return frechet_distance(reference, generated)


def fvd_from_statistics(reference: FeatureStatistics, generated: FeatureStatistics) -> float:
    """FVD of two sets of clips from gathered statistics. Logs a warning below 2,048 clips.

    Equals :func:`fvd`; where there are fewer clips than features the latter keeps more digits.

    Args:
        reference: statistics of the source clips.
        generated: statistics of the reconstructed or sampled clips.

    Raises:
        ValueError: for fewer than two clips.
    """
    _warn_if_few(reference.count, generated.count)
    return frechet_distance_from_statistics(reference, generated)


def fvd_batch_mean(reference: torch.Tensor, generated: torch.Tensor, batch_size: int) -> float:
    """Mean over batches of the FVD of each batch, as WF-VAE's script computes it; report as ``fvd_batch_mean@size``.

    Batches are consecutive clips, the last may be smaller, and all weigh the same. A batch of one clip has no
    covariance: it gives the squared distance of the features. This is no estimate of :func:`fvd`: with two clips a
    batch it measures, for the most part, how far each clip moved.

    Args:
        reference: (N, 400) features of the source clips.
        generated: (N, 400) features of their reconstructions, in the same order.
        batch_size: clips in a batch; WF-VAE's default is 2.

    Returns:
        The mean, which depends on ``batch_size`` and on the order of the clips.

    Raises:
        ValueError: for shapes that differ, no clips, or a batch size below 1.
    """
    if reference.shape != generated.shape or reference.ndim != 2 or len(reference) == 0:
        raise ValueError(
            f"reference and generated have shapes {tuple(reference.shape)} and {tuple(generated.shape)}, but the batch "
            "mean compares clips with their own reconstructions: pass two (N, features) tensors of one shape"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch has at least one clip; WF-VAE uses 2")
    values = []
    for of_source, of_result in zip(reference.split(batch_size), generated.split(batch_size), strict=True):
        if len(of_source) == 1:
            values.append(float((of_source.double() - of_result.double()).square().sum()))
        else:
            values.append(frechet_distance(of_source, of_result))
    return sum(values) / len(values)


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of vectors, in float64.

    With A and B the centred sets over the roots of their degrees of freedom, tr (S1 S2)^(1/2) is the nuclear norm of
    A B^T: ``|mu1 - mu2|^2 + |A|^2 + |B|^2 - 2 |A B^T|_*``. No matrix root is taken, so nothing is lost where the
    covariances are singular, which they are with fewer vectors than features.

    Args:
        first: (N, D), N >= 2.
        second: (M, D), M >= 2.

    Returns:
        The distance; what float64 cannot tell from 0 is 0.

    Raises:
        ValueError: for other shapes or fewer than two vectors, or values that are not finite.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}, but the distance is between (N, D) and (M, D) features of "
                "at least two clips each"
            )
        _check_finite(name, features)
    first, second = (features.detach().to("cpu", torch.float64) for features in (first, second))
    mean_1, mean_2 = first.mean(dim=0), second.mean(dim=0)
    factor_1 = _triangular_factor(first - mean_1)
    factor_2 = _triangular_factor(second - mean_2)
    return _distance(mean_1, mean_2, factor_1, factor_2)


def frechet_distance_from_statistics(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians from mean and covariance, by eigendecomposition, in float64.

    Args:
        first: statistics of at least two vectors.
        second: statistics of at least two vectors.

    Returns:
        The distance; what float64 cannot tell from 0 is 0.

    Raises:
        ValueError: for fewer than two vectors, or vectors of different lengths.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"the statistics are over {len(first.mean)} and {len(second.mean)} features; compare equal networks"
        )
    return _distance(first.mean, second.mean, _root(first.covariance), _root(second.covariance))


def _distance(mean_1: torch.Tensor, mean_2: torch.Tensor, factor_1: torch.Tensor, factor_2: torch.Tensor) -> float:
    """The distance from factors F with F^T F = S."""
    spread = factor_1.square().sum() + factor_2.square().sum()
    between = (mean_1 - mean_2).square().sum()
    distance = float(between + spread - 2 * torch.linalg.matrix_norm(factor_1 @ factor_2.T, ord="nuc"))
    resolution = torch.finfo(torch.float64).eps * factor_1.shape[1] * float(spread + between)
    return 0.0 if distance <= resolution else distance


def _triangular_factor(centred: torch.Tensor) -> torch.Tensor:
    """F with F^T F the sample covariance, at most as many rows as columns."""
    scaled = centred / math.sqrt(len(centred) - 1)
    return scaled if len(scaled) <= scaled.shape[1] else torch.linalg.qr(scaled, mode="r").R


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """F with F^T F = S by eigendecomposition; eigenvalues within rounding of 0 are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(torch.float64).eps * values[-1]
    values = torch.where(values > rounding, values, 0.0)
    return values.sqrt()[:, None] * vectors.T


def _check_finite(name: str, features: torch.Tensor) -> None:
    broken = int((~features.isfinite()).any(dim=1).sum())
    if broken:
        raise ValueError(
            f"{name} has {broken} clips with non-finite features, but one of them spoils the whole distance; find the "
            "clips whose frames are NaN"
        )


def _warn_if_few(num_reference: int, num_generated: int) -> None:
    if min(num_reference, num_generated) < MIN_CLIPS:
        logger.warning(
            "FVD of %d and %d clips is dominated by the bias of small sets: below %s clips compare it only with values "
            "at the same counts",
            num_reference,
            num_generated,
            f"{MIN_CLIPS:,}",
        )
