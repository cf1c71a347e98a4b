"""`python -m vc_vae_diffusers`, the same as `vcvae`."""

from .cli import main

main()
