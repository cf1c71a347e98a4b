"""The app on a Hugging Face Space: a small machine, strangers, offered models only."""

import os

import torch

from vc_vae_diffusers.app.interface import serve
from vc_vae_diffusers.app.limits import Limits
from vc_vae_diffusers.app.models import BUNDLED, Models

if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [BUNDLED, *filter(None, os.environ.get("VCVAE_MODELS", "").split(","))]
    limits = Limits(frames=int(os.environ.get("VCVAE_MAX_FRAMES_PER_REQUEST", "96")), side=768, seconds=240, megabytes=50)
    serve(Models(names, device, any_model=False), limits, "0.0.0.0", 7860)
