"""Lets diffusers load this folder with trust_remote_code=True. Needs the package vc_vae_diffusers."""

from vc_vae_diffusers import AutoVCVAEModel, AutoencoderKLVCVAE, LatteAdaLNTransformer3DModel

__all__ = ["AutoVCVAEModel", "AutoencoderKLVCVAE", "LatteAdaLNTransformer3DModel"]
