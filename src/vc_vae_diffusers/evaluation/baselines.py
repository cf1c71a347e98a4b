"""Models under evaluation behind one interface: VC-VAE, the video and image VAEs of diffusers, and users' own.

`wrap_model` turns a loaded VAE into a `Reconstructor` (`loading.load_model` reads one by name).

Not in the paper: which frame counts its baselines were given beyond "calculated without the first frame" (Sec. 4.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..files import file_digest
from .reconstructor import FrameRule, Reconstructor, pad_size

# VC-VAE ----------------------------------------------------------------------------------------------------------------


class VCVAE(Reconstructor):
    """`AutoencoderKLVCVAE`, streamed; it pads and crops time itself."""

    streams = True

    def __init__(self, module: AutoencoderKLVCVAE, *, posterior: str = "mode"):
        super().__init__(posterior=posterior)
        self.module = module
        self.separate_first = module.config.first_frame == "separate"
        self.temporal_compression = module.temporal_compression_ratio
        self.spatial_compression = self.spatial_multiple = module.spatial_compression_ratio
        self.latent_channels = module.config.latent_channels
        # A stream whose missing frames go to its front must say how long it will be.
        self.needs_length = module.groups.front_padded

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        self._frames = video.shape[2]
        return self._latents(self.module.encode(video).latent_dist, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents, num_frames=self._frames).sample

    @torch.inference_mode()
    def reconstruct_stream(
        self, chunks: Iterable[torch.Tensor], generator: torch.Generator | None = None, num_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        if self.needs_length and num_frames is None:
            raise ValueError(
                "num_frames is None, but frame_convention '4k+1' needs the length of a stream; count the frames"
            )
        reading, encoding, decoding = _Stopwatch(self._now), _Stopwatch(self._now), _Stopwatch(self._now)
        size: list[int] = []

        def frames() -> Iterator[torch.Tensor]:
            for chunk in reading.watch(chunks):
                size[:] = chunk.shape[-2:]
                yield pad_size(chunk.to(self.device, self.dtype), self.spatial_multiple)

        def latents() -> Iterator[torch.Tensor]:
            posteriors = self.module.encode_stream(frames(), num_frames if self.needs_length else None)
            for posterior in encoding.watch(posteriors):
                z = self._latents(posterior, generator)
                self.latent_shape = tuple(z.shape)
                yield z

        decoded = self.module.decode_stream(latents(), num_frames if self.needs_length else None)
        for sample in decoding.watch(decoded):
            yield sample[..., : size[0], : size[1]].float().clamp_(-1, 1).cpu()
        self.seconds.encode += encoding.seconds - reading.seconds
        self.seconds.decode += decoding.seconds - encoding.seconds


class _Stopwatch:
    """Time spent waiting for the items of an iterator; the iterators it draws from included."""

    def __init__(self, now):
        self.now, self.seconds = now, 0.0

    def watch(self, iterable: Iterable) -> Iterator:
        iterator = iter(iterable)
        while True:
            started = self.now()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += self.now() - started
            yield item


# diffusers' video VAEs -----------------------------------------------------------------------------------------------


class CausalVideoVAE(Reconstructor):
    """Video VAEs of diffusers that take 1 + step*k frames, the first coded on its own, and return a posterior.

    Args:
        module: the VAE.
        step: frames a clip grows by.
        spatial_compression: of the latents.
        temporal_compression: of the latents, `step` by default.
        posterior: `"mode"` or `"sample"`.
    """

    separate_first = True

    def __init__(
        self,
        module: torch.nn.Module,
        step: int,
        spatial_compression: int,
        *,
        temporal_compression: int | None = None,
        latent_channels: int,
        posterior: str = "mode",
    ):
        super().__init__(posterior=posterior)
        self.module = module
        self.frame_rule = FrameRule(1, step, image=True)
        self.temporal_compression = step if temporal_compression is None else temporal_compression
        self.spatial_compression = self.spatial_multiple = spatial_compression
        self.latent_channels = latent_channels

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return self._latents(self.module.encode(video).latent_dist, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents).sample


class HunyuanVideoVAE(CausalVideoVAE):
    """HunyuanVideo, with temporal tiles of 64 frames, a step of 48, as its authors publish it (`sample_tsize`).

    diffusers cuts any clip of more than 16 frames into overlapping tiles and blends them: the 17 frames of the paper's
    protocol would come back worse than the model codes them.
    """

    _TILE, _STEP = 64, 48

    def __init__(self, module: diffusers.AutoencoderKLHunyuanVideo, *, posterior: str = "mode"):
        ratio = module.temporal_compression_ratio
        channels = module.config.latent_channels
        super().__init__(module, ratio, module.spatial_compression_ratio, latent_channels=channels, posterior=posterior)
        module.tile_sample_min_num_frames, module.tile_sample_stride_num_frames = self._TILE, self._STEP
        self.settings["temporal_tiles"] = [self._TILE, self._STEP]


class LTXVideoVAE(CausalVideoVAE):
    """LTX-Video and LTX-2; decoders that denoise are run at timestep 0, the pipelines' default."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.module.config.timestep_conditioning:
            return self.module.decode(latents).sample
        return self.module.decode(latents, latents.new_zeros(latents.shape[0])).sample


