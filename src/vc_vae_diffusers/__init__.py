"""VC-VAE for diffusers: a video VAE that separates keyframes from motion, as video codecs do."""

from pathlib import Path

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
