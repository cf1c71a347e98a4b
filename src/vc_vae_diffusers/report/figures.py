"""Figures as PNG: metrics by frame index (Fig. 4b), and frames, zoomed crops and error maps side by side (Fig. 3, 4a, 6)."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..extras import install_hint
from ..files import whole_file

SOURCE = "source"
CURVES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips_vgg": "LPIPS (vgg)", "lpips_alex": "LPIPS (alex)"}
INK, PAPER, ACCENT = (28, 28, 30), (255, 255, 255), (230, 57, 70)
CELL, GAP, LABEL = 192, 4, 176
LINE_STYLES = ("o-", "s--", "^:", "D-.")  # told apart where curves coincide
ERROR_FULL_SCALE = 0.25  # of the range: an error map is white-hot there and above


# Curves ----------------------------------------------------------------------------------------------------------------


def draw_curves(entries: Sequence[Mapping[str, Any]], metrics: Sequence[str], frames: int | None = None) -> Image.Image:
    """Metrics over the frame index, one panel a metric, one line a model.

    Args:
        entries: models of a result.
        metrics: of `CURVES`, those that the models have.
        frames: only the first so many (Fig. 4b: 5).

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"curves need matplotlib: {install_hint('eval')}") from error
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, metric in zip(axes, metrics, strict=False):
        for entry, style in zip(entries, itertools.cycle(LINE_STYLES)):
            start = entry["videos"][0]["first_frame_index"]
            values = entry["curves"].get(metric, [])[:frames]
            axis.plot(range(start, start + len(values)), values, style, markersize=4, label=entry["label"])
        axis.set_xlabel("frame")
        axis.set_ylabel(CURVES[metric])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    # Two labels fit above a panel.
    figure.legend(handles, labels, loc="outside upper center", ncols=min(2 * columns, len(labels)), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    stream.seek(0)
    return Image.open(stream).convert("RGB")


# Frames ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """A square of a frame: left and top corner and side, in pixels."""

    left: int
    top: int
    side: int

    def of(self, frame: np.ndarray) -> np.ndarray:
        """The part of a frame (..., H, W, 3).

        Raises:
            ValueError: if the square is not inside.
        """
        height, width = frame.shape[-3:-1]
        if self.top + self.side > height or self.left + self.side > width:
            raise ValueError(f"crop is {self}, but frames are {width}x{height}; choose a square inside them")
        return frame[..., self.top : self.top + self.side, self.left : self.left + self.side, :]


@dataclass
class Clips:
    """Frames of one sample: the source's and every model's, (T, H, W, 3) uint8, as many of each.

    Args:
        name: of the sample.
        source, models: the frames.
        first: the frame number of the first one, in the clip that the protocol takes.
    """

    name: str
    source: np.ndarray
    models: dict[str, np.ndarray]
    first: int = 0


def load_clips(name: str, source: Path, models: Mapping[str, Path], first: int = 0) -> Clips:
    """Read the frames that `vcvae evaluate --save-frames` kept of a sample.

    Args:
        name: of the sample.
        source: folder of the source's frames.
        models: folder of a model's frames, by its label; models without one are left out.
        first: number of the first frame.

    Raises:
        ValueError: if no frames are there, or sizes differ.
    """
    clips = {label: _read_frames(folder) for label, folder in models.items() if folder.is_dir()}
    if not source.is_dir() or not clips:
        raise ValueError(f"{source.parent} has no frames of source and models; evaluate again with --save-frames")
    original = _read_frames(source)
    for label, frames in clips.items():
        if frames.shape[1:] != original.shape[1:]:
            sizes = f"{original.shape[1:3]} and, of {label}, of {frames.shape[1:3]}"
            raise ValueError(f"the frames of {name} are of {sizes}; compare results of one protocol only")
    count = min(len(frames) for frames in [original, *clips.values()])
    return Clips(name, original[:count], {label: frames[:count] for label, frames in clips.items()}, first)


def _read_frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))])


