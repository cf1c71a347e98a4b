"""The metrics that need networks or whole sets: which backends a protocol uses, and FVD from collected features."""

from __future__ import annotations

import functools
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..metrics.fvd import MIN_CLIPS, FVDFeatures, frechet_distance, fvd_batch_mean
from ..metrics.i3d import MIN_FRAMES
from ..metrics.perceptual import LPIPSMetric
from ..metrics.weights import I3D_KINETICS400, LPIPS_ALEX, LPIPS_VGG, MetricWeights, find_weights
from .protocols import Protocol
from .scoring import MetricNetworks, decode_features

_LPIPS_WEIGHTS = {"lpips_alex": LPIPS_ALEX, "lpips_vgg": LPIPS_VGG}
_FRAME_BACKENDS = {
    "psnr": "per frame, mean over frames, then videos; RGB in [0, 1]",
    "ssim": "11x11 Gaussian, sigma 1.5, valid window, each RGB channel",
    "flicker": "mean |difference of temporal differences|, RGB in [0, 1]",
    "temporal_difference_psnr": "PSNR of temporal differences, peak 1",
}


def build_networks(protocol: Protocol, device: torch.device, weights: str | Path | None = None) -> MetricNetworks:
    """Load what a protocol's metrics need.

    Args:
        protocol: names the metrics.
        device: where the networks run.
        weights: a folder that holds all of their weights, instead of the default places.

    Raises:
        MissingWeightsError: if weights are missing; no other network takes their place.
        ImportError: if a package is missing.
    """
    networks = MetricNetworks(device)
    for name in protocol.metrics:
        if name in _FRAME_BACKENDS:
            networks.backends[name] = _FRAME_BACKENDS[name]
        elif name == "fvd":
            features = FVDFeatures(weights, device)
            networks.video_features = functools.partial(features, data_range=(-1.0, 1.0))
            networks.backends[name] = f"I3D Kinetics-400 logits, {_weights_used(I3D_KINETICS400, weights)}"
        else:
            network = LPIPSMetric("alex" if name == "lpips_alex" else "vgg", weights).to(device)
            networks.lpips[name] = functools.partial(network, data_range=(-1.0, 1.0))
            used = _weights_used(_LPIPS_WEIGHTS[name], weights)
            networks.backends[name] = f"lpips {metadata.version('lpips')}, v0.1, {used}"
    return networks


def _weights_used(weights: MetricWeights, folder: str | Path | None) -> str:
    _, file = find_weights(weights, folder)
    return f"{file.name} ({file.source}, sha256 {file.sha256[:16]}…)"


def least_frames(protocol: Protocol) -> int:
    """How many scored frames a clip must have."""
    return MIN_FRAMES if "fvd" in protocol.metrics else 1


def check_clip_length(protocol: Protocol) -> None:
    """Refuse FVD on clips that are too short for its network.

    Raises:
        ValueError: naming what to change.
    """
    frames = min(protocol.fvd_frames, protocol.num_frames or protocol.fvd_frames)
    if frames < least_frames(protocol) and "fvd" in protocol.metrics:
        raise ValueError(
            f"protocol {protocol.name!r} measures FVD on {frames} frames, but its network needs at least {MIN_FRAMES}; "
            "take longer clips or leave fvd out of the metrics"
        )


def summarise_fvd(protocol: Protocol, generated: list[str], reference: list[str]) -> dict[str, dict[str, Any]]:
    """FVD of two sets of encoded features, and the batch mean where the clips of the sets belong together.

    Args:
        protocol: gives the batch size.
        generated: features of reconstructed or generated clips.
        reference: features of the source clips, in the same order if they are sources of the others.

    Returns:
        `fvd` of the whole sets; `fvd_batch_mean@bs` unless the protocol is about generation. `nan` for a single clip.
    """
    real, made = (torch.from_numpy(np.stack([decode_features(text) for text in texts])) for texts in (reference, generated))
    counts = {"clips": len(generated), "reference_clips": len(reference)}
    # What `fvd` would log about small sets is written into the result instead (`fvd_warnings`).
    value = frechet_distance(real, made) if min(counts.values()) > 1 else math.nan
    metrics = {"fvd": {"value": value, **counts}}
    if protocol.kind != "generation":
        size = protocol.fvd_batch_size
        metrics[f"fvd_batch_mean@{size}"] = {"value": fvd_batch_mean(real, made, size), **counts}
    return metrics


def fvd_warnings(metrics: dict[str, Any]) -> list[str]:
    """What must be said beside an FVD."""
    if "fvd" not in metrics:
        return []
    clips = min(metrics["fvd"]["clips"], metrics["fvd"]["reference_clips"])
    if clips >= MIN_CLIPS:
        return []
    return [f"FVD over {clips} clips is biased upwards: below {MIN_CLIPS:,} compare it at equal counts only"]
