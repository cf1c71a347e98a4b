"""Any diffusers video VAE as something to train: loading it, freezing parts, the lengths that it returns."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
import torch
from diffusers import AutoencoderKLHunyuanVideo, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..autoencoder.frame_groups import repeat_frames
from ..names import asked_of_hub, model_place

# Modules of the parts that can be trained apart; a VAE has the quant convolutions or not.
PARTS = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}

# Edge in pixels of the clips that find out which lengths a VAE returns unchanged, and how far the search goes.
_PROBE_SIZE = 64
_PROBE_REACH = 16


def load_vae(path: str, subfolder: str | None = None) -> ModelMixin:
    """Load a VC-VAE or any diffusers VAE, in float32; its class is the one that its ``config.json`` names.

    Raises:
        ValueError: if there is no such folder, or neither this package nor diffusers has its class.
    """
    path = model_place("--model", path)
    with asked_of_hub("--model", path):
        name = str(AutoencoderKLVCVAE.load_config(path, subfolder=subfolder)["_class_name"])
        vae_class = AutoencoderKLVCVAE if name == AutoencoderKLVCVAE.__name__ else getattr(diffusers, name, None)
        if vae_class is None:
            raise ValueError(f"model={path!r}: its config.json names the class {name!r}, which diffusers does not have")
        return vae_class.from_pretrained(path, subfolder=subfolder, torch_dtype=torch.float32)


def check_size(vae: ModelMixin, where: str, *sides: int) -> None:
    """Refuse sides of clips in pixels that the spatial compression, where the VAE tells it, does not divide.

    Raises:
        ValueError: naming the option.
    """
    ratio = getattr(vae, "spatial_compression_ratio", 1)
    for side in sides:
        if side % ratio:
            raise ValueError(f"{where}: {side} is no multiple of {ratio}, the spatial compression of {type(vae).__name__}")


def select_parts(vae: ModelMixin, parts: Sequence[str]) -> None:
    """Freeze every parameter of ``vae`` outside ``parts`` ("encoder", "decoder").

    Raises:
        ValueError: for another part, or if nothing is left to train.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"train={list(parts)}: unknown parts {unknown}; choose from {sorted(PARTS)}")
    trained = {module for part in parts for module in PARTS[part]}
    vae.requires_grad_(False)
    for name, module in vae.named_children():
        if name in trained:
            module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in vae.parameters()):
        raise ValueError(f"train={list(parts)}: {type(vae).__name__} has no parameters there; name encoder or decoder")


class TrainableVAE(nn.Module):
    """One ``forward`` for encoding, sampling and decoding, so that DDP, FSDP and DeepSpeed see the whole pass.

    Calling ``encode`` and ``decode`` of a model inside DDP bypasses its hooks: gradients are then not averaged.
    Works for VC-VAE and for every diffusers video VAE whose posterior is a diagonal Gaussian.
    """

    def __init__(self, vae: ModelMixin, num_frames: Sequence[int]):
        """Wrap ``vae`` for clips of the given lengths; the lengths it can return are found by trying, on tiny clips."""
        super().__init__()
        if isinstance(vae, AutoencoderKLHunyuanVideo):
            # Its default cuts clips of more than 16 frames into overlapping tiles in time and blends them.
            vae.use_framewise_encoding = vae.use_framewise_decoding = False
        self.vae = vae
        self.padded_frames = {frames: returned_length(vae, frames) for frames in sorted(set(num_frames))}
        self.padded_frames |= {frames: frames for frames in self.padded_frames.values()}  # an image comes as such a clip

    def forward(self, video: torch.Tensor, noise_seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruct clips from samples of the posterior, or from its mode.

        Args:
            video: (B, C, T, H, W) in [-1, 1].
            noise_seeds: one seed a clip, so that a clip's noise does not depend on its place in a batch; None decodes
                the posterior's mode.

        Returns:
            the reconstruction (B, C, T, H, W), and the posterior's mean and log-variance (B, c, t, h, w) in float32.
        """
        frames = video.shape[2]
        posterior = self.vae.encode(pad_frames(video, self.padded_frames[frames])).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean
        if noise_seeds is not None:
            noise = torch.cat([_noise(mean[:1], seed) for seed in noise_seeds])
            latents = mean + torch.exp(0.5 * logvar) * noise
        reconstruction = self.vae.decode(latents.to(posterior.mean.dtype)).sample[:, :, :frames]
        if reconstruction.shape != video.shape:
            raise ValueError(
                f"{type(self.vae).__name__} returned {tuple(reconstruction.shape)} for clips {tuple(video.shape)}; "
                "choose a size that its spatial compression divides"
            )
        return reconstruction, mean, logvar


def pad_frames(video: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Repeat the last frame of (B, C, T, H, W) up to ``num_frames``."""
    return repeat_frames(video, num_frames - video.shape[2], front=False)


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    # Drawn on the CPU: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)


@torch.no_grad()
def returned_length(vae: ModelMixin, num_frames: int) -> int:
    """Return the smallest length >= ``num_frames`` that ``vae`` decodes to as many frames as it encoded.

    That is T itself for VC-VAE at multiples of 4, 1 + 4k for Wan, Hunyuan and others, 1 + 6k for Mochi, 1 + 8k for LTX.
    """
    for length in range(num_frames, num_frames + _PROBE_REACH + 1):
        shape = (1, vae.config.in_channels, length, _PROBE_SIZE, _PROBE_SIZE)
        clip = torch.zeros(shape, device=vae.device, dtype=vae.dtype)
        posterior = vae.encode(clip).latent_dist
        if not isinstance(posterior, DiagonalGaussianDistribution):
            raise ValueError(f"{type(vae).__name__} has no Gaussian posterior; the recipe needs one for its KL term")
        if vae.decode(posterior.mode()).sample.shape[2] == length:
            return length
    raise ValueError(
        f"{type(vae).__name__} returns no clip of {num_frames} to {num_frames + _PROBE_REACH} frames at its own length"
    )


def last_layer(vae: ModelMixin) -> nn.Parameter:
    """Return the kernel of the decoder's last convolution, against which the adaptive GAN weight is measured."""
    return [parameter for parameter in vae.decoder.parameters() if parameter.ndim >= 4][-1]
