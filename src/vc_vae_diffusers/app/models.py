"""Models that the app has at hand: loaded once, used by one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

from ..names import BUNDLED, asked_of_hub


class Models:
    """The last model used, ready; another one takes its place when it is asked for.

    Args:
        names: folders and hub ids that may be chosen; the first is offered.
        device: where they work.
        any_model: whether other names may be typed. On a public page this lets strangers download what they like.
    """

    def __init__(self, names: list[str], device: torch.device, any_model: bool = True):
        self.names, self.device, self.any_model = list(dict.fromkeys(names)), device, any_model
        self._lock = threading.Lock()
        self._loaded: tuple[tuple[str, torch.dtype], AutoencoderKLVCVAE] | None = None

    @contextmanager
    def use(self, name: str, dtype: torch.dtype, tile: int | None = None) -> Iterator[AutoencoderKLVCVAE]:
        """The model for one piece of work; who asks meanwhile waits.

        Args:
            name: "bundled", a folder or a hub id.
            dtype: of its weights and activations.
            tile: side of tiles in pixels; None works on whole frames.

        Raises:
            ValueError: for a name that may not be chosen or a tile that the model cannot take.
            OSError: if there is no such model.
        """
        if name not in self.names and not self.any_model:
            raise ValueError(f"The model {name!r} is not offered here: choose one of {', '.join(self.names)}.")
        with self._lock:
            vae = self._load(name, dtype)
            vae.disable_tiling()
            if tile is not None:
                ratio = vae.spatial_compression_ratio
                if tile % ratio:
                    raise ValueError(f"Tiles of {tile} pixels: this model takes multiples of {ratio}.")
                vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
            yield vae

    def _load(self, name: str, dtype: torch.dtype) -> AutoencoderKLVCVAE:
        if self._loaded is None or self._loaded[0] != (name, dtype):
            self._loaded = None  # its memory is free before the next one takes some
            place = str(bundled_model_path()) if name == BUNDLED else name
            subfolder = None
            if Path(place).is_dir() and not (Path(place) / "config.json").exists() and (Path(place) / "vae").is_dir():
                subfolder = "vae"
            with asked_of_hub("model", place):
                vae = AutoencoderKLVCVAE.from_pretrained(place, subfolder=subfolder, torch_dtype=dtype)
            vae = vae.to(self.device).eval().requires_grad_(False)
            vae.fuse_tdc()
            self._loaded = ((name, dtype), vae)
        return self._loaded[1]
