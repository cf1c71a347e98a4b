"""Tiny models with random weights, shared by the tests of pipelines, packaging and training."""

import torch

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.generation.latte_transformer import LatteAdaLNTransformer3DModel

MEAN, STD = [0.3, -0.2, 0.0, 1.5], [2.0, 0.5, 1.0, 4.0]


def tiny_vae(**config) -> AutoencoderKLVCVAE:
    """A 4x8x8 VC-VAE with 4 latent channels, whose frames differ within a group.

    The residual slices are small, as after training from the center initialisation: at the anchor's size they
    amplify the rounding of equal frames a thousandfold, and nothing could be compared to 1e-5.
    """
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    vae = AutoencoderKLVCVAE(**{**small, "latents_mean": MEAN, "latents_std": STD, **config}).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 5 and parameter.shape[2] == 3:
                parameter[:, :, [0, 2]] = 0.1 * parameter.std() * torch.randn_like(parameter[:, :, [0, 2]])
            elif name.endswith("temporal_upsampler.conv.weight"):
                parameter += 0.1 * torch.randn_like(parameter)
    return vae


def tiny_latte(**config) -> LatteAdaLNTransformer3DModel:
    """A Latte for 3 latent frames of 4x4, with random numbers where training starts from zero."""
    torch.manual_seed(1)
    small = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    model = LatteAdaLNTransformer3DModel(**{**small, "video_length": 3, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15)
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
