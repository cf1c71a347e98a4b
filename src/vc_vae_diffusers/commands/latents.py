"""`vcvae encode` and `vcvae decode`: video to latents in a safetensors file, and back.

The file holds `latents`, `(1, C, T', h, w)`, as the encoder gives them (not scaled, not shifted: multiply by the model's
`scaling_factor` yourself where a diffusion model wants it), `times`, `(T,)` float64 seconds of the frames, and in its header
what decoding needs. Both directions work piece by piece: neither the video nor its latents are ever in memory as a whole.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from vc_vae_diffusers import AutoencoderKLVCVAE, __version__

from ..video import IMAGE_SUFFIXES, VideoReader, VideoWriter, write_image
from .shared import (
    CrfOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    FrameSize,
    FramesOption,
    GroupsOption,
    JsonOption,
    LosslessOption,
    ModelOption,
    ResizeOption,
    StartOption,
    StopOption,
    SubfolderOption,
    TileOption,
    check_distinct,
    check_folder,
    check_output,
    counted,
    emit,
    files_table,
    frame_progress,
    load_model,
    model_name,
)

FORMAT = "vcvae-latents-1"
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


# ---------------------------------------------------------------------------------------------------- the file


class LatentWriter:
    """Writes latents to a safetensors file as they come; a context manager that leaves a whole file or none.

    safetensors wants the sizes first and channels before time, so the number of latent frames must be known; each piece is
    then written to its places in the file.

    Args:
        path: of the file.
        shape: (1, C, T', h, w) of all latents.
        dtype: of the latents.
        num_frames: length of `times`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, num_frames: int, metadata: dict[str, str]):
        self.path, self.shape, self.dtype = path, shape, dtype
        self._times: list[Fraction] = []
        self._num_frames, self._filled = num_frames, 0
        size = torch.Size(shape).numel() * dtype.itemsize
        header = {
            "__metadata__": metadata,
            "latents": {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]},
            "times": {"dtype": "F64", "shape": [num_frames], "data_offsets": [size, size + 8 * num_frames]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin, self._size = 8 + len(text), size
        self._partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
        self._file: BinaryIO = open(self._partial, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._begin + size + 8 * num_frames)

    def __enter__(self) -> LatentWriter:
        return self

    def write(self, latents: torch.Tensor) -> None:
        """The next latent frames, (1, C, n, h, w)."""
        latents = latents.to("cpu", self.dtype)
        plane = latents.shape[3] * latents.shape[4] * self.dtype.itemsize
        for channel, values in enumerate(latents[0]):
            self._file.seek(self._begin + (channel * self.shape[2] + self._filled) * plane)
            self._file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
        self._filled += latents.shape[2]

    def write_times(self, times: list[Fraction]) -> None:
        """Seconds of the next frames."""
        self._times.extend(times)

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if exc_type is None:
                if (self._filled, len(self._times)) != (self.shape[2], self._num_frames):
                    raise ValueError(
                        f"IN: gave {len(self._times)} frames where counting gave {self._num_frames}; it changed meanwhile."
                    )
                self._file.seek(self._begin + self._size)
                self._file.write(struct.pack(f"<{self._num_frames}d", *map(float, self._times)))
                self._file.close()
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class LatentFile:
    """Latents and metadata of a file that `vcvae encode` wrote, read piece by piece.

    Raises:
        ValueError: if the file is missing, damaged or of another kind.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"IN: {path} does not exist; make it with `vcvae encode`.")
        try:
            self._file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"IN: {path} is no readable safetensors file ({error}); encode it again.") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        if self.metadata.get("format") != FORMAT:
            found = self.metadata.get("format", "nothing")
            raise ValueError(f"IN: {path} says {found} where {FORMAT} is due; make the file with `vcvae encode`.")
        self.path = path
        self.latents = self._file.get_slice("latents")
        self.shape: list[int] = self.latents.get_shape()
        self.num_frames = int(self.metadata["num_frames"])
        self.fps = Fraction(self.metadata["fps"])
        self.times: list[float] = self._file.get_tensor("times").tolist()

    def pieces(self, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Latent frames, (1, C, <=size, h, w), in order."""
        for start in range(0, self.shape[2], size):
            yield self.latents[:, :, start : start + size].to(device, dtype)


# ---------------------------------------------------------------------------------------------------- encode


def encode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Video, image, folder of images or pattern.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The latents, a .safetensors file.")],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample the posterior instead of taking its mode.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of --sample.")] = 0,
    tile: TileOption = None,
    groups_per_chunk: GroupsOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    start: StartOption = 0.0,
    stop: StopOption = None,
    num_frames: FramesOption = None,
    fps: FpsOption = None,
    resize: ResizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode IN to latents in a safetensors file, with what `vcvae decode` needs in its header.

    The frames are counted first, by decoding once, since the file states its size at the beginning.
    """
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"OUT: {out} must end in .safetensors.")
    check_folder(out)
    check_distinct(IN=source, OUT=out)
    with VideoReader(
        source,
        start_time=start or None,
        stop_time=stop,
        num_frames=num_frames,
        fps=fps,
        resize=resize,
        batch_dim=True,
        chunk_frames=max(16, 8 * groups_per_chunk),
    ) as reader:
        vae = load_model(model, subfolder, device, dtype, tile, groups_per_chunk)
        generator = torch.Generator(vae.device).manual_seed(seed) if sample else None
        # A file that moves to another folder still names its model.
        place = str(Path(model).resolve()) if model is not None and Path(model).exists() else model
        origin = {"model": place or "bundled", "subfolder": subfolder or ""}
        result = _encode_file(vae, reader, out, origin, generator, seed)
    table = Table(show_header=False)
    for key in ("frames", "shape", "dtype", "posterior", "model"):
        table.add_row(key, str(result[key]))
    emit({"command": "encode", **result}, as_json, table, files_table({"latents": out}))


def _encode_file(
    vae: AutoencoderKLVCVAE,
    reader: VideoReader,
    out: Path,
    origin: dict[str, str],
    generator: torch.Generator | None,
    seed: int,
) -> dict[str, Any]:
    with Console(stderr=True).status("counting frames"):
        count = reader.count_frames()
    size = FrameSize.of(reader.height, reader.width, vae.spatial_compression_ratio)
    ratio, alone = vae.temporal_compression_ratio, vae.config.first_frame == "separate"
    length = 1 + -(-(count - 1) // ratio) if alone else -(-count // ratio)
    cells = (size.padded_height // vae.spatial_compression_ratio, size.padded_width // vae.spatial_compression_ratio)
    shape = (1, vae.config.latent_channels, length, *cells)
    metadata = _metadata(vae, reader, count, None if generator is None else seed) | origin
    with torch.no_grad(), frame_progress() as progress, LatentWriter(out, shape, vae.dtype, count, metadata) as writer:
        task = progress.add_task("encode", total=count)

        def padded() -> Iterator[torch.Tensor]:
            for chunk, times in reader.timed_chunks():
                writer.write_times(times)
                for frames in chunk.split(ratio * vae.groups_per_chunk, dim=2):
                    yield size.pad(frames).to(vae.device, vae.dtype)

        posteriors = vae.encode_stream(padded(), num_frames=count)
        for posterior in counted(posteriors, progress, task, lambda p: p.mean.shape[2] * ratio):
            writer.write(posterior.mode() if generator is None else sample_frames(posterior, generator))
        progress.update(task, completed=count)
    return {
        "input": reader.info.path,
        "output": str(out),
        "frames": count,
        "fps": str(reader.fps),
        "width": reader.width,
        "height": reader.height,
        "shape": list(shape),
        "dtype": str(vae.dtype).removeprefix("torch."),
        "posterior": metadata["posterior"],
        "model": model_name(None if origin["model"] == "bundled" else origin["model"], origin["subfolder"] or None),
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


# ---------------------------------------------------------------------------------------------------- decode


def decode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Latents that `vcvae encode` wrote, .safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Video, or an image for one frame.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id of the VC-VAE; by default the one that IN names.")
    ] = None,
    subfolder: SubfolderOption = None,
    tile: TileOption = None,
    groups_per_chunk: GroupsOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    crf: CrfOption = 16,
    lossless: LosslessOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decode latents to a video or an image, with the frame count, size, rate and timing of what was encoded."""
    latents = LatentFile(source)
    image = out.suffix.lower() in IMAGE_SUFFIXES
    if image and latents.num_frames > 1:
        raise ValueError(f"OUT: {out} is an image, but {source} holds {latents.num_frames} frames; write a video.")
    check_output(out, image=image)
    check_distinct(IN=source, OUT=out)
    if model is None and latents.metadata["model"] != "bundled":
        model, subfolder = latents.metadata["model"], latents.metadata["subfolder"] or None
    vae = load_model(model, subfolder, device, dtype, tile, groups_per_chunk)
    _check_fit(vae, latents)
    frames = _decode_file(vae, latents, out, image, {"crf": crf, "codec": "lossless" if lossless else "h264"})
    result = {
        "command": "decode",
        "input": str(source),
        "output": str(out),
        "frames": frames,
        "fps": str(latents.fps),
        "width": int(latents.metadata["width"]),
        "height": int(latents.metadata["height"]),
        "model": model_name(model, subfolder),
    }
    emit(result, as_json, files_table({"decoded": out}))


