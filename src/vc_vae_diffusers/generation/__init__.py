"""Latent diffusion on VC-VAE (Sec. A.5): the Latte transformer, its losses and pipelines."""