def choose_crop(clips: Clips, side: int | None = None) -> Crop:
    """The square where the models differ most: the largest spread between the models' mean absolute errors.

    With one model, the square where its error is largest. A choice that shows differences, not one that flatters anybody.
    """
    height, width = clips.source.shape[1:3]
    side = max(8, min(height, width) // 4) if side is None else side
    errors = np.stack([error_of(frames, clips.source).mean(axis=0) for frames in clips.models.values()])
    means = np.stack([_window_means(error, side) for error in errors])
    interest = means.max(axis=0) - means.min(axis=0) if len(means) > 1 else means[0]
    top, left = np.unravel_index(int(interest.argmax()), interest.shape)
    return Crop(int(left), int(top), side)


def _window_means(values: np.ndarray, side: int) -> np.ndarray:
    """Mean over every window of `side` x `side`, (H - side + 1, W - side + 1)."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    sums[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2


def error_of(frames: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Mean absolute difference over colours, (T, H, W), in units of the range."""
    return np.abs(frames.astype(np.float64) - source).mean(axis=3) / 255


def pick_frames(count: int, wanted: int = 4) -> list[int]:
    """Frames to show: the first, the last, and others evenly between."""
    wanted = min(wanted, count)
    return sorted({round(index * (count - 1) / max(1, wanted - 1)) for index in range(wanted)})


def draw_frames(clips: Clips, crop: Crop, frames: Sequence[int]) -> Image.Image:
    """Rows of source and models, columns of frames (of the kept ones), with the crop outlined."""
    scale = _scale(clips.source.shape[1:3])
    rows = {SOURCE: clips.source, **clips.models}
    cells = {}
    for label, clip in rows.items():
        cells[label] = [_fit(clip[index], scale) for index in frames]
        for cell in cells[label]:
            left, top, side = (round(value * scale) for value in (crop.left, crop.top, crop.side))
            ImageDraw.Draw(cell).rectangle((left, top, left + side - 1, top + side - 1), outline=ACCENT, width=2)
    return _grid(cells, _heads(clips, frames))


def draw_crops(clips: Clips, crop: Crop, frames: Sequence[int]) -> Image.Image:
    """The outlined square of every frame, enlarged without smoothing."""
    rows = {SOURCE: clips.source, **clips.models}
    scale = CELL / crop.side
    cells = {label: [_fit(crop.of(clip[index]), scale) for index in frames] for label, clip in rows.items()}
    return _grid(cells, _heads(clips, frames))


def draw_errors(clips: Clips, frames: Sequence[int]) -> Image.Image:
    """Error maps of the models on one scale, black for none, and the scale below."""
    scale = _scale(clips.source.shape[1:3])
    cells = {}
    for label, clip in clips.models.items():
        errors = error_of(clip[list(frames)], clips.source[list(frames)])
        cells[label] = [_fit(_heat(error / ERROR_FULL_SCALE), scale) for error in errors]
    grid = _grid(cells, _heads(clips, frames))
    bar = Image.fromarray(np.repeat(_heat(np.linspace(0, 1, 256)[None]), 12, axis=0))
    canvas = Image.new("RGB", (grid.width, grid.height + 34), PAPER)
    canvas.paste(grid, (0, 0))
    canvas.paste(bar, (LABEL, grid.height + 4))
    draw, font = ImageDraw.Draw(canvas), _font(12)
    draw.text((LABEL, grid.height + 18), "0", font=font, fill=INK)
    text = f"{ERROR_FULL_SCALE:g} of the range or more: mean absolute error over colours"
    draw.text((LABEL + 244, grid.height + 18), text, font=font, fill=INK)
    return canvas


def _heads(clips: Clips, frames: Sequence[int]) -> list[str]:
    return [f"frame {clips.first + index}" for index in frames]


def _heat(values: np.ndarray) -> np.ndarray:
    """Black, red, yellow, white for 0 to 1, (..., 3) uint8."""
    clipped = np.clip(values, 0, 1)[..., None] * 3
    return np.rint(255 * np.clip(clipped - np.array([0.0, 1.0, 2.0]), 0, 1)).astype(np.uint8)


def _scale(size: tuple[int, int]) -> float:
    scale = CELL / max(size)
    return scale if scale < 1 else round(scale)  # pixels of one size when enlarged


def _fit(picture: np.ndarray, scale: float) -> Image.Image:
    height, width = picture.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kernel = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, kernel)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _grid(rows: Mapping[str, Sequence[Image.Image]], heads: Sequence[str]) -> Image.Image:
    """Cells with row labels on the left and heads above."""
    first = next(iter(rows.values()))
    width, height, head = first[0].width + GAP, first[0].height + GAP, 22
    canvas = Image.new("RGB", (LABEL + width * len(first), head + height * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(canvas), _font(13)
    for column, text in enumerate(heads):
        draw.text((LABEL + column * width + 2, 4), text, font=font, fill=INK)
    for row, (label, cells) in enumerate(rows.items()):
        draw.text((4, head + row * height + height // 2 - 8), _shortened(label, draw, font), font=font, fill=INK)
        for column, cell in enumerate(cells):
            canvas.paste(cell, (LABEL + column * width, head + row * height))
    return canvas


def _shortened(label: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A label that fits beside the cells."""
    shown = label
    while draw.textlength(shown, font=font) > LABEL - 10:
        label = label[:-1]
        shown = f"{label}…"
    return shown


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image, whole or not at all."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG", optimize=True)
