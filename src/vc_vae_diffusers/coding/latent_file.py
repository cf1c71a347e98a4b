"""Latents in a safetensors file, written and read piece by piece.

The file holds `latents`, `(1, C, T', h, w)`, as the encoder gives them (not scaled, not shifted: multiply by the model's
`scaling_factor` yourself where a diffusion model wants it; integers of eight bits mean `latents * scale + shift`, with
`scale` and `shift`, `(C,)`, beside them), `times`, `(T,)` float64 seconds of the frames, and in its header
what decoding needs.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import whole_file

FORMAT = "vcvae-latents-1"
_LARGEST = 2**31 - 1  # what FFmpeg's rates and ratios hold above and below the line, and far more seconds than a video has
_FRACTION = re.compile(r"-?\d{1,30}(/\d{1,30}|\.\d{1,30})?")
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


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
        with contextlib.ExitStack() as stack:
            self._file: BinaryIO = stack.enter_context(open(stack.enter_context(whole_file(path)), "wb"))
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._file.truncate(self._begin + size + 8 * num_frames)
            self._whole = stack.pop_all()

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

    def __exit__(self, *exc_info: Any) -> None:
        if exc_info[0] is not None:
            self._whole.__exit__(*exc_info)
            return
        with self._whole:
            if (self._filled, len(self._times)) != (self.shape[2], self._num_frames):
                raise ValueError(
                    f"IN: gave {len(self._times)} frames where counting gave {self._num_frames}; it changed meanwhile."
                )
            self._file.seek(self._begin + self._size)
            self._file.write(struct.pack(f"<{self._num_frames}d", *map(float, self._times)))


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
        try:
            self._read_header()
        except (SafetensorError, KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"IN: the header of {path} is damaged ({error!r}); encode it again.") from error
        if not self._is_sound():
            raise ValueError(f"IN: {path} contradicts its own header; encode it again.")

    def _read_header(self) -> None:
        self.latents = self._file.get_slice("latents")
        names = set(self._file.keys())
        self._scale, self._shift = (
            self._file.get_tensor(name)[:, None, None, None] if name in names else None for name in ("scale", "shift")
        )
        self.shape: list[int] = self.latents.get_shape()
        times = self._file.get_tensor("times")
        if not bool((times.isfinite() & (times.abs() <= _LARGEST)).all()):
            raise ValueError("times are no seconds of a video")
        self.times: list[float] = times.tolist()
        self.num_frames, self.width, self.height = (self._count(name) for name in ("num_frames", "width", "height"))
        self.fps, self.sample_aspect_ratio = (self._fraction(name) for name in ("fps", "sample_aspect_ratio"))
        self.end_time = self._fraction("end_time") if "end_time" in self.metadata else None  # version 0.1 wrote none

    def _is_sound(self) -> bool:
        stored = self.latents.get_dtype()
        integers = stored == "I8" and self._scale is not None and self._shift is not None
        return (
            len(self.shape) == 5
            and (integers or stored in _SAFETENSORS_DTYPES.values())
            and self.num_frames == len(self.times)
            and min(self.fps, self.sample_aspect_ratio) > 0
        )

    @property
    def origin(self) -> tuple[str | None, str | None]:
        """Model and subfolder that it was encoded with; None for the bundled model."""
        model = self.metadata.get("model", "bundled")
        return (None, None) if model == "bundled" else (model, self.metadata.get("subfolder") or None)

    def _count(self, name: str) -> int:
        value = int(self.metadata[name])
        if value < 1:
            raise ValueError(f"{name} is {value}")
        return value

    def _fraction(self, name: str) -> Fraction:
        """A fraction as `str` writes it. Its text is looked at first: "1e999999999" takes all memory to compute."""
        text = self.metadata[name]
        value = Fraction(text) if _FRACTION.fullmatch(text) else None
        if value is None or max(abs(value.numerator), value.denominator) > _LARGEST:
            raise ValueError(f"{name} is {text[:40]!r}")
        return value

    def frame_times(self, start: int, count: int) -> list[Fraction]:
        """Seconds at which frames are shown."""
        return [Fraction(seconds).limit_denominator(10**7) for seconds in self.times[start : start + count]]

    def pieces(self, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Latent frames, (1, C, <=size, h, w), in order."""
        for start in range(0, self.shape[2], size):
            yield self.read(start, start + size).to(device, dtype)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Some latent frames, (1, C, n, h, w), in the dtype of the file; float32 where it holds integers.

        Raises:
            ValueError: for latents that are not finite, which decode to no picture.
        """
        latents = self.latents[:, :, start:stop]
        if self._scale is not None:
            latents = latents.float() * self._scale + self._shift
        if not bool(latents.isfinite().all()):
            raise ValueError(
                f"IN: {self.path} has NaN or infinite latents in [{start}, {stop}): it is damaged, or was encoded in a "
                "dtype that is too small for the model; encode it again, with --dtype float32."
            )
        return latents


def to_int8(path: Path) -> None:
    """Replace a file's latents by integers of eight bits, each channel over its own range: a quarter of float32's bytes."""
    file = LatentFile(path)
    latents = file.read(0, file.shape[2]).float()
    low, high = latents.amin((0, 2, 3, 4)), latents.amax((0, 2, 3, 4))
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    shift = low + 128 * scale
    column = (None, slice(None), None, None, None)
    integers = ((latents - shift[column]) / scale[column]).round().clamp(-128, 127).to(torch.int8)
    times = torch.tensor(file.times, dtype=torch.float64)
    tensors = {"latents": integers, "times": times, "scale": scale, "shift": shift}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=dict(sorted(file.metadata.items())))
