"""A VC-VAE as the object that ComfyUI hands round as VAE, for its stock nodes and for those of this pack.

The stock class holds a whole clip in memory and tiles in time with blending. Here clips are streamed group by group, which
is exact, with a progress bar; an interrupt takes effect between two runs of the network. Pixels are ComfyUI's `(T, H, W, C)`
or `(B, T, H, W, C)` in [0, 1], latents `(B, C, T', h, w)`, unscaled, as those of other VAEs in ComfyUI are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from torch import nn

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.memory_plan import MemoryEstimator

logger = logging.getLogger(__name__)

# Kernels that `fuse_tdc` keeps while a pass runs, at most so many times the weights.
FUSED_SHARE = 1.6
# Tiles in pixels where whole frames did not fit, as the stock VAE takes then.
TILE_AFTER_OOM = 256


class _Managed(nn.Module):
    """What ComfyUI's model management moves about; it writes attributes such as `device`, which a diffusers model owns."""

    def __init__(self, model: AutoencoderKLVCVAE):
        super().__init__()
        self.model = model


@dataclass(frozen=True)
class Parts:
    """In which parts a clip goes through the network.

    Args:
        tile: height and width of a tile in pixels; None for whole frames.
        overlap: of neighbouring tiles in pixels; None is a quarter of a tile.
        groups: groups of frames at once.
    """

    tile: tuple[int, int] | None = None
    overlap: int | None = None
    groups: int = 1

    def tile_of(self, model: AutoencoderKLVCVAE) -> tuple[int, int] | None:
        """The tile in multiples of the model's spatial compression."""
        ratio = model.spatial_compression_ratio
        return self.tile and tuple(max(1, side // ratio) * ratio for side in self.tile)

    def of(self, model: AutoencoderKLVCVAE) -> AutoencoderKLVCVAE:
        """The same model, weights shared, with these switches and no others."""
        sides, ratio, model = self.tile_of(model), model.spatial_compression_ratio, copy.copy(model)
        model.use_slicing, model.use_tiling, model.groups_per_chunk = True, False, self.groups
        if sides is not None:
            overlaps = [side // 4 if self.overlap is None else min(self.overlap, side // 2) for side in sides]
            model.enable_tiling(*sides, *(s - o // ratio * ratio for s, o in zip(sides, overlaps, strict=True)))
        return model


class VideoVAE:
    """A VC-VAE for ComfyUI; attributes and methods without a docstring here are those of ComfyUI's own `VAE`.

    Args:
        model: to be managed by ComfyUI from now on. It computes in the dtype that it has.
    """

    latent_dim = 3
    not_video = False
    crop_input = True
    extra_1d_channel = None
    disable_offload = True  # its layers are not ComfyUI's, whose weights can stay behind one by one
    working_dtypes = (torch.bfloat16, torch.float32)  # in ComfyUI's order of choice

    def __init__(self, model: AutoencoderKLVCVAE):
        self.device, self.output_device = model_management.vae_device(), model_management.intermediate_device()
        self.vae_dtype, self.model = model.dtype, model.eval().requires_grad_(False)
        self.first_stage_model = _Managed(self.model)
        offload = model_management.vae_offload_device()
        self.patcher = ModelPatcher(self.first_stage_model, load_device=self.device, offload_device=offload)
        self.size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.latent_channels, self.output_channels = model.config.latent_channels, model.config.out_channels
        groups, ratio = model.groups, model.spatial_compression_ratio
        self.downscale_ratio = (lambda frames: groups.latent_frames(max(1, frames)), ratio, ratio)
        self.upscale_ratio = (lambda latent_frames: groups.frames(max(1, latent_frames)), ratio, ratio)
        self.downscale_index_formula = self.upscale_index_formula = (groups.size, ratio, ratio)
        self._memory: dict[tuple, int] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype | None = None, **options: Any) -> VideoVAE:
        """Load a folder or hub id, with the options of the model's `from_pretrained`; ComfyUI chooses a dtype of None.

        Raises:
            ValueError, OSError: as the model's.
        """
        dtype = dtype or model_management.vae_dtype(model_management.vae_device(), list(cls.working_dtypes))
        return cls(AutoencoderKLVCVAE.from_pretrained(source, torch_dtype=dtype, **options))

    # What stock nodes ask

    def model_size(self) -> int:
        return self.size

    def is_dynamic(self) -> bool:
        return False

    def throw_exception_if_invalid(self) -> None:
        """A VC-VAE that could be loaded is valid."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def spacial_compression_encode(self) -> int:
        return self.model.spatial_compression_ratio

    spacial_compression_decode = spacial_compression_encode

    def temporal_compression_decode(self) -> int:
        return self.model.temporal_compression_ratio

    def process_input(self, image: torch.Tensor) -> torch.Tensor:
        return image * 2 - 1

    def process_output(self, image: torch.Tensor) -> torch.Tensor:
        return ((image + 1) / 2).clamp(0, 1)

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cut from the middle to multiples of the spatial compression, as ComfyUI does for every VAE."""
        ratio = self.model.spatial_compression_ratio
        for axis in (-3, -2):
            extra = pixels.shape[axis] % ratio
            pixels = pixels.narrow(axis, extra // 2, pixels.shape[axis] - extra)
        return pixels

    def memory_used_encode(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return self.memory_used("encode", shape[-2], shape[-1], Parts())

    def memory_used_decode(self, shape: torch.Size, dtype: torch.dtype) -> int:
        ratio = self.model.spatial_compression_ratio
        return self.memory_used("decode", shape[-2] * ratio, shape[-1] * ratio, Parts())

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        return self.encode_clip(self.vae_encode_crop_pixels(pixel_samples))

    def decode(self, samples_in: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        return self.decode_clip(samples_in)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """As in ComfyUI, sizes in pixels and frames, but that time is cut exactly: `overlap_t` is not needed."""
        groups = 1 if tile_t is None else max(1, tile_t // self.model.temporal_compression_ratio)
        parts = Parts((tile_y or 512, tile_x or 512), overlap, groups)
        return self.encode_clip(self.vae_encode_crop_pixels(pixel_samples), parts)

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """As in ComfyUI, sizes in latent cells and frames, but that time is cut exactly: `overlap_t` is not needed."""
        ratio = self.model.spatial_compression_ratio
        tile = ((tile_y or 512 // ratio) * ratio, (tile_x or 512 // ratio) * ratio)
        overlap = None if overlap is None else overlap * ratio
        return self.decode_clip(samples, parts=Parts(tile, overlap, max(1, tile_t or 1)))

    # Passes

    def encode_clip(
        self, pixels: torch.Tensor, parts: Parts | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode clips of any length and size; frames are padded at the bottom and on the right by repeating their ends.

        Args:
            pixels: `(T, H, W, C)` or `(B, T, H, W, C)` in [0, 1]; channels beyond the model's (alpha) are left out.
            parts: None for whole frames, group by group; tiles are tried then if memory does not suffice.
            generator: samples the posterior; None takes its mode.

        Returns:
            Latents `(B, C, T', h, w)`, float32 on ComfyUI's device for results.

        Raises:
            ValueError: for another shape.
        """
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < self.model.config.in_channels:
            raise ValueError(
                f"pixels is of shape {tuple(pixels.shape)}, it must be an IMAGE batch (T, H, W, C) or clips (B, T, H, W, C) "
                f"with {self.model.config.in_channels} channels at least: pass frames, not masks or latents"
            )
        clips = pixels if pixels.ndim == 5 else pixels[None]
        clips = clips[..., : self.model.config.in_channels].movedim(-1, 1)
        ratio = self.model.spatial_compression_ratio
        size = [-(-side // ratio) * ratio for side in clips.shape[-2:]]

        def encode(parts: Parts) -> torch.Tensor:
            with self._at_work("encode", *size, parts) as model:
                progress = ProgressBar(clips.shape[2])
                posteriors = model.encode_stream(self._chunks(clips, model, progress), num_frames=clips.shape[2])
                # Of one frame, no group is to be completed by repeating it: the model knows that it is an image.
                if clips.shape[2] == 1:
                    posteriors = [model.encode(image).latent_dist for image in self._chunks(clips, model, progress)]
                latents = [p.mode() if generator is None else p.sample(generator) for p in posteriors]
                return torch.cat([part.to(self.output_device, torch.float32) for part in latents], dim=2)

        return self._with_tiles_if_needed(encode, parts)

    def decode_clip(
        self,
        latents: torch.Tensor,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        parts: Parts | None = None,
    ) -> torch.Tensor:
        """Decode latents.

        Args:
            latents: `(B, C, T', h, w)`, unscaled.
            num_frames: as in the model's `decode`; None gives all.
            size: height and width to which frames are cut, those that were encoded; None cuts nothing.
            parts: as in `encode_clip`.

        Returns:
            `(B, T, H, W, C)` float32 in [0, 1] on ComfyUI's device for results.

        Raises:
            ValueError: for another shape, or more frames than there are.
        """
        if latents.ndim != 5:
            raise ValueError(
                f"samples is of shape {tuple(latents.shape)}, latents of video have 5 dimensions (B, C, T', h, w): encode "
                "with this VAE, or start from an empty latent of a video model"
            )
        ratio, groups = self.model.spatial_compression_ratio, self.model.groups
        full = (latents.shape[-2] * ratio, latents.shape[-1] * ratio)
        height, width = size or full
        count = groups.kept(groups.total(latents.shape[2]), num_frames)[1]

        def decode(parts: Parts) -> torch.Tensor:
            with self._at_work("decode", *full, parts) as model:
                progress, done = ProgressBar(count), 0
                shape = (latents.shape[0], count, height, width, self.output_channels)
                images = torch.empty(shape, device=self.output_device)
                inputs = (part.to(self.device, self.vae_dtype) for part in latents.split(parts.groups, dim=2))
                stream = model.decode_stream(inputs, num_frames=num_frames)
                if latents.shape[2] == 1:
                    stream = [model.decode(latent, num_frames=num_frames).sample for latent in inputs]
                for frames in stream:
                    end = done + frames.shape[2]
                    images[:, done:end] = self.process_output(frames.float()).movedim(1, -1)[:, :, :height, :width]
                    progress.update(frames.shape[2])
                    done = end
                return images

        return self._with_tiles_if_needed(decode, parts)

    def _chunks(self, clips: torch.Tensor, model: AutoencoderKLVCVAE, progress: ProgressBar) -> Iterator[torch.Tensor]:
        """Frames `(B, C, t, H, W)` for the network, those of one chunk at a time."""
        bottom, right = (-side % model.spatial_compression_ratio for side in clips.shape[-2:])
        for chunk in clips.split(model.temporal_compression_ratio * model.groups_per_chunk, dim=2):
            chunk = self.process_input(chunk.to(self.device, torch.float32))
            yield F.pad(chunk, (0, right, 0, bottom, 0, 0), mode="replicate").to(self.vae_dtype)
            progress.update(chunk.shape[2])

    def _with_tiles_if_needed(self, run: Callable[[Parts], torch.Tensor], parts: Parts | None) -> torch.Tensor:
        """Run in these parts; where none are given, in whole frames or, if memory does not suffice for them, in tiles."""
        if parts is not None:
            return run(parts)
        try:
            return run(Parts())
        except model_management.OOM_EXCEPTION as error:
            if not isinstance(error, torch.OutOfMemoryError):
                raise
        # Out of the handler, which keeps the tensors of the failed pass.
        logger.warning("VC-VAE: out of memory with whole frames, going on in tiles of %d pixels", TILE_AFTER_OOM)
        model_management.soft_empty_cache()
        return run(Parts((TILE_AFTER_OOM, TILE_AFTER_OOM)))

    @contextmanager
    def _at_work(self, operation: str, height: int, width: int, parts: Parts) -> Iterator[AutoencoderKLVCVAE]:
        """The model on its device with room for a pass, kernels folded for its duration, stoppable between runs."""
        memory = self.memory_used(operation, height, width, parts)
        model_management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        network = self.model.encoder if operation == "encode" else self.model.decoder
        stop = network.register_forward_pre_hook(lambda *_: model_management.throw_exception_if_processing_interrupted())
        try:
            with torch.no_grad():
                self.model.fuse_tdc()
                yield parts.of(self.model)
        finally:
            stop.remove()
            self.model.unfuse_tdc()

    def memory_used(self, operation: str, height: int, width: int, parts: Parts) -> int:
        """Bytes that a pass takes on the device besides the weights; streams do not depend on the number of frames."""
        key = (operation, height, width, parts)
        if key not in self._memory:
            kind = "cpu" if self.device.type == "cpu" else "cuda"  # other accelerators are taken for one of those
            settings = {"groups_per_chunk": parts.groups, "tile": parts.tile_of(self.model)}
            estimator = MemoryEstimator(self.model, kind, self.vae_dtype, runtime=0)
            estimate = estimator.estimate(operation, height, width, None, **settings)
            kernels = int(FUSED_SHARE * self.size)
            self._memory[key] = estimate.video + estimate.cache + estimate.activations + kernels
        return self._memory[key]