def _check_fit(vae: AutoencoderKLVCVAE, latents: LatentFile) -> None:
    """Raises ValueError if the model cannot have made these latents."""
    ours = {
        "latent channels": (str(vae.config.latent_channels), str(latents.shape[1])),
        **{
            key: (str(value), latents.metadata[key])
            for key, value in {
                "temporal_compression_ratio": vae.temporal_compression_ratio,
                "spatial_compression_ratio": vae.spatial_compression_ratio,
                "first_frame": vae.config.first_frame,
                "frame_convention": vae.config.frame_convention,
            }.items()
        },
    }
    for what, (model, file) in ours.items():
        if model != file:
            raise ValueError(
                f"--model: its {what} is {model}, that of {latents.path} is {file}; pass the model that encoded it, "
                f"{latents.metadata['model']}."
            )


def _decode_file(vae: AutoencoderKLVCVAE, latents: LatentFile, out: Path, image: bool, settings: dict[str, Any]) -> int:
    height, width = int(latents.metadata["height"]), int(latents.metadata["width"])
    size = FrameSize.of(height, width, vae.spatial_compression_ratio)
    pieces = latents.pieces(vae.groups_per_chunk, vae.device, vae.dtype)
    with torch.no_grad(), frame_progress() as progress:
        task = progress.add_task("decode", total=latents.num_frames)
        stream = vae.decode_stream(pieces, num_frames=latents.num_frames)
        stream = (size.crop(frames).float().cpu() for frames in counted(stream, progress, task, lambda f: f.shape[2]))
        if image:
            write_image(out, next(stream)[0])
            return 1
        aspect = Fraction(latents.metadata["sample_aspect_ratio"])
        with VideoWriter(out, latents.fps, sample_aspect_ratio=aspect, **settings) as writer:
            for frames in stream:
                times = latents.times[writer.num_frames : writer.num_frames + frames.shape[2]]
                writer.write(frames, [Fraction(seconds).limit_denominator(10**7) for seconds in times])
        return writer.num_frames
