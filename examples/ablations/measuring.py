"""What is measured of a model: test windows, their first frames, images; one number a clip and metric."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from arms import reconstruct
from clips import Files, Frames, Window, window_frames
from settings import ClipSettings
from torch import nn

from vc_vae_diffusers.metrics import frame
from vc_vae_diffusers.metrics.perceptual import LPIPSMetric

RANGE = (-1.0, 1.0)
LPIPS_STRIDE = 5  # every fifth frame: 0, 5, 10 and 15 of sixteen stand at each of the four places of a group
Rebuild = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def lpips(device: torch.device) -> LPIPSMetric:
    """LPIPS (vgg) on a device, loaded once a process."""
    return LPIPSMetric("vgg").to(device)


def rebuilder(model: nn.Module, device: torch.device, autocast: bool = False) -> Rebuild:
    """From a clip `(1, 3, T, H, W)` to its reconstruction on the CPU, posterior mode, clamped to [-1, 1]."""

    @torch.no_grad()
    def rebuild(video: torch.Tensor) -> torch.Tensor:
        context: AbstractContextManager = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
        with context:
            sample, _, _ = reconstruct(model, video.to(device), None)
        return sample.float().clamp(*RANGE).cpu()

    return rebuild


def _mean(values: torch.Tensor) -> float:
    # A frame that is reproduced bit by bit has no finite PSNR: it is left out, as in the package's tables.
    return frame.mean_over_frames(values.flatten()).mean


def quick(
    rebuild: Rebuild, separate: bool, source: Frames | Files, windows: list[Window], settings: ClipSettings
) -> list[float]:
    """PSNR of each window's first half, for curves."""
    values = []
    for window in windows:
        clip = window_frames(source, window, settings, settings.test_frames + 1)[:, :, : settings.test_frames // 2 + 1]
        seen = clip if separate else clip[:, :, 1:]
        values.append(_mean(frame.psnr(rebuild(seen)[:, :, -settings.test_frames // 2 :], clip[:, :, 1:], data_range=RANGE)))
    return values


def of_window(
    rebuild: Rebuild, separate: bool, source: Frames | Files, window: Window, settings: ClipSettings, device: torch.device
) -> dict[str, float | list[float]]:
    """All metrics of one window.

    The clip is scored on frames 1 to T of T + 1; models with a separate first frame see all, ours T of them (Sec. 4.1:
    "without the first frame"). `first_*` is Table 6: frame 0, as the first frame of what a model is given.
    """
    clip = window_frames(source, window, settings, settings.test_frames + 1)
    target = clip[:, :, 1:]
    whole = rebuild(clip if separate else target)
    # Eight frames are whole groups, and nothing later reaches the first one.
    first = whole[:, :, :1] if separate else rebuild(clip[:, :, : min(8, settings.test_frames)])[:, :, :1]
    result = whole[:, :, 1:] if separate else whole
    by_frame = frame.psnr(result, target, data_range=RANGE)[0]
    pairs = {"": (result, target), "first_": (first, clip[:, :, :1])}
    row: dict[str, float | list[float]] = {"psnr_by_frame": by_frame.tolist()}
    row["motion_psnr"] = _mean(frame.temporal_difference_psnr(result, target, data_range=RANGE))
    row["change"] = (target.diff(dim=2).square().mean().sqrt() / 2).item()  # how much moves, in units of the range
    for prefix, (made, wanted) in pairs.items():
        row[f"{prefix}psnr"] = _mean(frame.psnr(made, wanted, data_range=RANGE))
        row[f"{prefix}ssim"] = _mean(frame.ssim(made, wanted, data_range=RANGE))
        row[f"{prefix}lpips"] = _lpips(made[:, :, ::LPIPS_STRIDE], wanted[:, :, ::LPIPS_STRIDE], device)
    return row


def of_image(rebuild: Rebuild, image: torch.Tensor, repeats: int | None, device: torch.device) -> dict[str, float]:
    """Metrics of an image `(1, 3, 1, H, W)`, alone and as the last frame of a clip that repeats it (Table 9)."""
    made = {"image_": rebuild(image)}
    if repeats is not None:
        made["image_repeated_"] = rebuild(image.expand(-1, -1, repeats, -1, -1).contiguous())[:, :, -1:]
    row = {}
    for prefix, result in made.items():
        row[f"{prefix}psnr"] = _mean(frame.psnr(result, image, data_range=RANGE))
        row[f"{prefix}ssim"] = _mean(frame.ssim(result, image, data_range=RANGE))
        row[f"{prefix}lpips"] = _lpips(result, image, device)
    return row


def _lpips(made: torch.Tensor, wanted: torch.Tensor, device: torch.device) -> float:
    return lpips(device)(made.to(device), wanted.to(device), data_range=RANGE).mean().item()
