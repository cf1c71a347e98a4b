"""The model that a command works with: found, checked and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vc_vae_diffusers import bundled_model_path

from ..files import read_json
from ..names import BUNDLED, asked_of_hub, model_place
from .options import check_place, choose_device, choose_dtype, parse_tile

if TYPE_CHECKING:
    from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

CLASS_NAME = "AutoencoderKLVCVAE"


def check_model(model: str | None, subfolder: str | None) -> str:
    """The folder or hub id to load, with local folders checked.

    Raises:
        ValueError: if it is neither, or holds no VC-VAE.
    """
    if model is None:
        if not (bundled_model_path() / "config.json").is_file():
            raise ValueError(
                f"--model: the bundled checkpoint is missing from this installation ({bundled_model_path()}); reinstall the "
                "package, or pass --model."
            )
        if subfolder:
            raise ValueError(f"--subfolder: {subfolder} belongs to a --model; pass both, or neither for the bundled model.")
        return str(bundled_model_path())
    folder = Path(model := model_place("--model", model))
    if not folder.exists():
        return model
    if folder.is_file():
        raise ValueError(
            f"--model: {model} is a file; pass the folder that save_pretrained wrote. Image VAE weights become one by "
            "`python convert_flux_weights.py`."
        )
    read_config(folder / subfolder if subfolder else folder)
    return model


def read_config(folder: Path) -> dict:
    """The configuration of a VC-VAE's folder.

    Raises:
        ValueError: if it holds none.
    """
    if not (folder / "config.json").is_file():
        hint = (
            "it has a vae/ folder: add --subfolder vae" if (folder / "vae" / "config.json").is_file() else "check the path"
        )
        raise ValueError(f"--model: {folder} has no config.json, so it is no model folder; {hint}.")
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"--model: {error}; download it again.") from error
    found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if found != CLASS_NAME:
        raise ValueError(
            f"--model: {folder} holds {found}, not {CLASS_NAME}; an image VAE becomes one by "
            "`python convert_flux_weights.py`."
        )
    return config


def load_model(
    model: str | None,
    subfolder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tile: str | None = None,
    groups_per_chunk: int = 1,
    compile: bool = False,
) -> AutoencoderKLVCVAE:
    """The model ready for inference: options checked before anything is loaded, kernels folded, the rest when asked.

    Raises:
        ValueError: for options that make no sense here.
        OSError: if the weights cannot be read.
    """
    check_place(device, dtype)
    tile_size = parse_tile(tile)
    place = check_model(model, subfolder)

    from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

    target = choose_device(device)
    precision = choose_dtype(dtype, target)
    with asked_of_hub("--model", place):
        vae = AutoencoderKLVCVAE.from_pretrained(place, subfolder=subfolder, torch_dtype=precision)
    vae = vae.to(target).eval().requires_grad_(False)
    vae.fuse_tdc(compile)
    vae.groups_per_chunk = groups_per_chunk
    if tile_size is not None:
        ratio = vae.spatial_compression_ratio
        if min(tile_size) < ratio or any(side % ratio for side in tile_size):
            raise ValueError(f"--tile: {tile} must be multiples of {ratio} pixels, this model's spatial compression.")
        vae.enable_tiling(tile_sample_min_height=tile_size[0], tile_sample_min_width=tile_size[1])
    return vae


def model_name(model: str | None, subfolder: str | None = None) -> str:
    """How results name the model."""
    return BUNDLED if model is None else f"{model}/{subfolder}" if subfolder else model
