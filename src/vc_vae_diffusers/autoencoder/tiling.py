"""Geometry of overlapping spatial tiles, their linear blending, and the buffer that results are joined in.

Not in the paper.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import torch


@dataclass(frozen=True)
class Tile:
    """One tile of a grid: its cells, and its blending weights along each axis (float64: 1 inside, ramps at overlaps).

    `row_before` and `column_before` are the weights of the tiles above and on the left, in all.
    """

    rows: slice
    columns: slice
    row_weights: torch.Tensor
    column_weights: torch.Tensor
    row_before: torch.Tensor
    column_before: torch.Tensor

    def share(self) -> torch.Tensor:
        """This tile's part of the mean of all tiles up to it, row by row, at every pixel."""
        own = self.row_weights[:, None] * self.column_weights
        # Of rows above, all columns are there, whose weights sum to 1; of its own row, those on the left.
        return own / (self.row_before[:, None] + self.row_weights[:, None] * self.column_before + own)


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles, counted in latent cells.

    Args:
        height, width: size of a tile.
        stride_height, stride_width: distance between the origins of neighbouring tiles; the rest overlaps and is blended.
    """

    height: int
    width: int
    stride_height: int
    stride_width: int

    @classmethod
    def from_pixels(cls, height: int, width: int, stride_height: int, stride_width: int, ratio: int) -> "TileGrid":
        """Check a geometry given in pixels and convert it to cells of `ratio` pixels.

        Raises:
            ValueError: unless all are integers, positive multiples of `ratio`, and a stride is at most its tile.
        """
        geometry = {
            "tile_sample_min_height": height,
            "tile_sample_min_width": width,
            "tile_sample_stride_height": stride_height,
            "tile_sample_stride_width": stride_width,
        }
        for name, value in geometry.items():
            if not isinstance(value, Integral):
                raise ValueError(
                    f"{name} is {value!r}, it must be an integer number of pixels: pass {max(ratio, int(value))}"
                )
            if value < ratio or value % ratio != 0:
                nearest = max(ratio, round(value / ratio) * ratio)
                raise ValueError(
                    f"{name} is {value}, it must be a positive multiple of the spatial compression {ratio}: pass {nearest}"
                )
        for axis, tile, stride in (("height", height, stride_height), ("width", width, stride_width)):
            if stride > tile:
                raise ValueError(
                    f"tile_sample_stride_{axis} is {stride}, larger than tile_sample_min_{axis} {tile}, which would leave "
                    f"gaps: pass at most {tile}, less for blending"
                )
        return cls(*(value // ratio for value in geometry.values()))

    @classmethod
    def with_defaults(
        cls, height: int, width: int, stride_height: int | None, stride_width: int | None, ratio: int
    ) -> "TileGrid":
        """As `from_pixels`, where a stride of None is three quarters of its tile."""

        def stride(tile: int, given: int | None) -> int:
            if given is None:  # a tile that is no number is refused below
                return max(1, tile * 3 // 4 // ratio) * ratio if isinstance(tile, Integral) else ratio
            return given

        return cls.from_pixels(height, width, stride(height, stride_height), stride(width, stride_width), ratio)

    def count(self, height: int, width: int) -> int:
        """How many tiles hold `height` x `width` cells; 1 if nothing is to be cut."""
        return len(_spans(height, self.height, self.stride_height)) * len(_spans(width, self.width, self.stride_width))

    def tiles(self, height: int, width: int, scale: int) -> Iterator[Tile]:
        """Cut `height` x `width` cells; weights are for output at `scale` pixels a cell and sum to 1 at every pixel."""
        rows = _spans(height, self.height, self.stride_height)
        columns = _spans(width, self.width, self.stride_width)
        row_weights, column_weights = _blending_weights(rows, scale), _blending_weights(columns, scale)
        for row, (row_weight, above) in zip(rows, row_weights, strict=True):
            for column, (column_weight, left) in zip(columns, column_weights, strict=True):
                yield Tile(slice(*row), slice(*column), row_weight, column_weight, above, left)


def _spans(length: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Equal spans of `tile` that cover `length`; the last is moved back to end at the border instead of being cut."""
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, stride), length - tile]
    return [(start, start + tile) for start in starts]


