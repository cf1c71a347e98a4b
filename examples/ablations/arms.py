"""The arms of the ablations: what each trains, and the suites (tables of the paper) that compare them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from settings import Settings
from torch import nn

from vc_vae_diffusers import AutoencoderKLVCVAE, CausalConv3d, GroupCausalConv3d, TemporalInteractionConv3d


@dataclass(frozen=True)
class Arm:
    """One kind of model and training.

    Args:
        start: where the weights come from: `"image"` (Eq. 3, 4 on the stronger image VAE), `"weak"` (on the weaker one),
            `"random_temporal"` (the stronger one inside, random temporal down and upsampling), `"scratch"`.
        options: configuration of `AutoencoderKLVCVAE`.
        peer: class name in diffusers, for a model that is not ours; with `options` its configuration.
        optimizer: `"adamw"`, or `"sgd"` without momentum.
        coordinates: those in which the optimizer works on the slices of plain kernels, see `coordinates.py`.
        rate_scale: factor on the rates of the sweep (plain SGD needs others than Adam).
    """

    start: str = "image"
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    optimizer: str = "adamw"
    coordinates: str | None = None
    rate_scale: float = 1.0

    @property
    def separate(self) -> bool:
        """Whether the model takes 1 + r_t k frames, the first one apart. (CogVideoX returns 1 + 8k only.)"""
        return self.peer is not None or self.options.get("first_frame") == "separate"

    @property
    def long(self) -> bool:
        """Whether eight frames make one latent frame."""
        return self.options.get("temporal_downsample") == (True, True, True)

    @property
    def image_vae(self) -> str | None:
        """Which image VAE must be there first."""
        return {"image": "strong", "weak": "weak", "random_temporal": "strong"}.get(self.start)


_CONV = {"temporal_operator": "conv"}
_CAUSAL = {"temporal_causality": "causal"}
_LONG = {"temporal_downsample": (True, True, True), "latent_channels": 32}

ARMS = {
    "group_tdc": Arm(),
    "group_conv": Arm(options=_CONV),
    "causal_tdc": Arm(options=_CAUSAL),
    "causal_conv": Arm(options=_CONV | _CAUSAL),
    "weak_tdc": Arm(start="weak"),
    "weak_conv": Arm(start="weak", options=_CONV),
    "separate": Arm(options={"first_frame": "separate"}),
    "long_tdc": Arm(options=_LONG),
    "long_conv": Arm(options=_LONG | _CONV),
    "random_temporal": Arm(start="random_temporal"),
    "scratch": Arm(start="scratch"),
    # Peers: parameters and operations within 10 % of ours. Wan clamps its output, in training as well.
    "wan": Arm(
        start="scratch",
        peer="AutoencoderKLWan",
        options={"base_dim": 8, "dim_mult": [1, 2, 3, 8], "num_res_blocks": 1, "z_dim": 16},
    ),
    "hunyuan": Arm(
        start="scratch",
        peer="AutoencoderKLHunyuanVideo",
        options={"block_out_channels": (8, 8, 24, 64), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16},
    ),
    "cogvideox": Arm(
        start="scratch",
        peer="AutoencoderKLCogVideoX",
        options={"block_out_channels": (8, 8, 24, 68), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16},
    ),
    # Why: the same functions, other coordinates for the optimizer
    "group_tdc_sgd": Arm(optimizer="sgd", rate_scale=200.0),
    "group_conv_sgd": Arm(options=_CONV, optimizer="sgd", rate_scale=200.0),
    "group_conv_as_tdc": Arm(options=_CONV, coordinates="tdc"),
    "group_conv_dct": Arm(options=_CONV, coordinates="dct"),
}


def image_network(settings: Settings) -> diffusers.AutoencoderKL:
    """The image VAE of a scale, random weights; Flux's shape: no quant convolutions."""
    options = dict(settings.image.network)
    levels = len(options["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        **options,
    )


def build(arm: Arm, settings: Settings, image_vae: str | None, seed: int) -> nn.Module:
    """The model of an arm before its training.

    Args:
        image_vae: folder or `"ID:SUBFOLDER"` of the image VAE that `arm.image_vae` asks for.
        seed: of random weights.
    """
    torch.manual_seed(seed)
    if arm.peer is not None:
        return _peer(arm, settings)
    if arm.start == "scratch":
        model = AutoencoderKLVCVAE(**{**settings.image.network, **arm.options})
        random_temporal(model)
        return model
    source, _, subfolder = image_vae.partition(":")
    model = AutoencoderKLVCVAE.from_image_vae(source, subfolder=subfolder or None, **arm.options)
    if arm.start == "random_temporal":
        random_temporal(model)
    return model


def random_temporal(model: AutoencoderKLVCVAE) -> None:
    """Give the temporal down and upsampling the random weights that PyTorch gives a convolution, in place of Eq. 3 and 4."""
    for module in model.modules():
        if isinstance(module, TemporalInteractionConv3d):
            nn.Conv3d.reset_parameters(module)
    for block in model.decoder.up_blocks:
        if block.temporal_upsampler is not None:
            block.temporal_upsampler.conv.reset_parameters()


def _peer(arm: Arm, settings: Settings) -> nn.Module:
    model = getattr(diffusers, arm.peer)(**arm.options)
    if arm.peer == "AutoencoderKLHunyuanVideo":
        # Its default cuts clips of more than 16 frames into overlapping tiles in time and blends them.
        model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


def temporal_layers(model: nn.Module) -> dict[str, nn.Conv3d]:
    """Our temporal operators by name: weights `(out, in, slices, k, k)`, of three slices or (temporal interaction) two."""
    kinds = (CausalConv3d, GroupCausalConv3d, TemporalInteractionConv3d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def reconstruct(model: nn.Module, video: torch.Tensor, noise: torch.Generator | None) -> tuple[torch.Tensor, ...]:
    """Encode, sample and decode; the mode of the posterior without `noise`.

    Returns:
        The reconstruction `(B, 3, T, H, W)`, and mean and log-variance of the posterior.
    """
    posterior = model.encode(video).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean
    if noise is not None:
        drawn = torch.randn(mean.shape, generator=noise)  # on the CPU: the same on every device
        latents = mean + torch.exp(0.5 * logvar) * drawn.to(mean.device)
    sample = model.decode(latents).sample
    if video.ndim == 5 and video.shape[2] == 1:
        sample = sample[:, :, :1]  # an image comes back as a group of frames
    if sample.shape != video.shape:
        raise ValueError(f"{type(model).__name__} made {tuple(sample.shape)} of clips {tuple(video.shape)}")
    return sample, mean, logvar


# Suites --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A statement of the paper as a sum of measurements: `sum(weight * metric of arm)`, paired by clip and seed.

    Args:
        says: in words.
        terms: (weight, arm or image VAE, metric); a positive sum supports the claim.
        paper: the paper's value of the sum, and its table.
        within: of a claim that the sum is zero, how far its interval may reach.
    """

    says: str
    terms: tuple[tuple[float, str, str], ...]
    paper: float | None
    unit: str = "dB"
    within: float | None = None


def difference(says: str, first: str, second: str, paper: float | None, metric: str = "psnr") -> Claim:
    sign = -1.0 if metric == "lpips" else 1.0
    return Claim(says, ((sign, first, metric), (-sign, second, metric)), paper, "" if metric in ("lpips", "ssim") else "dB")


@dataclass(frozen=True)
class Suite:
    title: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...]


def _gain(tdc: str, conv: str) -> tuple[tuple[float, str, str], ...]:
    return (1.0, tdc, "psnr"), (-1.0, conv, "psnr")


def _minus(first: tuple, second: tuple) -> tuple:
    return (*first, *((-weight, arm, metric) for weight, arm, metric in second))


SUITES = {
    "table4": Suite(
        "TDC against plain convolutions (Table 4)",
        ("group_tdc", "group_conv", "causal_tdc", "causal_conv"),
        (
            difference("TDC improves group causal convolutions", "group_tdc", "group_conv", 0.30),
            difference("TDC improves causal convolutions", "causal_tdc", "causal_conv", 0.35),
            difference("TDC improves LPIPS in groups", "group_tdc", "group_conv", 0.00265, "lpips"),
            difference("TDC improves LPIPS of causal ones", "causal_tdc", "causal_conv", 0.00347, "lpips"),
            difference("groups improve on causal convolutions", "group_conv", "causal_conv", 0.20),
        ),
    ),
    "table5": Suite(
        "A weaker and a stronger image VAE (Table 5)",
        ("weak_tdc", "weak_conv", "group_tdc", "group_conv"),
        (
            difference("TDC gains on the weaker image VAE", "weak_tdc", "weak_conv", 0.61),
            difference("TDC gains on the stronger image VAE", "group_tdc", "group_conv", 0.30),
            Claim(
                "the weaker one gains more",
                _minus(_gain("weak_tdc", "weak_conv"), _gain("group_tdc", "group_conv")),
                0.31,
            ),
        ),
    ),
    "table6": Suite(
        "In-sequence or separate first frame (Table 6)",
        ("group_tdc", "separate"),
        (
            difference("in-sequence improves the first frame", "group_tdc", "separate", 1.19, "first_psnr"),
            difference("and the whole clip", "group_tdc", "separate", None),
        ),
    ),
    "table8": Suite(
        "TDC at 8x8x8 (Table 8)",
        ("long_tdc", "long_conv", "group_tdc", "group_conv"),
        (
            difference("TDC improves 8x8x8", "long_tdc", "long_conv", 0.90),
            Claim("and more than 4x8x8", _minus(_gain("long_tdc", "long_conv"), _gain("group_tdc", "group_conv")), 0.60),
        ),
    ),
    "table2": Suite(
        "Steps to reach a quality (Table 2)",
        ("group_tdc", "random_temporal", "scratch"),
        (
            difference("the keyframe start ends above random temporal layers", "group_tdc", "random_temporal", None),
            difference("and above random weights", "group_tdc", "scratch", None),
        ),
    ),
    "table9": Suite(
        "Images (Table 9)",
        ("group_tdc", "separate"),
        (
            difference("images lose nothing against the image VAE", "group_tdc", "image_strong", 0.55, "image_psnr"),
            Claim(
                "a separate first frame is worse than the same image repeated",
                ((1.0, "separate", "image_repeated_psnr"), (-1.0, "separate", "image_psnr")),
                1.69,
            ),
            difference("ours is better on images than a separate first frame", "group_tdc", "separate", 2.08, "image_psnr"),
        ),
    ),
    "shootout": Suite(
        "Against Wan, HunyuanVideo and CogVideoX in small (Table 1)",
        ("scratch", "wan", "hunyuan", "cogvideox", "group_tdc"),
        (
            difference("ahead of Wan, both from random weights", "scratch", "wan", 0.64),
            difference("ahead of HunyuanVideo, both from random weights", "scratch", "hunyuan", 0.20),
            difference("ahead of CogVideoX, both from random weights", "scratch", "cogvideox", 0.81),
            difference("ahead of Wan, ours from an image VAE", "group_tdc", "wan", 0.64),
            difference("ahead of HunyuanVideo, ours from an image VAE", "group_tdc", "hunyuan", 0.20),
            difference("ahead of CogVideoX, ours from an image VAE", "group_tdc", "cogvideox", 0.81),
        ),
    ),
    "why": Suite(
        "Why: the optimizer's coordinates (not in the paper)",
        ("group_tdc", "group_conv", "group_conv_as_tdc", "group_tdc_sgd", "group_conv_sgd", "group_conv_dct"),
        (
            Claim(
                "plain kernels with Adam on TDC's slices equal TDC, within 0.05 dB",
                _gain("group_conv_as_tdc", "group_tdc"),
                None,
                within=0.05,
            ),
            difference("TDC improves under plain SGD", "group_tdc_sgd", "group_conv_sgd", None),
            difference("orthogonal slices (mean, slope, bend) improve on TDC", "group_conv_dct", "group_tdc", None),
        ),
    ),
}
PAPER_SUITES = tuple(name for name in SUITES if name != "why")
