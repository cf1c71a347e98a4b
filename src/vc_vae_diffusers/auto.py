"""A name that folders written by version 0.1 contain; see `publishing/auto.py`."""

from .autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE  # noqa: F401
from .generation.latte_transformer import LatteAdaLNTransformer3DModel  # noqa: F401
from .publishing.auto import AutoVCVAEModel  # noqa: F401