class VidTokVAE(CausalVideoVAE):
    """VidTok, causal or not, continuous or quantised; its `forward` pads the same way but always samples by default."""

    def __init__(self, module: diffusers.AutoencoderVidTok, *, posterior: str = "mode"):
        ratio = module.temporal_compression_ratio
        super().__init__(
            module,
            ratio if module.is_causal else module.num_sample_frames_batch_size,
            2 ** len(module.encoder.spatial_ds),
            temporal_compression=ratio,
            latent_channels=module.config.z_channels,
            posterior=posterior,
        )
        self.separate_first = module.is_causal
        if not module.is_causal:
            self.frame_rule = FrameRule(self.frame_rule.step, self.frame_rule.step)

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if self.module.is_causal:
            first = video[:, :, :1].expand(-1, -1, self.temporal_compression - 1, -1, -1)
            video = torch.cat([first, video], dim=2)
        encoded = self.module.encode(video)
        if self.module.regularizer == "fsq":
            return encoded[0]
        return self._latents(encoded.latent_dist, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents)


class AllegroVAE(CausalVideoVAE):
    """Allegro, which works in overlapping tiles only: 24 + 16k frames; frames smaller than its tile make one tile."""

    separate_first = False

    def __init__(self, module: diffusers.AutoencoderKLAllegro, *, posterior: str = "mode"):
        super().__init__(
            module,
            int(module.stride[0]),
            module.spatial_compression_ratio,
            temporal_compression=int(module.config.temporal_compression_ratio),
            latent_channels=module.config.latent_channels,
            posterior=posterior,
        )
        self.frame_rule = FrameRule(int(module.kernel[0]), int(module.stride[0]))
        self._kernel, self._stride = module.kernel, module.stride
        module.enable_tiling()

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        # Without this a frame smaller than a tile has no tile at all and comes back as zeros, without an error.
        sizes = [min(tile, size) for tile, size in zip(self._kernel[1:], video.shape[3:], strict=True)]
        steps = [
            step if size == tile else size
            for step, tile, size in zip(self._stride[1:], self._kernel[1:], sizes, strict=True)
        ]
        self.module.kernel, self.module.stride = (self._kernel[0], *sizes), (self._stride[0], *steps)
        return super().encode(video, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents).transpose(1, 2)  # alone of all, it decodes to (B, T, C, H, W)


