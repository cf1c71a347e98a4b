"""The metrics that need networks or whole sets: which backends a protocol uses, and FVD from collected features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .protocols import Protocol
from .scoring import MetricNetworks


def build_networks(protocol: Protocol, device: torch.device, weights: str | Path | None = None) -> MetricNetworks:
    networks = MetricNetworks(device)
    networks.backends = {"psnr": "per frame"}
    return networks


def least_frames(protocol: Protocol) -> int:
    return 1


def check_clip_length(protocol: Protocol) -> None:
    pass


def summarise_fvd(protocol: Protocol, reconstructions: list[str], sources: list[str]) -> dict[str, Any]:
    raise NotImplementedError
