"""The nodes: VC-VAEs loaded, clips encoded, decoded and compared, and videos read and written."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management
from comfy.utils import ProgressBar

from vc_vae_diffusers.metrics.frame import SSIM_WINDOW, mean_over_frames, psnr, ssim
from vc_vae_diffusers.video import VIDEO_SUFFIXES, VideoReader, VideoWriter

from .model_folders import BUNDLED, model_folder, model_folders
from .video_vae import Parts, VideoVAE

# In a LATENT: what the encoded clip was, so that decoding gives its length and size. Stock nodes pass it on.
CLIP = "vcvae_clip"

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADING = {
    "dtype": (list(DTYPES), {"tooltip": "auto: what ComfyUI chooses for VAEs on its device."}),
    "frame_convention": (
        ["as saved", "4k", "4k+1"],
        {"tooltip": "4k+1: frame counts of pipelines for causal VAEs (Wan, HunyuanVideo). Both take clips of any length."},
    ),
}
PARTS = {
    "tile_size": (
        "INT",
        {"default": 0, "min": 0, "max": 8192, "step": 64, "tooltip": "Pixels; 0: whole frames, tiles if memory ends."},
    ),
    "overlap": ("INT", {"default": 64, "min": 0, "max": 4096, "step": 8, "tooltip": "Of neighbouring tiles, in pixels."}),
    "groups_per_chunk": (
        "INT",
        {"default": 1, "min": 1, "max": 64, "tooltip": "Groups of frames at once: results are equal, 1 takes least memory."},
    ),
}


def load(source: str | Path, dtype: str, frame_convention: str, **options: Any) -> VideoVAE:
    settings = {} if frame_convention == "as saved" else {"frame_convention": frame_convention}
    return VideoVAE.from_pretrained(source, DTYPES[dtype], **settings, **options)


def parts_of(tile_size: int, overlap: int, groups_per_chunk: int) -> Parts | None:
    """What the widgets say; None where everything is left to the VAE."""
    if tile_size == 0:
        return None if groups_per_chunk == 1 else Parts(groups=groups_per_chunk)
    return Parts((tile_size, tile_size), overlap, groups_per_chunk)


class VCVAELoader:
    """A VC-VAE of `models/vcvae`, `models/diffusers` or the package."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "VC-VAE"
    DESCRIPTION = "Loads a VC-VAE from a folder that save_pretrained wrote. The stock VAE nodes take it, too."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (list(model_folders()), {"default": BUNDLED}), **LOADING}}

    def load(self, model: str, dtype: str, frame_convention: str) -> tuple[VideoVAE]:
        return (load(model_folder(model), dtype, frame_convention),)


class VCVAEHubLoader:
    """A VC-VAE of the Hugging Face hub, downloaded into its cache the first time."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "VC-VAE"
    DESCRIPTION = "Loads a VC-VAE by its id on the Hugging Face hub (owner/name). Only safetensors are read."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"default": ""})
        return {"required": {"repo_id": text, **LOADING}, "optional": {"subfolder": text, "revision": text}}

    def load(
        self, repo_id: str, dtype: str, frame_convention: str, subfolder: str = "", revision: str = ""
    ) -> tuple[VideoVAE]:
        if repo_id.count("/") != 1 or Path(repo_id).exists():
            raise ValueError(
                f"repo_id is {repo_id!r}, a hub id is owner/name: folders go into models/vcvae, for the node Load VC-VAE"
            )
        return (load(repo_id, dtype, frame_convention, subfolder=subfolder or None, revision=revision or None),)


class VCVAEEncode:
    """Frames to latents: any number of them, of any size."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "VC-VAE"
    DESCRIPTION = "Encodes an image batch as one clip, streamed. Any length and size: what is repeated, decoding cuts off."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        posterior = (["mode", "sample"], {"tooltip": "sample: drawn from the posterior with the seed."})
        seed = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1})
        return {
            "required": {"pixels": ("IMAGE",), "vae": ("VAE",), **PARTS},
            "optional": {"posterior": posterior, "seed": seed},
        }

    def encode(
        self,
        pixels: torch.Tensor,
        vae: VideoVAE,
        tile_size: int,
        overlap: int,
        groups_per_chunk: int,
        posterior: str = "mode",
        seed: int = 0,
    ) -> tuple[dict[str, Any]]:
        check_vae(vae)
        generator = torch.Generator().manual_seed(seed) if posterior == "sample" else None
        latents = vae.encode_clip(pixels, parts_of(tile_size, overlap, groups_per_chunk), generator)
        frames, height, width = pixels.shape[-4:-1]
        clip = {"num_frames": frames, "height": height, "width": width, "latents": tuple(latents.shape[2:])}
        return ({"samples": latents, CLIP: clip},)


