"""Lets diffusers load this folder with trust_remote_code=True. Needs `pip install vc_vae_diffusers`."""

from vc_vae_diffusers.auto import AutoVCVAEModel, AutoencoderKLVCVAE, LatteAdaLNTransformer3DModel

__all__ = ["AutoVCVAEModel", "AutoencoderKLVCVAE", "LatteAdaLNTransformer3DModel"]
