"""How frames go through the networks: clip by clip, tile by tile, chunk by chunk, as the switches say. Not in the paper.

Every way into the model (whole clips, chunks, streams) comes down to `_encode_frames` and `_decode_frames`, and so honours
every switch: slicing is outermost, then tiles, then chunks of whole groups, so that the results do not depend on how a video
is cut in time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn

from ..operators.frames import per_frame
from .blocks import Cache, Decoder, Encoder, given_away
from .checks import check_video
from .frame_groups import FrameGroups, cut
from .slicing import by_clip
from .tiling import BlendedFrameBuffer, FrameBuffer, TileGrid, scaled

_TILE_SIZES = (
    *("tile_sample_min_height", "tile_sample_min_width"),
    *("tile_sample_stride_height", "tile_sample_stride_width"),
)


class PassesMixin(nn.Module):
    """An `encoder` and a `decoder`, and the switches that say in which parts a video goes through them."""

    encoder: Encoder
    decoder: Decoder
    quant_conv: nn.Module | None
    post_quant_conv: nn.Module | None
    config: Any
    device: torch.device
    dtype: torch.dtype
    disable_tiling: Callable[[], None]
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    tile_sample_stride_height: int | None
    tile_sample_stride_width: int | None

    def _reset_switches(self) -> None:
        self.use_slicing = False
        self.use_tiling = False
        # In pixels. A stride of None is three quarters of a tile.
        self.tile_sample_min_height, self.tile_sample_stride_height = 512, None
        self.tile_sample_min_width, self.tile_sample_stride_width = 512, None
        self.groups_per_chunk = 1

    # Switches

    @property
    def groups(self) -> FrameGroups:
        """How frames make whole groups, and the arithmetic of their counts."""
        return FrameGroups(self.temporal_compression_ratio, self.config.first_frame, self.config.frame_convention)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode frames larger than a tile in overlapping spatial tiles, blended linearly.

        Each tile goes through the whole clip before the next one starts, so that memory depends on the size of a tile
        alone. Time is never tiled: chunks are exact. See `tiling_error` for what blending costs. All sizes are in pixels.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile, 512 by default.
            tile_sample_stride_height, tile_sample_stride_width: distance between tiles, three quarters of one by default.

        Raises:
            ValueError: unless all are multiples of the spatial compression and a stride is at most its tile.
        """
        sizes = (
            512 if tile_sample_min_height is None else tile_sample_min_height,
            512 if tile_sample_min_width is None else tile_sample_min_width,
            tile_sample_stride_height,
            tile_sample_stride_width,
        )
        TileGrid.with_defaults(*sizes, self.spatial_compression_ratio)
        for name, size in zip(_TILE_SIZES, sizes, strict=True):
            setattr(self, name, size)
        self.use_tiling = True

    @property
    def groups_per_chunk(self) -> int:
        """How many groups go through the network at once when no gradient is kept: more is faster, and takes more memory."""
        return self._groups_per_chunk

    @groups_per_chunk.setter
    def groups_per_chunk(self, groups: int) -> None:
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(
                f"groups_per_chunk is {groups!r}, it must be an integer of at least 1: pass 1 for the least memory"
            )
        self._groups_per_chunk = groups

    @property
    def tile_grid(self) -> TileGrid:
        """The tiles of `enable_tiling`, or as the attributes `tile_sample_…` were set since.

        Raises:
            ValueError: if these make no grid.
        """
        height, width, down, across = (getattr(self, name) for name in _TILE_SIZES)
        return TileGrid.with_defaults(height, width, down, across, self.spatial_compression_ratio)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("tile_") and name not in _TILE_SIZES:
            raise AttributeError(f"{name} is no attribute of this model: tiles are set by {', '.join(_TILE_SIZES)}")
        super().__setattr__(name, value)

    # Passes

    def _check(self, x: Any, name: str, encodes: bool) -> None:
        network = self.encoder if encodes else self.decoder
        channels = self.config.in_channels if encodes else self.config.latent_channels
        multiple = self.spatial_compression_ratio if encodes else 1
        check_video(x, name, channels, multiple, get_parameter_dtype(network))

    def _most_groups(self, network: Encoder | Decoder, x: torch.Tensor) -> int | None:
        """Groups a chunk; None for all at once where gradients keep all activations anyway, which checkpointing avoids."""
        trained = x.requires_grad or any(parameter.requires_grad for parameter in network.parameters())
        keeps_all = torch.is_grad_enabled() and not network.gradient_checkpointing and trained
        return None if keeps_all else self.groups_per_chunk

    @staticmethod
    def _ours(cache: Cache) -> Cache:
        """A cache that the next chunk may use up. Checkpointing needs it again."""
        return cache if torch.is_grad_enabled() else given_away(cache)

    def _encode_groups(self, x: torch.Tensor, cache: Cache, parts: FrameBuffer, missing: int = 0) -> Cache:
        """Encode x, with `missing` frames repeated to make whole groups, chunk by chunk into `parts`, at one extent."""
        sizes = self.groups.chunks(x.shape[2] + missing, cache is None, self._most_groups(self.encoder, x))
        for chunk in cut(x, sizes, self.groups.front_padded):
            moments, cache = self.encoder(chunk.contiguous(memory_format=torch.channels_last_3d), cache)
            cache = self._ours(cache)
            if self.quant_conv is not None:
                moments = per_frame(self.quant_conv, moments)
            parts.append(moments)
        return cache

    def _decode_groups(self, z: torch.Tensor, cache: Cache, parts: FrameBuffer, still: bool = False) -> Cache:
        """Decode latent frames, chunk by chunk into `parts`, at one spatial extent; `still`: see `Decoder`."""
        sizes = self.groups.chunks(z.shape[2], cache is None, self._most_groups(self.decoder, z), latent=True)
        for chunk in z.split(sizes, dim=2):
            if self.post_quant_conv is not None:
                chunk = per_frame(self.post_quant_conv, chunk)
            alone = cache is None and self.groups.alone > 0
            frames, cache = self.decoder(chunk.contiguous(memory_format=torch.channels_last_3d), cache, alone, still)
            cache = self._ours(cache)
            parts.append(frames)
        return cache

    def _tiled(
        self, run: Callable, x: torch.Tensor, caches: list[Cache], parts: BlendedFrameBuffer, cell_in: int, keep_cache: bool
    ) -> None:
        """Apply `run(tile, cache, parts)` to overlapping tiles, which blend in `parts`; cells are `cell_in` pixels of x.

        Each tile's new cache takes the place of its old one in `caches`, so that no tile has two but the one at work.
        """
        tiles = self.tile_grid.tiles(x.shape[3] // cell_in, x.shape[4] // cell_in, parts.scale)
        for i, tile in enumerate(tiles):
            parts.start(tile)
            state = run(x[..., scaled(tile.rows, cell_in), scaled(tile.columns, cell_in)], caches[i], parts)
            caches[i] = state if keep_cache else None

    def _run(
        self, step: Callable, x: torch.Tensor, cache: Cache, total: int, cell_in: int, cell_out: int, keep_cache: bool
    ) -> tuple[torch.Tensor, Cache]:
        """Apply `step(x, cache, parts)` as the switches say.

        Cells are `cell_in` pixels of x and `cell_out` pixels of the `total` frames that come out. Of tiles, the cache is a
        list of one each, which changes in place.
        """
        if self.use_slicing and x.shape[0] > 1:
            return by_clip(lambda clip, own: self._run(step, clip, own, total, cell_in, cell_out, keep_cache), x, cache)
        cells = (x.shape[3] // cell_in, x.shape[4] // cell_in)
        count = self.tile_grid.count(*cells) if self.use_tiling else 1
        if cache is not None and (len(cache) if isinstance(cache, list) else 1) != count:
            raise ValueError(
                "cache is of another frame size or tiling than is set now: end the stream before either changes"
            )
        if count == 1:
            parts = FrameBuffer(total)
            cache = step(x, cache, parts)
            return parts.joined(), cache if keep_cache else None
        tiles = BlendedFrameBuffer(total, *cells, scale=cell_out)
        caches: list[Cache] = cache if isinstance(cache, list) else [None] * count
        self._tiled(step, x, caches, tiles, cell_in, keep_cache)
        return tiles.joined(), caches

    def _encode_frames(
        self, x: torch.Tensor, cache: Cache = None, missing: int = 0, keep_cache: bool = True
    ) -> tuple[torch.Tensor, Cache]:
        total = -(-(x.shape[2] + missing) // self.groups.size)
        step = functools.partial(self._encode_groups, missing=missing)
        return self._run(step, x, cache, total, self.spatial_compression_ratio, 1, keep_cache)

    def _decode_frames(
        self, z: torch.Tensor, cache: Cache = None, still: bool = False, keep_cache: bool = True
    ) -> tuple[torch.Tensor, Cache]:
        total = self.groups.total(z.shape[2]) if cache is None else self.groups.size * z.shape[2]
        step = functools.partial(self._decode_groups, still=still)
        return self._run(step, z, cache, total, 1, self.spatial_compression_ratio, keep_cache)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode a clip to moments, `(B, 2 * latent_channels, ceil(T / r_t), H / r_s, W / r_s)`."""
        self._check(x, "x", encodes=True)
        # An image is the clip that repeats it (Sec. 3.4): where no layer tells the repeated frames apart, one is enough.
        image = x.shape[2] == 1 and self.config.temporal_padding == "replicate"
        return self._encode_frames(x, None, 0 if image else self.groups.missing(x.shape[2]), keep_cache=False)[0]

    def _decode(self, z: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """Decode latents to frames, all of them or `num_frames`."""
        self._check(z, "z", encodes=False)
        skip, keep = self.groups.kept(self.groups.total(z.shape[2]), num_frames)
        frames, _ = self._decode_frames(z, None, still=z.shape[2] == 1 and not self.groups.alone, keep_cache=False)
        return frames[:, :, skip : skip + keep]
