"""Videos as people have them to what the VAE takes, and back, with the contract of diffusers' `VideoProcessor`.

Not in the paper.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.video_processor import VideoProcessor

from .frame_size import FrameSize

_WHAT = (
    "a path, PIL images, numpy (T, H, W, C) or torch (T, C, H, W), a list of such videos, or arrays and tensors with the "
    "batch in front"
)
_RANGES = ((0, 1), (-1, 1), (0, 255))
# Beyond what a decoder overshoots, and below what 8 bits in floating point reach in any but a black picture.
_FARTHEST = 2.0
_CHANNELS = (1, 3, 4)
_Array = (np.ndarray, torch.Tensor)


class VCVAEVideoProcessor(VideoProcessor):
    """diffusers' `VideoProcessor` for this VAE: equal tensors where both take an input, and more inputs.

    ```python
    processor = VCVAEVideoProcessor.for_vae(vae)
    video = processor.preprocess_video("in.mp4", num_frames=17)  # (1, 3, 17, H, W) in [-1, 1]
    pictures = processor.postprocess_video(video, "pil")[0]
    ```

    Where it differs from diffusers: uint8 is [0, 255] and not wrapped around; alpha is composited on black and grey made
    RGB; frames whose size is no multiple of `vae_scale_factor` are padded by repeating the last row and column
    and not scaled down; what cannot be read is refused with its remedy.

    Args:
        vae_scale_factor: what height and width become multiples of.
        vae_latent_channels: float tensors with so many channels are latents and come back as they are.
        resample, reducing_gap: how PIL images are resized.
        do_resize, do_normalize: False leaves the size, or leaves values in [0, 1].
    """

    @classmethod
    def for_vae(cls, vae: Any) -> VCVAEVideoProcessor:
        """The processor of an `AutoencoderKLVCVAE`; of None, as pipelines may be built without one, the default."""
        if vae is None:
            return cls()
        return cls(vae_scale_factor=vae.spatial_compression_ratio, vae_latent_channels=vae.config.latent_channels)

    def preprocess_video(
        self,
        video: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        value_range: tuple[int, int] | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
        **reading: Any,
    ) -> torch.Tensor:
        """Make a tensor of one video or of several.

        Args:
            video: a path (a video, an image, a folder of images, a pattern); a PIL image or a list of them; numpy
                (T, H, W, C), or (B, T, H, W, C); torch (T, C, H, W), or (B, T, C, H, W); one image of three dimensions;
                or a list of such videos, which is a batch. C is 1, 3 or 4.
            height, width: what frames are resized to, multiples of `vae_scale_factor`; None leaves the side as it is.
            value_range: of float values: (0, 1), (-1, 1) or (0, 255). None, as in diffusers: (-1, 1) for a video
                with a negative value, and otherwise (0, 1).
            resize_mode, crops_coords: of PIL images, as in diffusers: "default", "fill" or "crop", and a box.
            reading: options of `video.VideoReader` for paths, such as `num_frames`, `start_time` or `fps`.

        Returns:
            (B, C, T, H, W) in [-1, 1], float (float32 unless a tensor was of another type), H and W padded.

        Raises:
            ValueError: for what is no video, values outside the range, sizes that do not fit, and a batch of several sizes.
            VideoReadError: for files that cannot be read.
        """
        self._check_options(height, width, value_range)
        videos = _as_list(video)
        if reading and not all(map(_is_path, videos)):
            raise ValueError(
                f"{sorted(reading)}: options of reading, which only paths take; video has others: cut those first"
            )
        clips = []
        for number, one in enumerate(videos):
            name = "video" if len(videos) == 1 else f"video[{number}]"
            if _is_path(one):
                frames = _read(one, height, width, self.config.do_resize, reading)
                clips.append(frames if self.config.do_normalize else self.denormalize(frames))
            elif isinstance(one, _Array):
                clips.append(self._from_array(one, name, height, width, value_range))
            else:
                clips.append(self._from_pil(one, name, height, width, resize_mode, crops_coords))
        if len(shapes := {tuple(clip.shape) for clip in clips}) > 1:
            raise ValueError(
                f"video has clips of several shapes {sorted(shapes)} (frames, channels, height, width): pass height and "
                "width, clips of equal length, or one clip at a time"
            )
        batch = torch.stack(clips).permute(0, 2, 1, 3, 4)
        if self._are_latents(clips[0]):
            return batch
        return FrameSize.of(batch.shape[3], batch.shape[4], self.config.vae_scale_factor).pad(batch)

    def postprocess_video(
        self, video: torch.Tensor, output_type: str = "np", *, size: tuple[int, int] | None = None, **kwargs: Any
    ) -> Any:
        """Make of a tensor what people use.

        Args:
            video: (B, C, T, H, W) in [-1, 1].
            output_type: "pil": a list of images for each video; "np": (B, T, H, W, C) float in [0, 1]; "pt": the same as
                (B, T, C, H, W); "uint8": numpy (B, T, H, W, C), the values of "pil".
            size: (height, width) before padding, to which frames are cropped.
            kwargs: of diffusers' `VaeImageProcessor.postprocess`.

        Raises:
            ValueError: for another shape or type of output, NaN and infinite values, and a size beyond the frame.
        """
        if output_type not in ("pil", "np", "pt", "uint8"):
            raise ValueError(f"output_type is {output_type!r}, it must be 'pil', 'np', 'pt' or 'uint8': choose one")
        video = self._cropped(video, size)
        if output_type == "uint8":
            values = super().postprocess_video(video, "np", **kwargs)
            return (values * 255).round().astype(np.uint8)
        return super().postprocess_video(video, output_type, **kwargs)

    def save_video(
        self,
        video: torch.Tensor,
        path: str | os.PathLike[str],
        fps: Fraction | float = 24,
        *,
        size: tuple[int, int] | None = None,
        **writing: Any,
    ) -> None:
        """Write one video to a file; a single frame to an image, where the suffix is one's.

        Args:
            video: (1, 3, T, H, W) in [-1, 1].
            path: of a kind that `video.VideoWriter` writes, or of an image.
            fps: frames per second.
            size: (height, width) before padding, to which frames are cropped.
            writing: options of `VideoWriter`, or of `write_image`.

        Raises:
            ValueError: for several videos, other shapes or values, and suffixes that nothing is written to.
            VideoWriteError: if the encoder or the disk fails.
        """
        from vc_vae_diffusers.video import VideoWriter, is_media_name, write_image
        from vc_vae_diffusers.video.suffixes import IMAGE_SUFFIXES

        video = self._cropped(video, size)
        if len(video) != 1:
            raise ValueError(f"video has {len(video)} clips, a file holds one: pass video[i : i + 1] for each")
        if not self.config.do_normalize:
            video = self.normalize(video)
        if is_media_name(os.path.basename(path), IMAGE_SUFFIXES):
            write_image(path, video[0], **writing)
            return
        with VideoWriter(path, fps, **writing) as writer:
            writer.write(video)

    def _check_options(self, height: int | None, width: int | None, value_range: tuple[int, int] | None) -> None:
        if self.config.do_binarize or self.config.do_convert_grayscale:
            raise ValueError("do_binarize and do_convert_grayscale make masks, and this processor RGB: leave them False")
        if value_range is not None and tuple(value_range) not in _RANGES:
            raise ValueError(f"value_range is {value_range!r}, it must be one of {_RANGES}, or None: scale the values first")
        factor = self.config.vae_scale_factor
        for name, side in (("height", height), ("width", width)):
            if side is not None and not self.config.do_resize:
                raise ValueError(f"{name} is {side}, but do_resize is False: leave it out, or set do_resize")
            if side is not None and (side <= 0 or side % factor):
                near = max(1, round(side / factor)) * factor
                raise ValueError(f"{name} is {side}, not a positive multiple of vae_scale_factor {factor}: pass {near}")

    def _are_latents(self, frames: torch.Tensor) -> bool:
        return frames.shape[1] == self.config.vae_latent_channels and frames.shape[1] != 3

    def _from_array(
        self,
        video: np.ndarray | torch.Tensor,
        name: str,
        height: int | None,
        width: int | None,
        value_range: tuple[int, int] | None,
    ) -> torch.Tensor:
        """(T, C, H, W) of one video."""
        is_numpy = isinstance(video, np.ndarray)
        frames = torch.from_numpy(np.ascontiguousarray(video)) if isinstance(video, np.ndarray) else video
        if frames.ndim == 3:
            frames = frames[None]
        if frames.ndim != 4 or frames.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(video.shape)}, it must be {_WHAT}, not empty")
        frames = frames.movedim(-1, 1) if is_numpy else frames
        if not is_numpy and frames.is_floating_point() and self._are_latents(frames):
            return frames
        if frames.shape[1] not in _CHANNELS:
            order = "(frames, height, width, channels)" if is_numpy else "(frames, channels, height, width)"
            remedy = "pass .transpose(0, 1) of it" if not is_numpy and frames.shape[0] in _CHANNELS else "reorder it"
            raise ValueError(
                f"{name} has shape {tuple(video.shape)}, the order is {order} with 1, 3 or 4 channels: {remedy}"
            )
        frames, signed = _checked(frames, name, value_range)
        if signed and (frames.shape[1] == 4 or not self.config.do_normalize):
            frames, signed = self.denormalize(frames), False
        frames = _rgb(frames)
        if height is not None or width is not None:
            frames = self.resize(frames, height or frames.shape[2], width or frames.shape[3])
        return self.normalize(frames) if self.config.do_normalize and not signed else frames

    def _from_pil(
        self,
        images: Sequence[PIL.Image.Image],
        name: str,
        height: int | None,
        width: int | None,
        resize_mode: str,
        crops_coords: tuple[int, int, int, int] | None,
    ) -> torch.Tensor:
        """(T, C, H, W) of one video."""
        pictures = [_opaque(image, f"{name}[{number}]") for number, image in enumerate(images)]
        if crops_coords is not None:
            pictures = [picture.crop(crops_coords) for picture in pictures]
        if height is not None or width is not None:
            pictures = [self.resize(p, height or p.height, width or p.width, resize_mode=resize_mode) for p in pictures]
        if len(sizes := {picture.size for picture in pictures}) > 1:
            raise ValueError(f"{name} has images of several sizes {sorted(sizes)} (width, height): pass height and width")
        frames = self.numpy_to_pt(self.pil_to_numpy(pictures))
        return self.normalize(frames) if self.config.do_normalize else frames

    def _cropped(self, video: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
        if not isinstance(video, torch.Tensor) or video.ndim != 5:
            what = tuple(video.shape) if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(
                f"video is {what}, it must be a tensor (batch, channels, frames, height, width): add what lacks"
            )
        if not torch.isfinite(video).all():
            raise ValueError("video holds NaN or infinite values: the model overflowed, run it in float32 or bfloat16")
        if size is None:
            return video
        height, width = size
        if not (0 < height <= video.shape[3] and 0 < width <= video.shape[4]):
            raise ValueError(f"size is {size}, it must lie within the frame {tuple(video.shape[3:])}: pass (height, width)")
        return video[..., :height, :width]


def _is_path(video: Any) -> bool:
    return isinstance(video, (str, os.PathLike))


def _as_list(video: Any) -> list[Any]:
    """Videos one by one: each a path, an array of 3 or 4 dimensions, or a list of PIL images.

    Raises:
        ValueError: for what is none of them.
    """
    if isinstance(video, PIL.Image.Image):
        return [[video]]
    if isinstance(video, _Array):
        return list(video) if video.ndim == 5 else [video]
    if _is_path(video):
        return [video]
    if not isinstance(video, (list, tuple)) or not video:
        raise ValueError(f"video is {type(video).__name__ if video else repr(video)}, it must be {_WHAT}")
    kinds = {_kind(one) for one in video}
    if len(kinds) > 1:
        raise ValueError(f"video is a list of {sorted(kinds)}, its items must be alike: pass {_WHAT}")
    kind = kinds.pop()
    if kind == "PIL images":
        return [list(video)]
    if kind == "images":  # one video, frame by frame
        if len(shapes := {tuple(frame.shape) for frame in video}) > 1:
            raise ValueError(f"video has frames of several shapes {sorted(shapes)}: resize them to one")
        return [np.stack(video) if isinstance(video[0], np.ndarray) else torch.stack(tuple(video))]
    if kind == "batches":
        return [clip for batch in video for clip in batch]
    return list(video)


def _kind(item: Any) -> str:
    if isinstance(item, PIL.Image.Image):
        return "PIL images"
    if _is_path(item):
        return "paths"
    if isinstance(item, (list, tuple)) and item and all(isinstance(image, PIL.Image.Image) for image in item):
        return "videos of PIL images"
    if isinstance(item, _Array) and item.ndim in (3, 4, 5):
        return {3: "images", 4: "videos", 5: "batches"}[item.ndim]
    if isinstance(item, (list, tuple)):
        raise ValueError(
            f"video has a list of {[type(one).__name__ for one in item[:3]]}, it must be of PIL images, not empty"
        )
    shape = f" of shape {tuple(item.shape)}" if isinstance(item, _Array) else ""
    raise ValueError(f"video has a {type(item).__name__}{shape}, it must be {_WHAT}")


def _read(path: Any, height: int | None, width: int | None, do_resize: bool, reading: dict[str, Any]) -> torch.Tensor:
    """(T, C, H, W) in [-1, 1] of a file."""
    # By its full name: published folders carry the modules that pipelines take, and reading files is none of their work.
    from vc_vae_diffusers.video import VideoReader

    if do_resize and (height is not None or width is not None):
        if "resize" in reading:
            raise ValueError("resize and height or width exclude each other: pass one of them")
        if height is None or width is None:
            with VideoReader(path, **reading) as source:
                height, width = height or source.height, width or source.width
        reading = {**reading, "resize": (height, width)}
    with VideoReader(path, **reading) as reader:
        return torch.cat(list(reader), dim=1).movedim(0, 1)


def _checked(frames: torch.Tensor, name: str, value_range: tuple[int, int] | None) -> tuple[torch.Tensor, bool]:
    """Values of any type to floats, and whether they are in [-1, 1], which keeps them as they are, or in [0, 1]."""
    if frames.dtype == torch.uint8:
        if value_range not in (None, (0, 255)):
            raise ValueError(f"{name} is uint8, whose range is (0, 255), not value_range {value_range}: leave it out")
        return frames.to(torch.float32) / 255, False
    if not frames.is_floating_point():
        raise ValueError(f"{name} is {frames.dtype}, it must be uint8 or floating point: convert it, white being 255 or 1")
    if frames.dtype == torch.float64:
        frames = frames.to(torch.float32)
    low, high = frames.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite values, which no picture has: correct what made them")
    if value_range is not None and tuple(value_range) == (0, 255):
        return frames / 255, False
    if max(-low, high) > _FARTHEST:
        raise ValueError(
            f"{name} has values in [{low:g}, {high:g}], neither [0, 1] nor [-1, 1]: pass value_range=(0, 255), or uint8"
        )
    return frames, bool(low < 0) if value_range is None else tuple(value_range) == (-1, 1)


def _rgb(frames: torch.Tensor) -> torch.Tensor:
    """(T, C, H, W) in [0, 1] with 1, 3 or 4 channels to 3: grey repeated, alpha on black."""
    if frames.shape[1] == 4:
        return frames[:, :3] * frames[:, 3:]
    return frames.expand(-1, 3, -1, -1) if frames.shape[1] == 1 else frames


def _opaque(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """RGB, alpha composited on black.

    Raises:
        ValueError: for an image of more than 8 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{name} is a PIL image of mode {image.mode}, more than 8 bits: pass its path, or floats in [0, 1]")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")