class VCVAEDecode:
    """Latents to frames, as many and as large as were encoded."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "VC-VAE"
    DESCRIPTION = "Decodes latents of video, streamed. Latents of Encode (VC-VAE) come back at their own length and size."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = {"default": 0, "min": 0, "max": 2**31 - 1, "tooltip": "0: as encoded, or all that the latents hold."}
        return {
            "required": {"samples": ("LATENT",), "vae": ("VAE",), **PARTS},
            "optional": {"num_frames": ("INT", count)},
        }

    def decode(
        self,
        samples: dict[str, Any],
        vae: VideoVAE,
        tile_size: int,
        overlap: int,
        groups_per_chunk: int,
        num_frames: int = 0,
    ) -> tuple[torch.Tensor]:
        check_vae(vae)
        latents, clip = samples["samples"], samples.get(CLIP)
        if clip is not None and tuple(clip["latents"]) != tuple(latents.shape[2:]):
            clip = None  # resized or cut since: it is another clip now
        count = num_frames or (clip["num_frames"] if clip else None)
        size = (clip["height"], clip["width"]) if clip else None
        images = vae.decode_clip(latents, count, size, parts_of(tile_size, overlap, groups_per_chunk))
        return (images.flatten(0, 1),)


class VCVAEReconstruct:
    """Frames through a VC-VAE and back, beside the originals, measured."""

    RETURN_TYPES = ("IMAGE", "IMAGE", "FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("reconstruction", "side_by_side", "psnr", "ssim", "report")
    FUNCTION = "reconstruct"
    CATEGORY = "VC-VAE"
    OUTPUT_NODE = True  # its report is shown without anything connected to it
    DESCRIPTION = "Encodes and decodes an image batch as one clip: original | reconstruction | difference, PSNR and SSIM."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        gain = {"default": 4.0, "min": 0.0, "max": 64.0, "step": 0.5, "tooltip": "Of the difference; 0 leaves it out."}
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",), **PARTS, "difference_gain": ("FLOAT", gain)}}

    def reconstruct(
        self,
        pixels: torch.Tensor,
        vae: VideoVAE,
        tile_size: int,
        overlap: int,
        groups_per_chunk: int,
        difference_gain: float,
    ) -> dict[str, Any]:
        check_vae(vae)
        parts, colours = parts_of(tile_size, overlap, groups_per_chunk), vae.output_channels
        latents = vae.encode_clip(pixels, parts)
        images = vae.decode_clip(latents, pixels.shape[0], pixels.shape[1:3], parts)[0]
        source = pixels[..., :colours].to(images)
        panels = [source, images]
        if difference_gain > 0:
            panels.append((0.5 + (images - source) * difference_gain).clamp(0, 1))
        decibels, similar = measured(images, source)
        text = (
            f"{pixels.shape[0]} frames of {pixels.shape[2]}x{pixels.shape[1]}, latents {tuple(latents.shape)}: "
            f"PSNR {decibels:.2f} dB, SSIM {similar:.4f}"
        )
        result = (images, torch.cat(panels, dim=2), decibels, similar, text)
        return {"ui": {"text": (text,)}, "result": result}


def measured(images: torch.Tensor, source: torch.Tensor) -> tuple[float, float]:
    """Mean PSNR in dB (infinite if all frames are equal) and SSIM over `(T, H, W, C)` in [0, 1].

    SSIM is NaN for frames smaller than its window.
    """
    decibels, similar = [], []
    for pair in zip(images.split(16), source.split(16), strict=True):
        frames, originals = (part.movedim(-1, 0)[None].clamp(0, 1) for part in pair)
        decibels += psnr(frames, originals, data_range=(0, 1))[0].tolist()
        if min(frames.shape[-2:]) >= SSIM_WINDOW:
            similar += ssim(frames, originals, data_range=(0, 1))[0].tolist()
    return mean_over_frames(decibels).mean, mean_over_frames(similar).mean if similar else math.nan


class VCVAEReadVideo:
    """A video of ComfyUI's input folder as an image batch."""

    RETURN_TYPES = ("IMAGE", "FLOAT", "INT")
    RETURN_NAMES = ("images", "fps", "frame_count")
    FUNCTION = "read"
    CATEGORY = "VC-VAE"
    DESCRIPTION = (
        "Reads frames of a video, colours and rotation as the file tags them. Damage is an error, not a short clip."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        folder = Path(folder_paths.get_input_directory())
        videos = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
        whole = {"default": 0, "min": 0, "max": 2**31 - 1}
        return {
            "required": {
                "video": (videos, {"video_upload": True}),
                "start_frame": ("INT", whole),
                "max_frames": ("INT", {**whole, "tooltip": "0: to the end."}),
                "short_side": ("INT", {**whole, "max": 8192, "tooltip": "Pixels to resize to; 0: as it is."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, video: str, **settings: Any) -> int:
        return os.stat(folder_paths.get_annotated_filepath(video)).st_mtime_ns

    @classmethod
    def VALIDATE_INPUTS(cls, video: str) -> bool | str:
        return folder_paths.exists_annotated_filepath(video) or f"there is no video {video!r} in the input folder"

    def read(self, video: str, start_frame: int, max_frames: int, short_side: int) -> tuple[torch.Tensor, float, int]:
        path, limits = folder_paths.get_annotated_filepath(video), {"num_frames": max_frames or None}
        frames = []
        with VideoReader(path, start=start_frame, resize=short_side or None, **limits) as reader:
            for chunk in reader:
                model_management.throw_exception_if_processing_interrupted()
                frames.append(((chunk + 1) / 2).movedim(0, -1).contiguous())
        if not frames:
            raise ValueError(f"start_frame is {start_frame}, {video!r} ends before: pass a smaller one")
        images = torch.cat(frames)
        return (images, float(reader.fps), images.shape[0])


class VCVAEWriteVideo:
    """An image batch as a video in ComfyUI's output folder."""

    RETURN_TYPES = ()
    FUNCTION = "write"
    CATEGORY = "VC-VAE"
    OUTPUT_NODE = True
    DESCRIPTION = "Writes an image batch as a video, tagged with its colours. lossless keeps every value."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE",),
                "fps": ("FLOAT", {"default": 24.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
                "filename_prefix": ("STRING", {"default": "vcvae"}),
                "format": (["mp4", "mkv", "webm", "gif"],),
                "codec": (["h264", "lossless"], {"tooltip": "h264 is VP9 in webm, and palettes in gif."}),
                "crf": ("INT", {"default": 16, "min": 0, "max": 51, "tooltip": "Lower is better; not for lossless, gif."}),
            }
        }

    def write(
        self, images: torch.Tensor, fps: float, filename_prefix: str, format: str, codec: str, crf: int
    ) -> dict[str, Any]:
        place = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        folder, name, counter, subfolder, _ = place
        file, rate = f"{name}_{counter:05}_.{format}", Fraction(fps).limit_denominator(1001)
        progress = ProgressBar(images.shape[0])
        with VideoWriter(Path(folder) / file, rate, codec=codec, crf=crf) as writer:
            for chunk in images[..., :3].split(16):
                model_management.throw_exception_if_processing_interrupted()
                writer.write(chunk.movedim(-1, 0).float() * 2 - 1)
                progress.update(chunk.shape[0])
        shown = {"filename": file, "subfolder": subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": (True,)}}


def check_vae(vae: Any) -> None:
    if not isinstance(vae, VideoVAE):
        raise ValueError(
            f"vae is a {type(vae).__name__}, this node streams VC-VAEs alone: connect Load VC-VAE, or use stock VAE nodes"
        )


NODES = {
    "Load VC-VAE": VCVAELoader,
    "Load VC-VAE (hub)": VCVAEHubLoader,
    "Encode (VC-VAE)": VCVAEEncode,
    "Decode (VC-VAE)": VCVAEDecode,
    "Reconstruct and compare (VC-VAE)": VCVAEReconstruct,
    "Read video (VC-VAE)": VCVAEReadVideo,
    "Write video (VC-VAE)": VCVAEWriteVideo,
}
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES.values()}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: title for title, node in NODES.items()}
