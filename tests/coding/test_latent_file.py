"""Latents files from strangers: each damage is one clear error, before anything is computed or written."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vc_vae_diffusers.coding.latent_file import FORMAT, LatentFile
from vc_vae_diffusers.video import VideoWriter

METADATA = {
    **{"format": FORMAT, "num_frames": "8", "width": "16", "height": "16", "fps": "25", "sample_aspect_ratio": "1"},
    **{"end_time": "8/25"},
}
LATENTS = torch.linspace(-1, 1, 32).view(1, 4, 2, 2, 2)
TIMES = torch.arange(8, dtype=torch.float64) / 25


def written(path: Path, metadata: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    tensors = {name: value for name, value in {"latents": LATENTS, "times": TIMES, **tensors}.items() if value is not None}
    save_file(tensors, path, metadata={**METADATA, **(metadata or {})})
    return path


def test_a_whole_file_is_read(tmp_path):
    file = LatentFile(written(tmp_path / "a.safetensors"))
    assert torch.equal(file.read(0, 2), LATENTS)
    assert (file.fps, file.num_frames, file.end_time * 25) == (25, 8, 8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": None},
        {"times": None},
        {"times": TIMES.where(TIMES > 0, math.nan)},
        {"times": TIMES * 1e300},
        {"latents": LATENTS.int()},
        {"latents": LATENTS.to(torch.int8)},
        {"scale": torch.tensor(1.0)},
    ],
    ids=["no latents", "no times", "nan times", "endless times", "integers", "int8 without scale", "scalar scale"],
)
def test_missing_and_wrong_tensors_are_refused(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"a\.safetensors (is damaged|contradicts its own header).*; encode it again"):
        LatentFile(written(tmp_path / "a.safetensors", **tensors))


@pytest.mark.parametrize("name", ["fps", "sample_aspect_ratio", "end_time"])
@pytest.mark.parametrize("text", ["1e999999999", "9" * 5000, "1/99999999999", "1/0", "nan", ""])
def test_fractions_that_no_video_has_are_refused(tmp_path, name, text):
    """The first one would take all memory to compute; FFmpeg takes 32-bit integers."""
    with pytest.raises(ValueError, match=r"the header of .* is damaged"):
        LatentFile(written(tmp_path / "a.safetensors", {name: text}))


def test_latents_that_are_no_numbers_are_refused(tmp_path):
    broken = LATENTS.clone()
    broken[0, 0, 1, 0, 0] = math.nan
    file = LatentFile(written(tmp_path / "a.safetensors", latents=broken))
    assert torch.equal(file.read(0, 1), LATENTS[:, :, :1])
    with pytest.raises(ValueError, match=r"has NaN or infinite latents in \[1, 2\)"):
        file.read(1, 2)


def test_a_header_of_bytes_is_refused(tmp_path):
    data = written(tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["latents"]["shape"][2] = 10**12
    text = json.dumps(header).encode()
    for damaged in (data[:-1], data[:40], struct.pack("<Q", 2**62) + data[8:], struct.pack("<Q", len(text)) + text):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is no readable safetensors file"):
            LatentFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("name", "value"), [("fps", 1e-20), ("fps", 2**40), ("sample_aspect_ratio", 2**40)])
def test_the_writer_refuses_fractions_that_no_container_holds(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}: .* must be above 1/100000"):
        VideoWriter(tmp_path / "a.mp4", **{"fps": 25, name: value})
    assert not list(tmp_path.iterdir())
