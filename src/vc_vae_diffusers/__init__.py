"""VC-VAE for diffusers: a video VAE that separates keyframes from motion, as video codecs do.

Names are imported at first use, as diffusers and transformers do: `import vc_vae_diffusers` loads nothing else, and
`import vc_vae_diffusers.operators` only PyTorch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from .autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE, AutoencoderKLVCVAEOutput
    from .autoencoder.image_vae import ImageVAE, inflate, read_image_vae
    from .generation.latte_transformer import LatteAdaLNTransformer3DModel
    from .generation.pipeline_latte import LatteVCVAEPipeline, LatteVCVAEUnconditionalPipeline
    from .names import bundled_model_path
    from .operators import (
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
    from .publishing.auto import AutoVCVAEModel
    from .video_processor import VCVAEVideoProcessor

__version__ = "0.2.0"

# What the package says is governed as what diffusers says is: `diffusers.utils.logging.set_verbosity_error()`.
logging.getLogger(__name__).parent = logging.getLogger("diffusers")

_OPERATORS = (
    *("CausalConv3d", "CausalTDC", "GroupCausalConv3d", "GroupCausalTDC", "TemporalInteractionConv3d"),
    *("TemporalInteractionTDC", "apply_tdc", "remove_tdc", "to_conv", "to_tdc"),
)
_WHERE = {
    **dict.fromkeys(("AutoencoderKLVCVAE", "AutoencoderKLVCVAEOutput"), ".autoencoder.autoencoder_kl_vcvae"),
    **dict.fromkeys(("ImageVAE", "inflate", "read_image_vae"), ".autoencoder.image_vae"),
    **dict.fromkeys(_OPERATORS, ".operators"),
    "LatteAdaLNTransformer3DModel": ".generation.latte_transformer",
    **dict.fromkeys(("LatteVCVAEPipeline", "LatteVCVAEUnconditionalPipeline"), ".generation.pipeline_latte"),
    "bundled_model_path": ".names",
    "AutoVCVAEModel": ".publishing.auto",
    "VCVAEVideoProcessor": ".video_processor",
    "ModelMixin": "diffusers.models.modeling_utils",  # diffusers looks for it where a pipeline's component comes from
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


__all__ = [
    "AutoVCVAEModel",
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
    "VCVAEVideoProcessor",
    "apply_tdc",
    "bundled_model_path",
    "inflate",
    "read_image_vae",
    "remove_tdc",
    "to_conv",
    "to_tdc",
]
