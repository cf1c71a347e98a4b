"""Nodes of VC-VAE for ComfyUI, which reads `NODE_CLASS_MAPPINGS` from here. What they do is in docs/comfyui.md."""

try:
    import vc_vae_diffusers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the VC-VAE nodes need the package vc_vae_diffusers in ComfyUI's own environment: run `python -m pip install .` in "
        "a clone of its repository, with the python that starts ComfyUI"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
