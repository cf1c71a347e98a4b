"""VC-VAE: a video autoencoder that starts as an image autoencoder of keyframes and learns the motion between them.

The network is in `blocks.py`, its temporal operators in `tdc.py`. Here is the model around it: frame counts, chunks,
streams and tiles. Whole clips are chunked ones, so that results do not depend on how a video is cut.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .auto_map import PublishedModelMixin
from .blocks import Cache, Decoder, Encoder, TemporalDesign
from .frame_conv import KernelLayer
from .frame_groups import FrameGroups, repeat_frames
from .image_vae import HUB_OPTIONS, inflate, read_image_vae
from .memory_plan import MemoryPlan, apply_plan, plan
from .tdc import per_frame
from .tiling import BlendedFrameBuffer, FrameBuffer, TileGrid, scaled

logger = logging.getLogger(__name__)


@dataclass
class AutoencoderKLVCVAEOutput(BaseOutput):
    """What `AutoencoderKLVCVAE.forward` returns.

    Args:
        sample: the reconstruction, `(B, C, T, H, W)`, T as in the input.
        latent_dist: the posterior, for the KL loss.
    """

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution


class AutoencoderKLVCVAE(PublishedModelMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""VC-VAE, a video VAE with a keyframe anchor and Temporal Dynamic Difference Convolutions.

    Video is `(B, C, T, H, W)` in [-1, 1], latents are `(B, latent_channels, ceil(T / r_t), H / r_s, W / r_s)`. Any T >= 1
    is accepted and returned; a single image is a clip of one frame.

    Args:
        in_channels, out_channels, latent_channels, block_out_channels, layers_per_block, act_fn, norm_num_groups,
            mid_block_add_attention, use_quant_conv, use_post_quant_conv: as in `AutoencoderKL`; the defaults are Flux's.
        temporal_downsample: for each spatial downsampling, whether a temporal one follows. `(False, True, True)` is 4x8x8,
            `(True, True, True)` 8x8x8.
        temporal_operator: `"tdc"` (Eq. 5-7) or `"conv"`, the plain baselines (Eq. 1, 2).
        temporal_causality: `"group"` (a frame sees its group) or `"causal"` (a frame sees the past).
        temporal_padding: `"replicate"` or `"zeros"`, see `tdc.TemporalConv3d`.
        first_frame: `"in_sequence"` (Sec. 3.4) or `"separate"`, the 1 + r_t*k scheme of Table 6, which ignores
            `frame_convention`.
        frame_convention: how T becomes whole groups. `"4k"` repeats the last frame; `"4k+1"` repeats the first one, and
            `decode` without `num_frames` drops r_t - 1 frames at the start, as pipelines for causal VAEs expect.
        scaling_factor, shift_factor: of the latents; the defaults are Flux's. `from_pretrained(path, scaling_factor=…)` puts
            the new scale into `latents_std` too, and a new shift into `latents_mean`.
        latents_mean, latents_std: by channel; by default the shift, and one over the scale.
        temporal_compression_ratio, spatial_compression_ratio, scale_factor_temporal, scale_factor_spatial, z_dim,
            temperal_downsample: names under which pipelines read what follows from the above. Do not set them.
        invert_scale_latents: read by CogVideoX's image-to-video pipeline.

    Raises:
        ValueError: for a configuration that makes no network, naming the argument.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ("ResnetBlock", "Attention")
    _skip_layerwise_casting_patterns = ("norm",)
    _group_offload_block_modules = ("quant_conv", "post_quant_conv", "encoder", "decoder")
    _skip_keys = ("cache",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        temporal_operator: str = "tdc",
        temporal_causality: str = "group",
        temporal_padding: str = "replicate",
        first_frame: str = "in_sequence",
        frame_convention: str = "4k",
        scaling_factor: float = 0.3611,
        shift_factor: float | None = 0.1159,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        temporal_compression_ratio: int | None = None,
        spatial_compression_ratio: int | None = None,
        scale_factor_temporal: int | None = None,
        scale_factor_spatial: int | None = None,
        z_dim: int | None = None,
        temperal_downsample: tuple[bool, ...] | None = None,
        invert_scale_latents: bool = False,
    ):
        super().__init__()
        temporal_downsample = tuple(bool(flag) for flag in temporal_downsample)
        self._check_config()
        self.temporal_compression_ratio = 2 ** sum(temporal_downsample)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.temperal_downsample = temporal_downsample
        self.groups = FrameGroups(self.temporal_compression_ratio, first_frame, frame_convention)
        shift = 0.0 if shift_factor is None else shift_factor
        self.register_to_config(
            latents_mean=[shift] * latent_channels if latents_mean is None else list(latents_mean),
            latents_std=[1 / scaling_factor] * latent_channels if latents_std is None else list(latents_std),
            temporal_compression_ratio=self.temporal_compression_ratio,
            spatial_compression_ratio=self.spatial_compression_ratio,
            scale_factor_temporal=self.temporal_compression_ratio,
            scale_factor_spatial=self.spatial_compression_ratio,
            z_dim=latent_channels,
            temperal_downsample=temporal_downsample,
        )

        design = TemporalDesign(temporal_operator, temporal_causality, temporal_padding)
        common = (layers_per_block, norm_num_groups, act_fn, mid_block_add_attention)
        channels = tuple(block_out_channels)
        self.encoder = Encoder(in_channels, latent_channels, channels, *common, temporal_downsample, design)
        self.decoder = Decoder(out_channels, latent_channels, channels, *common, temporal_downsample[::-1], design)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self.use_slicing = False
        self.use_tiling = False
        self.tile_grid = TileGrid(64, 64, 48, 48)
        # How many groups go through the network at once when no gradient is kept: more is faster, and takes more memory.
        self.groups_per_chunk = 1

    def _check_config(self) -> None:
        config = self.config
        choices = {
            "temporal_operator": ("tdc", "conv"),
            "temporal_causality": ("group", "causal"),
            "temporal_padding": ("replicate", "zeros"),
            "first_frame": ("in_sequence", "separate"),
            "frame_convention": ("4k", "4k+1"),
        }
        for name, allowed in choices.items():
            if config[name] not in allowed:
                raise ValueError(f"{name} is {config[name]!r}, it must be one of {allowed}: choose one")
        stages = len(config.block_out_channels)
        if len(config.temporal_downsample) != stages - 1:
            raise ValueError(
                f"temporal_downsample is {tuple(config.temporal_downsample)}, it must have one flag for each of the "
                f"{stages - 1} spatial downsamplings of block_out_channels {tuple(config.block_out_channels)}"
            )
        for channels in config.block_out_channels:
            if channels % config.norm_num_groups != 0:
                raise ValueError(
                    f"block_out_channels has {channels}, not a multiple of norm_num_groups {config.norm_num_groups}: "
                    "change one of them"
                )
        for name in ("latents_mean", "latents_std"):
            if config[name] is not None and len(config[name]) != config.latent_channels:
                raise ValueError(
                    f"{name} has {len(config[name])} values, it must have one for each of the {config.latent_channels} "
                    "latent channels"
                )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read a saved configuration; a `scaling_factor` or `shift_factor` given beside it replaces the saved statistics.

        Pipelines prefer `latents_std` and `latents_mean`, and would not see the factor that the caller asked for.
        """
        config_dict = dict(config_dict)
        for factor, statistic in (("scaling_factor", "latents_std"), ("shift_factor", "latents_mean")):
            if factor in kwargs and statistic not in kwargs:
                measured = config_dict.pop(statistic, None)
                if measured is not None and len(set(measured)) > 1:
                    logger.warning(
                        f"{factor}={kwargs[factor]} replaces the {statistic} by channel that this configuration has; pass "
                        f"{statistic} as well to keep them"
                    )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_image_vae(cls, source: str, subfolder: str | None = None, **config) -> "AutoencoderKLVCVAE":
        """Build a VC-VAE whose keyframes are those of an image VAE, with nothing trained yet (Sec. 3.2, Eq. 3, 4).

        Args:
            source: a folder or hub id of an `AutoencoderKL`, or a safetensors file in diffusers' or BFL's layout.
            subfolder: of the folder or repository, for example `"vae"`.
            config: settings that differ from the image VAE's, for example `temporal_downsample`, `latent_channels`; and
                `token`, `revision`, `variant`, `cache_dir`, `local_files_only` for the hub.

        Raises:
            ValueError: if keys are missing or left over, naming them, or for a setting that does not exist.
            OSError: if the source cannot be read; for a gated repository it says how to get access.
        """
        hub_options = {k: config.pop(k) for k in HUB_OPTIONS if k in config}
        unknown = sorted(set(config) - (set(inspect.signature(cls.__init__).parameters) - {"self"}))
        if unknown:
            raise ValueError(
                f"config has {', '.join(unknown)}, which {cls.__name__} does not know: check the spelling (for another "
                "dtype or device call .to(…) on the result)"
            )
        image_vae = read_image_vae(source, subfolder=subfolder, **hub_options)
        for assumption in image_vae.assumptions:
            logger.warning("%s: %s", image_vae.source, assumption)
        vae = cls.from_config({**image_vae.video_config(), **config})
        inflate(vae, image_vae)
        return vae.eval()

    # Frames and groups -----------------------------------------------------------------------------------------------

    @property
    def _static_images(self) -> bool:
        """Whether one frame goes through the encoder as the clip that repeats it (Sec. 3.4) would."""
        return self.config.temporal_padding == "replicate"

    def _decodes_keyframes_alone(self) -> bool:
        """Whether the frames of an only group are equal, and one may stand for all: in a model whose motion is not trained.

        Training tells the halves of the temporal upsampling apart, and a group is then decoded frame by frame.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        ups = [block.temporal_upsampler for block in self.decoder.up_blocks if block.temporal_upsampler is not None]
        return self._static_images and not self.groups.alone and all(up.repeats() for up in ups)

    def _chunks(self, network: Encoder | Decoder, x: torch.Tensor, frames: int, group: int, start: bool) -> list[int]:
        """Sizes of the chunks in which `frames` frames made of x, whole groups of `group`, go through the network."""
        sizes = []
        if start and self.groups.alone:
            sizes.append(1)
            frames -= 1
        # With gradients all activations are kept anyway, and one chunk is fastest; checkpointing keeps few of them.
        keeps_all = (
            torch.is_grad_enabled()
            and not network.gradient_checkpointing
            and (x.requires_grad or any(parameter.requires_grad for parameter in network.parameters()))
        )
        size = max(frames, 1) if keeps_all else group * self.groups_per_chunk
        return sizes + [min(size, frames - done) for done in range(0, frames, size)]

    def _check_video(self, x: torch.Tensor, name: str, channels: int, multiple: int) -> None:
        if x.ndim != 5:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, it must be (batch, channels, frames, height, width): add the frame "
                "axis of an image with .unsqueeze(2)"
            )
        if x.shape[1] != channels:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and so {x.shape[1]} channels, the model takes {channels}: the order is "
                "(batch, channels, frames, height, width)"
            )
        for axis, size in (("clips", x.shape[0]), ("frames", x.shape[2])):
            if size == 0:
                raise ValueError(f"{name} has no {axis}, shape {tuple(x.shape)}: pass at least one")
        for axis, size in (("height", x.shape[3]), ("width", x.shape[4])):
            if size == 0 or size % multiple != 0:
                raise ValueError(
                    f"{name} has {axis} {size}, not a positive multiple of the spatial compression {multiple}: pad to "
                    f"{max(1, -(-size // multiple)) * multiple} and crop the result, as `vcvae reconstruct` does"
                )

    # Whole groups through the network ----------------------------------------------------------------------------------

    def _encode_groups(self, x: torch.Tensor, cache: Cache, parts: FrameBuffer, missing: int = 0) -> Cache:
        """Encode x, with `missing` frames repeated to make whole groups, chunk by chunk into `parts`, at one extent."""
        front = missing if self.groups.front_padded else 0
        frames, done = x.shape[2] + missing, -front
        for size in self._chunks(self.encoder, x, frames, self.temporal_compression_ratio, start=cache is None):
            chunk = x[:, :, max(done, 0) : done + size]
            chunk = repeat_frames(chunk, size - chunk.shape[2], front=front > 0)
            moments, cache = self.encoder(chunk.contiguous(memory_format=torch.channels_last_3d), cache)
            if self.quant_conv is not None:
                moments = per_frame(self.quant_conv, moments)
            parts.append(moments)
            done += size
        return cache

    def _decode_groups(self, z: torch.Tensor, cache: Cache, parts: FrameBuffer, static: bool = False) -> Cache:
        """Decode latent frames, chunk by chunk into `parts`, at one spatial extent; a `static` one to a single frame."""
        alone = cache is None and (static or self.groups.alone > 0)
        for chunk in z.split(self._chunks(self.decoder, z, z.shape[2], 1, start=cache is None), dim=2):
            if self.post_quant_conv is not None:
                chunk = per_frame(self.post_quant_conv, chunk)
            chunk = chunk.contiguous(memory_format=torch.channels_last_3d)
            frames, cache = self.decoder(chunk, cache, first_frame_alone=alone)
            alone = False
            parts.append(frames)
        return cache

    def _tiled(
        self, run: Callable, x: torch.Tensor, caches: Cache, parts: FrameBuffer, cell_in: int, keep_cache: bool
    ) -> Cache:
        """Apply `run(tile, cache, parts)` to overlapping tiles, which blend in `parts`; cells are `cell_in` pixels of x."""
        tiles = list(self.tile_grid.tiles(x.shape[3] // cell_in, x.shape[4] // cell_in, parts.scale))
        states = []
        for tile, cache in zip(tiles, caches or (None,) * len(tiles), strict=True):
            parts.start(tile)
            state = run(x[..., scaled(tile.rows, cell_in), scaled(tile.columns, cell_in)], cache, parts)
            states.append(state if keep_cache else None)
        return tuple(states)

    def _encode_region(
        self, x: torch.Tensor, cache: Cache, tiled: bool, keep_cache: bool, missing: int = 0
    ) -> tuple[torch.Tensor, Cache]:
        ratio = self.spatial_compression_ratio
        cells = (x.shape[3] // ratio, x.shape[4] // ratio)
        total = -(-(x.shape[2] + missing) // self.temporal_compression_ratio)
        if not tiled or self.tile_grid.covers(*cells):
            parts = FrameBuffer(total)
            cache = self._encode_groups(x, cache, parts, missing)
        else:
            parts = BlendedFrameBuffer(total, *cells, scale=1)
            run = functools.partial(self._encode_groups, missing=missing)
            cache = self._tiled(run, x, cache, parts, ratio, keep_cache)
        return parts.buffer, cache

    def _decode_region(
        self, z: torch.Tensor, cache: Cache, tiled: bool, keep_cache: bool, static: bool = False
    ) -> tuple[torch.Tensor, Cache]:
        cells = z.shape[3:]
        alone = 1 if cache is None and (static or self.groups.alone) else 0
        total = (z.shape[2] - alone) * self.temporal_compression_ratio + alone
        if not tiled or self.tile_grid.covers(*cells):
            parts = FrameBuffer(total)
            cache = self._decode_groups(z, cache, parts, static)
        else:
            parts = BlendedFrameBuffer(total, *cells, scale=self.spatial_compression_ratio)
            run = functools.partial(self._decode_groups, static=static)
            cache = self._tiled(run, z, cache, parts, 1, keep_cache)
        return parts.buffer, cache

    # Whole clips -------------------------------------------------------------------------------------------------------

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode a clip to moments, `(B, 2 * latent_channels, ceil(T / r_t), H / r_s, W / r_s)`."""
        self._check_video(x, "x", self.config.in_channels, self.spatial_compression_ratio)
        static = x.shape[2] == 1 and self._static_images
        missing = 0 if static else self.groups.missing(x.shape[2])
        return self._encode_region(x, None, self.use_tiling, keep_cache=False, missing=missing)[0]

    def _decode(self, z: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """Decode latents to frames, all of them or `num_frames`."""
        self._check_video(z, "z", self.config.latent_channels, 1)
        static = z.shape[2] == 1 and self._decodes_keyframes_alone()
        frames, _ = self._decode_region(z, None, self.use_tiling, keep_cache=False, static=static)
        if static:
            frames = frames.expand(-1, -1, self.temporal_compression_ratio, -1, -1)
        skip, keep = self.groups.kept(frames.shape[2], num_frames)
        frames = frames[:, :, skip : skip + keep]
        return frames.contiguous(memory_format=torch.channels_last_3d) if static else frames

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode a clip of any T >= 1.

        Args:
            x: `(B, C, T, H, W)` in [-1, 1], H and W multiples of the spatial compression.
            return_dict: False gives a tuple.

        Returns:
            The posterior over `(B, latent_channels, ceil(T / r_t), H / r_s, W / r_s)` as `.latent_dist`.

        Raises:
            ValueError: for a wrong shape.
        """
        slices = x.split(1) if self.use_slicing and x.shape[0] > 1 else (x,)
        moments = [self._encode(part) for part in slices]
        posterior = DiagonalGaussianDistribution(torch.cat(moments) if len(moments) > 1 else moments[0])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, num_frames: int | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents.

        Args:
            z: `(B, latent_channels, n, h, w)`, unscaled.
            return_dict: False gives a tuple.
            num_frames: T of the clip that was encoded, or fewer frames to keep from its start (not for `"4k+1"`, which
                repeated the first frame as often as T asked for); None gives all `r_t * n` frames (`r_t * n - r_t + 1` for
                `"4k+1"`).

        Returns:
            The frames, `(B, C, T, H, W)`, as `.sample`, not clamped.

        Raises:
            ValueError: for a wrong shape, or more frames than the latents hold.
        """
        slices = z.split(1) if self.use_slicing and z.shape[0] > 1 else (z,)
        decoded = [self._decode(part, num_frames) for part in slices]
        sample = torch.cat(decoded) if len(decoded) > 1 else decoded[0]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> AutoencoderKLVCVAEOutput | tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstruct a clip: encode, take the posterior's mode or a sample of it, decode.

        Args:
            sample: `(B, C, T, H, W)` in [-1, 1].
            sample_posterior: sample instead of taking the mode (training).
            return_dict: False gives the tuple (reconstruction, posterior).
            generator: for the sample.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z, num_frames=sample.shape[2]).sample
        if not return_dict:
            return reconstruction, posterior
        return AutoencoderKLVCVAEOutput(sample=reconstruction, latent_dist=posterior)

    # Chunks and streams ------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode_chunk(self, frames: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        """Encode the next whole groups of a stream. Chunks one after the other give what `encode` gives for the clip.

        Args:
            frames: `(B, C, r_t * n, H, W)`. The first chunk of a stream is of any length with `frame_convention="4k+1"`,
                and `1 + r_t * n` frames with `first_frame="separate"`.
            cache: what the call before returned; None starts a stream. It is not changed.

        Returns:
            Moments `(B, 2 * latent_channels, n, H / r_s, W / r_s)` and the next cache.

        Raises:
            ValueError: for a wrong shape, or frames that do not make whole groups.
        """
        self._check_video(frames, "frames", self.config.in_channels, self.spatial_compression_ratio)
        missing = self.groups.missing(frames.shape[2]) if cache is None and self.groups.front_padded else 0
        self.groups.check_chunk(frames.shape[2] + missing, start=cache is None)
        return self._encode_region(frames, cache, self.use_tiling, keep_cache=True, missing=missing)

    @apply_forward_hook
    def decode_chunk(self, latents: torch.Tensor, cache: Cache = None) -> tuple[torch.Tensor, Cache]:
        """Decode the next latent frames of a stream. Chunks one after the other give what `decode` gives for all of them.

        Args:
            latents: `(B, latent_channels, n, h, w)`, unscaled, n >= 1.
            cache: what the call before returned; None starts a stream. It is not changed.

        Returns:
            Frames `(B, C, r_t * n, H, W)`, fewer at the start of a stream for `"4k+1"` and `"separate"`; the next cache.

        Raises:
            ValueError: for a wrong shape.
        """
        self._check_video(latents, "latents", self.config.latent_channels, 1)
        frames, next_cache = self._decode_region(latents, cache, self.use_tiling, keep_cache=True)
        if cache is None:
            frames = frames[:, :, self.groups.kept(frames.shape[2], None)[0] :]
        return frames, next_cache

    def encode_stream(
        self, frames: Iterable[torch.Tensor], num_frames: int | None = None
    ) -> Iterator[DiagonalGaussianDistribution]:
        """Encode a stream with memory that does not depend on its length.

        Args:
            frames: chunks `(B, C, t, H, W)` of any lengths.
            num_frames: of the whole stream. Needed only with `frame_convention="4k+1"`, where the frames missing from the
                last group are repeated at the start, unless it is 1 + r_t * k.

        Yields:
            The posterior of every group, as soon as its last frame is there (of several groups, when a chunk completes
            several and `groups_per_chunk` is more than 1).

        Raises:
            ValueError: for an empty stream, a wrong shape, or a stream that is not of `num_frames` frames.
        """
        ratio, seen, cache = self.temporal_compression_ratio, 0, None
        pending: torch.Tensor | None = None
        for chunk in frames:
            if chunk.ndim == 5 and chunk.shape[2] == 0:
                continue
            self._check_video(chunk, "frames", self.config.in_channels, self.spatial_compression_ratio)
            seen += chunk.shape[2]
            if pending is None and self.groups.front_padded:
                chunk = repeat_frames(
                    chunk, ratio - 1 if num_frames is None else self.groups.missing(num_frames), front=True
                )
            pending = chunk if pending is None else torch.cat([pending, chunk], dim=2)
            done = 0
            while (ready := self.groups.ready(pending.shape[2] - done, cache is None, self.groups_per_chunk)) > 0:
                moments, cache = self._next_groups(pending[:, :, done : done + ready], cache)
                done += ready
                yield DiagonalGaussianDistribution(moments)
            pending = pending[:, :, done:].clone()
        if seen == 0:
            raise ValueError("frames is an empty stream: pass at least one frame")
        if num_frames is not None and seen != num_frames:
            raise ValueError(f"num_frames is {num_frames}, the stream had {seen} frames: pass the true number")
        if pending.shape[2] > 0:
            if self.groups.front_padded:
                raise ValueError(
                    f"the stream had {seen} frames, not 1 + {ratio}*k as frame_convention '4k+1' takes a stream of unknown "
                    "length to have: pass num_frames"
                )
            pending = repeat_frames(pending, -pending.shape[2] % ratio, front=False)
            yield DiagonalGaussianDistribution(self._next_groups(pending, cache)[0])

    @apply_forward_hook
    def _next_groups(self, frames: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        return self._encode_region(frames, cache, self.use_tiling, keep_cache=True)

    def decode_stream(self, latents: Iterable[torch.Tensor], num_frames: int | None = None) -> Iterator[torch.Tensor]:
        """Decode a stream with memory that does not depend on its length.

        Args:
            latents: chunks `(B, latent_channels, n, h, w)` of any lengths, unscaled.
            num_frames: of the clip that was encoded; None gives all frames, as in `decode`.

        Yields:
            Frames `(B, C, t, H, W)`, `groups_per_chunk` groups at a time, t of them fewer at the ends.

        Raises:
            ValueError: for an empty stream, a wrong shape, or fewer frames than `num_frames`.
        """
        if num_frames is not None and num_frames < 1:
            raise ValueError(
                f"num_frames is {num_frames}, it must be at least 1: pass the length of the clip, or None for all"
            )
        cache, given = None, 0
        for chunk in latents:
            if chunk.ndim == 5 and chunk.shape[2] == 0:
                continue
            self._check_video(chunk, "latents", self.config.latent_channels, 1)
            for part in chunk.split(self.groups_per_chunk, dim=2):
                if given == num_frames:
                    self._check_nothing_follows(num_frames)
                    return
                start = cache is None
                frames, cache = self._next_frames(part, cache)
                if start and self.groups.front_padded:
                    missing = self.groups.missing(1 if num_frames is None else num_frames)
                    frames = frames[:, :, missing:]
                if num_frames is not None:
                    frames = frames[:, :, : num_frames - given]
                given += frames.shape[2]
                if frames.shape[2] > 0:
                    yield frames
        if cache is None:
            raise ValueError("latents is an empty stream: pass at least one latent frame")
        if num_frames is not None and given < num_frames:
            raise ValueError(f"num_frames is {num_frames}, the stream of latents held {given} frames: pass at most that")

    def _check_nothing_follows(self, num_frames: int) -> None:
        if self.groups.front_padded:
            raise ValueError(
                f"num_frames is {num_frames}, the stream holds latents of a longer clip, whose first frame frame_convention "
                "'4k+1' repeated another number of times: pass its own length, or None for all"
            )

    @apply_forward_hook
    def _next_frames(self, latents: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        return self._decode_region(latents, cache, self.use_tiling, keep_cache=True)

    # Switches ----------------------------------------------------------------------------------------------------------

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
        ratio = self.spatial_compression_ratio
        height = 512 if tile_sample_min_height is None else tile_sample_min_height
        width = 512 if tile_sample_min_width is None else tile_sample_min_width
        stride_height = (
            max(1, height * 3 // 4 // ratio) * ratio if tile_sample_stride_height is None else tile_sample_stride_height
        )
        stride_width = (
            max(1, width * 3 // 4 // ratio) * ratio if tile_sample_stride_width is None else tile_sample_stride_width
        )
        self.tile_grid = TileGrid.from_pixels(height, width, stride_height, stride_width, ratio)
        self.use_tiling = True

    def enable_auto_memory(
        self,
        height: int,
        width: int,
        num_frames: int | None = None,
        memory: int | str | None = None,
        **options,
    ) -> MemoryPlan:
        """Choose `groups_per_chunk` and tiles for a size of video and set them, so that it fits into memory.

        The choice is made once and for this size, not at every call: what a model computes does not then depend on what
        else happened to be in memory. It is an estimate (`memory_plan.py` says how good); nothing is run.

        Args:
            height, width: of the video in pixels, multiples of the spatial compression.
            num_frames: of a clip for `encode` and `decode`; None for `encode_stream` and `decode_stream`.
            memory: the budget of the process on the model's device, in bytes or as `"8GB"`; None is what is free now.
            options: of `memory_plan.plan`: `operations`, `batch_size`, `max_groups`.

        Returns:
            The plan, with estimates of the peak by its parts.

        Raises:
            ValueError: if nothing fits, with what the smallest setting takes.
        """
        chosen = plan(self, height, width, num_frames, memory, **options)
        apply_plan(self, chosen)
        return chosen

    @apply_forward_hook
    @torch.no_grad()
    def tiling_error(self, video: torch.Tensor) -> dict[str, float]:
        """How far the tiled result is from the whole one, with the geometry of `enable_tiling`.

        Args:
            video: `(B, C, T, H, W)` in [-1, 1], larger than a tile and small enough to be encoded whole.

        Returns:
            `latent_max` and `latent_rms`, the maximum and root mean square of the difference of the latents over the
            standard deviation of the whole ones; `sample_max` and `sample_psnr` (dB, peak-to-peak 2) of the decoded frames.
        """
        self._check_video(video, "video", self.config.in_channels, self.spatial_compression_ratio)
        missing = self.groups.missing(video.shape[2])
        whole, tiled = (
            self._encode_region(video, None, tiling, False, missing)[0].chunk(2, dim=1)[0] for tiling in (False, True)
        )
        frames, tiled_frames = (self._decode_region(whole, None, tiling, keep_cache=False)[0] for tiling in (False, True))
        latent_error = (tiled - whole).float() / whole.float().std()
        error = (tiled_frames - frames).float()
        mse = error.square().mean().item()
        return {
            "latent_max": latent_error.abs().max().item(),
            "latent_rms": latent_error.square().mean().sqrt().item(),
            "sample_max": error.abs().max().item(),
            "sample_psnr": float("inf") if mse == 0 else 10 * math.log10(4 / mse),
        }

    def fuse_tdc(self) -> None:
        """Fold kernels once for inference, and pack them for this processor. The slices stay, and are what is saved.

        Results change by rounding at most. Loading weights, `train()`, `to(…)` and copies drop the folded kernels. Weights
        changed in place otherwise (`EMAModel.copy_to`) do not: call `unfuse_tdc()` or this method again then.
        """
        for module in self.modules():
            if isinstance(module, KernelLayer):
                module.fuse()

    def unfuse_tdc(self) -> None:
        """Undo `fuse_tdc`: kernels are folded at every call again. `train()` does it too."""
        for module in self.modules():
            if isinstance(module, KernelLayer):
                module.unfuse()

    def train(self, mode: bool = True) -> "AutoencoderKLVCVAE":
        """As in `nn.Module`. Training mode drops fused kernels, which would go stale."""
        if mode:
            self.unfuse_tdc()
        return super().train(mode)
