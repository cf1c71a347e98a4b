"""Values and sizes of frames: [-1, 1] and uint8, resizing and cropping. Not in the paper, which names neither."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Size = int | tuple[int, int]


def from_uint8(frames: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] to uint8, any shape: rounded to nearest, values outside the range clamped.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    frames = frames.detach().to(torch.float32)
    if not torch.isfinite(frames).all():
        raise ValueError(
            "frames: holds NaN or infinite values, which have no uint8 value; the model overflowed: run it in float32 "
            "or bfloat16."
        )
    return frames.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def resized(height: int, width: int, resize: Size | None) -> tuple[int, int]:
    """The size after resizing: the short side to `resize`, or to an exact (height, width)."""
    if resize is None:
        return height, width
    if not isinstance(resize, int):
        return resize
    short, long = min(height, width), max(height, width)
    long = int(resize * long / short)  # truncated as torchvision's Resize does, so that crops land on the same pixels
    return (resize, long) if height <= width else (long, resize)


def cropped(height: int, width: int, crop: Size | None) -> tuple[int, int]:
    """The size after cropping.

    Raises:
        ValueError: if the crop is larger than the frame.
    """
    if crop is None:
        return height, width
    wanted = (crop, crop) if isinstance(crop, int) else crop
    if wanted[0] > height or wanted[1] > width:
        raise ValueError(
            f"crop: {wanted[0]}x{wanted[1]} (height x width) is larger than the frame, {height}x{width} after resizing; "
            f"pass resize={max(wanted)} or a smaller crop."
        )
    return wanted


def resize_and_crop(frames: torch.Tensor, resize: Size | None = None, crop: Size | None = None) -> torch.Tensor:
    """Antialiased bilinear resizing, then a centre crop, of `(..., H, W)` with one or more leading dimensions.

    Args:
        frames: uint8 (rounded again after resizing) or float.
        resize: the short side in pixels, or an exact (height, width).
        crop: the side of a square, or (height, width).

    Raises:
        ValueError: if the crop is larger than the resized frame.
    """
    height, width = resized(frames.shape[-2], frames.shape[-1], resize)
    if (height, width) != tuple(frames.shape[-2:]):
        flat = frames.reshape(-1, 1, *frames.shape[-2:])
        flat = flat.to(torch.float32) if frames.dtype == torch.uint8 else flat
        flat = F.interpolate(flat, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        flat = flat.round_().clamp_(0, 255).to(torch.uint8) if frames.dtype == torch.uint8 else flat
        frames = flat.reshape(*frames.shape[:-2], height, width)
    rows, columns = cropped(height, width, crop)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return frames[..., top : top + rows, left : left + columns]


def check_size(name: str, size: Size | None) -> None:
    """Raises ValueError for what is neither None, a positive integer nor a positive (height, width)."""
    values = (size,) if isinstance(size, int) else size
    if values is not None and (len(values) not in (1, 2) or min(values) < 1):
        raise ValueError(f"{name}: {size!r} is neither a positive integer nor a positive (height, width).")
