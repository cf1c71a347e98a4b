"""VC-VAE for diffusers: a video VAE that separates keyframes from motion, as video codecs do."""

import importlib
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin  # diffusers looks for it where a pipeline's component comes from

from .autoencoder_kl_vcvae import AutoencoderKLVCVAE, AutoencoderKLVCVAEOutput
from .image_vae import ImageVAE, inflate, read_image_vae
from .tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
    apply_tdc,
    remove_tdc,
    to_conv,
    to_tdc,
)

__version__ = "0.1.0"

# The module that a saved pipeline names for its components; it must be importable and hold the classes.
AutoencoderKLVCVAE.__module__ = "vc_vae_diffusers"


# Imported at first use: generation brings in transformers' text encoders, which a VAE does not need.
_LAZY = {
    "LatteAdaLNTransformer3DModel": "latte_transformer",
    "LatteVCVAEPipeline": "pipeline_latte",
    "LatteVCVAEUnconditionalPipeline": "pipeline_latte",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def bundled_model_path() -> Path:
    """The folder of the small checkpoint that comes with the package."""
    return Path(__file__).parent / "models" / "vcvae-tiny"


__all__ = [
    "AutoencoderKLVCVAE",
    "AutoencoderKLVCVAEOutput",
    "CausalConv3d",
    "CausalTDC",
    "GroupCausalConv3d",
    "GroupCausalTDC",
    "ImageVAE",
    "LatteAdaLNTransformer3DModel",
    "LatteVCVAEPipeline",
    "LatteVCVAEUnconditionalPipeline",
    "ModelMixin",
    "TemporalInteractionConv3d",
    "TemporalInteractionTDC",
    "apply_tdc",
    "bundled_model_path",
    "inflate",
    "read_image_vae",
    "remove_tdc",
    "to_conv",
    "to_tdc",
]
