"""`python -m vc_vae_diffusers.cli`."""

from . import main

main()
