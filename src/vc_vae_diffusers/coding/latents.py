"""Video to a file of latents and back, piece by piece: neither is ever in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from vc_vae_diffusers import AutoencoderKLVCVAE, __version__

from ..frame_size import FrameSize
from ..video import VideoReader, VideoWriter, write_image
from .latent_file import FORMAT, LatentFile, LatentWriter, to_int8
from .progress import Progress, silent

# What latents may be stored as; integers are made of float32.
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


def encode_file(
    vae: AutoencoderKLVCVAE,
    reader: VideoReader,
    out: Path,
    origin: dict[str, str],
    generator: torch.Generator | None = None,
    seed: int = 0,
    progress: Progress = silent,
    storage: str | None = None,
) -> dict[str, Any]:
    """Encode all that a reader gives into `out`.

    Args:
        origin: model and subfolder, for the file's header.
        generator: draws a sample of the posterior; None takes its mode.
        seed: of the generator, for the header.
        progress: told how many frames are done.
        storage: a name of `STORAGE`; None stores what the model computes in.

    Returns:
        What was done, ready for JSON.
    """
    dtype = vae.dtype if storage is None else STORAGE[storage]
    progress(0, None)
    count = reader.count_frames()
    size = FrameSize.of(reader.height, reader.width, vae.spatial_compression_ratio)
    ratio, shape = vae.temporal_compression_ratio, _latent_shape(vae, count, size)
    metadata = _metadata(vae, reader, count, None if generator is None else seed) | origin
    with torch.no_grad(), LatentWriter(out, tuple(shape), dtype, count, metadata) as writer:

        def padded() -> Iterator[torch.Tensor]:
            for chunk, times in reader.timed_chunks():
                writer.write_times(times)
                for frames in chunk.split(ratio * vae.groups_per_chunk, dim=2):
                    yield size.pad(frames).to(vae.device, vae.dtype)

        done = 0
        for posterior in vae.encode_stream(padded(), num_frames=count):
            writer.write(posterior.mode() if generator is None else sample_frames(posterior, generator))
            done = min(done + posterior.mean.shape[2] * ratio, count)
            progress(done, count)
        progress(count, count)
    if storage == "int8":
        to_int8(out)
    return {
        "input": reader.info.path,
        "output": str(out),
        "frames": count,
        "fps": str(reader.fps),
        "width": reader.width,
        "height": reader.height,
        "shape": shape,
        "dtype": storage or str(dtype).removeprefix("torch."),
        "posterior": metadata["posterior"],
    }


def sample_frames(posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> torch.Tensor:
    """A sample that draws its noise latent frame by latent frame, so that it does not depend on how a stream is cut."""
    mean, std = posterior.mean, posterior.std
    noise = [
        torch.randn(mean[:, :, t].shape, generator=generator, device=mean.device, dtype=mean.dtype)
        for t in range(mean.shape[2])
    ]
    return mean + std * torch.stack(noise, dim=2)


def _metadata(vae: AutoencoderKLVCVAE, reader: VideoReader, count: int, seed: int | None) -> dict[str, str]:
    return {
        "format": FORMAT,
        "kind": reader.info.kind,
        "num_frames": str(count),
        "fps": str(reader.fps),
        "width": str(reader.width),
        "height": str(reader.height),
        "padding": "bottom and right, last row and column repeated",
        "sample_aspect_ratio": str(reader.info.sample_aspect_ratio),
        "end_time": str(reader.end_time),
        "posterior": "mode" if seed is None else f"sample, seed {seed}",
        "scaling": "none: the encoder's latents, without scaling_factor and shift_factor",
        "scaling_factor": str(vae.config.scaling_factor),
        "shift_factor": str(vae.config.shift_factor),
        "temporal_compression_ratio": str(vae.temporal_compression_ratio),
        "spatial_compression_ratio": str(vae.spatial_compression_ratio),
        "first_frame": vae.config.first_frame,
        "frame_convention": vae.config.frame_convention,
        "vc_vae_diffusers": __version__,
    }


def check_fit(vae: AutoencoderKLVCVAE, latents: LatentFile) -> None:
    """Raises ValueError if the model cannot have made these latents."""
    names = ("temporal_compression_ratio", "spatial_compression_ratio", "first_frame", "frame_convention")
    pairs = {name: (str(vae.config[name]), latents.metadata.get(name, "not stated")) for name in names}
    pairs["latent channels"] = (str(vae.config.latent_channels), str(latents.shape[1]))
    for what, (model, file) in pairs.items():
        if model != file:
            raise ValueError(
                f"--model: its {what} is {model}, that of {latents.path} is {file}; pass the model that encoded it, "
                f"{latents.metadata.get('model', 'which it does not name')}."
            )
    size = FrameSize.of(latents.height, latents.width, vae.spatial_compression_ratio)
    if latents.shape != _latent_shape(vae, latents.num_frames, size):
        raise ValueError(f"IN: the latents of {latents.path} do not fit its header's frames and size; encode it again.")


def _latent_shape(vae: AutoencoderKLVCVAE, num_frames: int, size: FrameSize) -> list[int]:
    """Of a whole clip, (1, C, T', h, w)."""
    ratio = vae.spatial_compression_ratio
    length = vae.groups.latent_frames(num_frames)
    return [1, vae.config.latent_channels, length, size.padded_height // ratio, size.padded_width // ratio]


def decoded(vae: AutoencoderKLVCVAE, latents: LatentFile) -> Iterator[torch.Tensor]:
    """The frames of a file of latents, `(1, 3, t, H, W)` float32 on the CPU. To be consumed under `torch.no_grad()`."""
    size = FrameSize.of(latents.height, latents.width, vae.spatial_compression_ratio)
    pieces = latents.pieces(vae.groups_per_chunk, vae.device, vae.dtype)
    for frames in vae.decode_stream(pieces, num_frames=latents.num_frames):
        yield size.crop(frames).float().cpu()


def decode_file(
    vae: AutoencoderKLVCVAE,
    latents: LatentFile,
    out: Path,
    image: bool = False,
    settings: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> int:
    """Decode a file of latents to a video, or its only frame to an image; returns how many frames were written.

    Args:
        settings: of the `VideoWriter`.
        progress: told how many frames are done.
    """
    with torch.no_grad():
        progress(0, latents.num_frames)
        stream = decoded(vae, latents)
        if image:
            write_image(out, next(stream)[0])
            return 1
        settings = (settings or {}) | {"sample_aspect_ratio": latents.sample_aspect_ratio, "end_time": latents.end_time}
        with VideoWriter(out, latents.fps, **settings) as writer:
            for frames in stream:
                writer.write(frames, latents.frame_times(writer.num_frames, frames.shape[2]))
                progress(writer.num_frames, latents.num_frames)
        return writer.num_frames