def _blending_weights(spans: list[tuple[int, int]], scale: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Linear ramps over the overlap with each neighbour, normalised where more than two spans meet; and the sum before."""
    weights = []
    for i, (start, stop) in enumerate(spans):
        weight = torch.ones((stop - start) * scale, dtype=torch.float64)
        if i > 0 and (overlap := (spans[i - 1][1] - start) * scale) > 0:
            weight[:overlap] *= (torch.arange(overlap) + 0.5) / overlap
        if i + 1 < len(spans) and (overlap := (stop - spans[i + 1][0]) * scale) > 0:
            weight[-overlap:] *= ((torch.arange(overlap) + 0.5) / overlap).flip(0)
        weights.append(weight)
    total = torch.zeros(spans[-1][1] * scale, dtype=torch.float64)
    places = [slice(start * scale, stop * scale) for start, stop in spans]
    for place, weight in zip(places, weights, strict=True):
        total[place] += weight
    normalised, so_far = [], torch.zeros_like(total)
    for place, weight in zip(places, weights, strict=True):
        normalised.append((weight / total[place], so_far[place].clone()))
        so_far[place] += normalised[-1][0]
    return normalised


def scaled(cells: slice, size: int) -> slice:
    """A range of cells as a range of the `size` times finer grid."""
    return slice(cells.start * size, cells.stop * size)


class FrameBuffer:
    """Parts of a clip, joined along time in a buffer made once, so that no list of parts lives beside the result.

    Args:
        total: frames of the whole.
    """

    def __init__(self, total: int):
        self.total, self.filled = total, 0
        self.buffer: torch.Tensor | None = None

    def append(self, part: torch.Tensor) -> None:
        """Put the next frames, `(B, C, t, H, W)`, behind those that are there."""
        if self.buffer is None and part.shape[2] == self.total:
            self.buffer = part.contiguous()
            return
        if self.buffer is None:
            self.buffer = part.new_empty(*part.shape[:2], self.total, *part.shape[3:])
        self.buffer[:, :, self.filled : self.filled + part.shape[2]] = part
        self.filled += part.shape[2]

    def joined(self) -> torch.Tensor:
        """The whole, `(B, C, total, H, W)`, once all parts are there."""
        assert self.buffer is not None
        return self.buffer


class BlendedFrameBuffer(FrameBuffer):
    """Parts of the tiles of a clip, blended as they come: `start(tile)`, then `append` the parts of this tile in order.

    Tiles come in the order of their grid. The buffer holds the weighted mean of those so far, not their sum: equal tiles, as
    those of a constant picture, then stay what they are in every dtype, and no wider buffer is needed than the result.

    Args:
        total: frames of the whole.
        height, width: size of the whole in cells.
        scale: pixels of a cell; the tiles' weights must be for the same.
    """

    def __init__(self, total: int, height: int, width: int, scale: int):
        super().__init__(total)
        self.height, self.width, self.scale = height * scale, width * scale, scale

    def start(self, tile: Tile) -> None:
        """Say which tile the next parts are of."""
        self.filled = 0
        self.rows, self.columns = scaled(tile.rows, self.scale), scaled(tile.columns, self.scale)
        self.share = tile.share()

    def append(self, part: torch.Tensor) -> None:
        """Blend in the next frames of the tile, `(B, C, t, h, w)`."""
        if self.buffer is None:
            self.buffer = part.new_zeros(*part.shape[:2], self.total, self.height, self.width)
        mean = self.buffer[:, :, self.filled : self.filled + part.shape[2], self.rows, self.columns]
        wide = torch.promote_types(part.dtype, torch.float32)
        self.share = self.share.to(part.device, wide)  # travels once a tile
        difference = (part.to(wide) - mean) * self.share
        self.buffer[:, :, self.filled : self.filled + part.shape[2], self.rows, self.columns] = mean + difference
        self.filled += part.shape[2]