class MiniMaxH3VAE(CausalVideoVAE):
    """MiniMax-H3: 22 + 17k frames, pixels normalised as for ImageNet over [0, 1]."""

    separate_first = False
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, module: diffusers.AutoencoderKLMiniMaxH3, *, posterior: str = "mode"):
        super().__init__(
            module,
            module.config.clip_length,
            module.spatial_compression_ratio,
            temporal_compression=module.temporal_compression_ratio,
            latent_channels=module.config.latent_channels,
            posterior=posterior,
        )
        overlap = module.frame_overlap if module.config.token_drop > 0 else 0
        self.frame_rule = FrameRule(module.config.clip_length + overlap, module.config.clip_length)

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (like.new_tensor(values).view(1, 3, 1, 1, 1) for values in (self._MEAN, self._STD))
        return mean, std

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        mean, std = self._statistics(video)
        return super().encode((video * 0.5 + 0.5 - mean) / std, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        sample = super().decode(latents)
        mean, std = self._statistics(sample)
        return (sample * std + mean) * 2 - 1


class TemporalDecoderVAE(Reconstructor):
    """Stable Video Diffusion's VAE: an image encoder, and a decoder that sees the frames of the whole clip."""

    def __init__(self, module: diffusers.AutoencoderKLTemporalDecoder, *, posterior: str = "mode"):
        super().__init__(posterior=posterior)
        self.module = module
        self.frame_rule = FrameRule(1, 1, image=True)
        self.spatial_compression = self.spatial_multiple = 2 ** (len(module.config.block_out_channels) - 1)
        self.latent_channels = module.config.latent_channels

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        frames = video.transpose(1, 2)
        latents = [self._latents(self.module.encode(clip).latent_dist, generator) for clip in frames]
        return torch.stack(latents).transpose(1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        decoded = [self.module.decode(clip, num_frames=clip.shape[0]).sample for clip in latents.transpose(1, 2)]
        return torch.stack(decoded).transpose(1, 2)


# diffusers' image VAEs -----------------------------------------------------------------------------------------------


class FrameByFrameVAE(Reconstructor):
    """An image VAE that returns a posterior (`AutoencoderKL` and its kin), applied to one frame at a time."""

    streams = True

    def __init__(self, module: torch.nn.Module, spatial_compression: int, latent_channels: int, *, posterior: str = "mode"):
        super().__init__(posterior=posterior)
        self.module = module
        self.frame_rule = FrameRule(1, 1, image=True)
        self.spatial_compression = self.spatial_multiple = spatial_compression
        self.latent_channels = latent_channels

    def encode_frame(self, frame: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Latents (B, C, h, w) of a frame (B, 3, H, W)."""
        return self._latents(self.module.encode(frame).latent_dist, generator)

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.stack([self.encode_frame(frame, generator) for frame in video.unbind(2)], dim=2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.module.decode(frame).sample for frame in latents.unbind(2)], dim=2)

    def reconstruct_stream(
        self, chunks: Iterable[torch.Tensor], generator: torch.Generator | None = None, num_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        for chunk in chunks:
            yield self.reconstruct(chunk, generator)


class DeterministicFrameVAE(FrameByFrameVAE):
    """Image autoencoders without a posterior: DC-AE, TAESD, VQ models."""

    def encode_frame(self, frame: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self.module.encode(frame, return_dict=False)[0]


# Users' models -------------------------------------------------------------------------------------------------------


class UserVAE(Reconstructor):
    """A model from a user's Python file; `docs/evaluation.md` describes what the file must hold.

    Args:
        model: what the file's `load` returned.
        path: of the file, for error messages.

    Raises:
        ValueError: if something is missing, naming it.
    """

    def __init__(self, model: Any, path: Path):
        super().__init__()
        required = ("encode", "decode", "frame_rule", "separate_first", "temporal_compression", "spatial_compression")
        missing = [name for name in required if getattr(model, name, None) is None]
        if missing:
            raise ValueError(f"load() of {path} returned an object without {', '.join(missing)}; see docs/evaluation.md")
        self.model = model
        self.module = model if isinstance(model, torch.nn.Module) else getattr(model, "module", None)
        least, step = model.frame_rule
        self.frame_rule = FrameRule(int(least), int(step), image=bool(model.separate_first))
        self.separate_first = bool(model.separate_first)
        self.temporal_compression = int(model.temporal_compression)
        self.spatial_compression = int(model.spatial_compression)
        self.spatial_multiple = int(getattr(model, "spatial_multiple", self.spatial_compression))
        self.latent_channels = getattr(model, "latent_channels", None)
        self.settings["adapter_sha256"] = file_digest(path)

    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.model.encode(video)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latents)


# The adapter of a class --------------------------------------------------------------------------------------------------


def wrap_model(module: Any, *, posterior: str = "mode") -> Reconstructor:
    """The adapter of a loaded VAE, by its class.

    Raises:
        ValueError: for a class without an adapter.
    """
    config = module.config
    if isinstance(module, AutoencoderKLVCVAE):
        return VCVAE(module, posterior=posterior)
    if isinstance(module, diffusers.AutoencoderKLHunyuanVideo):
        return HunyuanVideoVAE(module, posterior=posterior)
    if isinstance(module, diffusers.AutoencoderVidTok):
        return VidTokVAE(module, posterior=posterior)
    if isinstance(module, diffusers.AutoencoderKLAllegro):
        return AllegroVAE(module, posterior=posterior)
    if isinstance(module, diffusers.AutoencoderKLMiniMaxH3):
        return MiniMaxH3VAE(module, posterior=posterior)
    if isinstance(module, diffusers.AutoencoderKLTemporalDecoder):
        return TemporalDecoderVAE(module, posterior=posterior)
    if isinstance(module, (diffusers.AutoencoderKLLTXVideo, diffusers.AutoencoderKLLTX2Video)):
        return LTXVideoVAE(
            module,
            module.temporal_compression_ratio,
            module.spatial_compression_ratio,
            latent_channels=config.latent_channels,
            posterior=posterior,
        )
    geometry = _causal_geometry(module)
    if geometry is not None:
        step, temporal, spatial, channels = geometry
        return CausalVideoVAE(
            module, step, spatial, temporal_compression=temporal, latent_channels=channels, posterior=posterior
        )
    image = _image_geometry(module)
    if image is not None:
        spatial, channels, has_posterior = image
        adapter = FrameByFrameVAE if has_posterior else DeterministicFrameVAE
        return adapter(module, spatial, channels, posterior=posterior)
    raise ValueError(
        f"model is a {type(module).__name__}, for which there is no adapter; write one in a Python file "
        "(docs/evaluation.md) and give its path as the model"
    )


def _causal_geometry(module: Any) -> tuple[int, int, int, int] | None:
    """(frames a clip grows by, temporal and spatial compression, latent channels) of the 1 + step*k families."""
    config = module.config
    if isinstance(module, diffusers.AutoencoderKLWan):
        return 4, config.scale_factor_temporal, config.scale_factor_spatial, config.z_dim
    if isinstance(module, diffusers.AutoencoderKLQwenImage):
        return 4, 4, module.spatial_compression_ratio, config.z_dim
    if isinstance(module, diffusers.AutoencoderKLCogVideoX):
        # It works in batches of 8 frames and 2 latents, and tells a first frame by an odd count: 5 frames come back as 8.
        ratio = int(config.temporal_compression_ratio)
        return 2 * ratio, ratio, 2 ** (len(config.block_out_channels) - 1), config.latent_channels
    if isinstance(module, diffusers.AutoencoderKLMochi):
        return (
            module.temporal_compression_ratio,
            module.temporal_compression_ratio,
            module.spatial_compression_ratio,
            (config.latent_channels),
        )
    if isinstance(module, diffusers.AutoencoderKLCosmos):
        ratio = config.temporal_compression_ratio
        return ratio, ratio, config.spatial_compression_ratio, config.latent_channels
    if isinstance(module, diffusers.AutoencoderKLKVAEVideo):
        ratio = config.temporal_compress_times
        return ratio, ratio, 2 ** (len(config.ch_mult) - 1), config.z_channels
    if isinstance(module, (diffusers.AutoencoderKLHunyuanVideo15, diffusers.AutoencoderKLMagvit)):
        ratio = module.temporal_compression_ratio
        return ratio, ratio, module.spatial_compression_ratio, config.latent_channels
    return None


def _image_geometry(module: Any) -> tuple[int, int, bool] | None:
    """(spatial compression, latent channels, whether it has a posterior) of the image autoencoders."""
    config = module.config
    if isinstance(module, (diffusers.AutoencoderKL, diffusers.AutoencoderKLFlux2)):
        return 2 ** (len(config.block_out_channels) - 1), config.latent_channels, True
    if isinstance(module, diffusers.AsymmetricAutoencoderKL):
        return 2 ** (len(config.down_block_out_channels) - 1), config.latent_channels, True
    if isinstance(module, diffusers.AutoencoderKLHunyuanImage):
        return config.spatial_compression_ratio, config.latent_channels, True
    if isinstance(module, diffusers.AutoencoderDC):
        return module.spatial_compression_ratio, config.latent_channels, False
    if isinstance(module, diffusers.AutoencoderTiny):
        return 2 ** (len(config.encoder_block_out_channels) - 1), config.latent_channels, False
    if isinstance(module, diffusers.VQModel):
        return 2 ** (len(config.block_out_channels) - 1), config.latent_channels, False
    return None
