#!/usr/bin/env python3
"""Time of one image: a VC-VAE inflated from an image VAE beside that image VAE, diffusers' `AutoencoderKL`.

An image is a clip of one frame. In an inflated model, whose motion is not trained yet, both directions run on that frame
alone; once training has told the frames of a group apart, decoding works on whole groups, which `--trained` measures.

    python benchmarks/image_speed.py --size 256x256 --dtype float32 bfloat16 --threads 2

The image VAE has Flux's configuration and random weights, in `channels_last`, its fastest layout. Runs of the two models
take turns, and the ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from common import (
    DTYPES,
    add_common_options,
    environment,
    parse_size,
    plain,
    report,
    synchronize,
    table,
    warn_if_busy,
)
from diffusers import AutoencoderKL

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.blocks import TemporalUpsample

MODELS = ("image VAE", "VC-VAE")
FLUX = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def build(device: str, dtype: torch.dtype, trained: bool) -> tuple[AutoencoderKL, AutoencoderKLVCVAE]:
    """The image VAE, and the VC-VAE inflated from it; `trained` changes its temporal upsampling as training would."""
    torch.manual_seed(0)
    image_vae = AutoencoderKL(**FLUX).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        image_vae.save_pretrained(folder)
        vae = AutoencoderKLVCVAE.from_image_vae(folder).requires_grad_(False)
    if trained:
        for module in vae.modules():
            if isinstance(module, TemporalUpsample):
                module.conv.weight += 1e-3 * torch.randn_like(module.conv.weight)
    image_vae = image_vae.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    vae = vae.to(device=device, dtype=dtype)
    vae.fuse_tdc()
    return image_vae, vae


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one run."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(device: str, dtype: str, height: int, width: int, rounds: int, trained: bool) -> dict[str, dict[str, float]]:
    """Median seconds of both models, and the median ratio, by operation."""
    image_vae, vae = build(device, DTYPES[dtype], trained)
    image = torch.rand(1, 3, height, width, device=device, dtype=DTYPES[dtype]).mul(2).sub(1)
    image = image.contiguous(memory_format=torch.channels_last)
    latents = image_vae.encode(image).latent_dist.mode()
    runs = {
        "encode": (lambda: image_vae.encode(image), lambda: vae.encode(image.unsqueeze(2))),
        "decode": (lambda: image_vae.decode(latents), lambda: vae.decode(latents.unsqueeze(2), num_frames=1)),
    }
    result = {}
    for operation, pair in runs.items():
        turns = [[seconds(function, device) for function in pair] for _ in range(rounds + 1)][1:]  # the first warms up
        result[operation] = dict(zip(MODELS, map(statistics.median, zip(*turns, strict=True)), strict=True))
        result[operation]["ratio"] = statistics.median(clip / image for image, clip in turns)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32"])
    parser.add_argument("--size", type=parse_size, default=(256, 256), help="HEIGHTxWIDTH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trained", action="store_true", help="measure a model whose frames of a group differ")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warn_if_busy()
    runs = {dtype: measure(options.device, dtype, *options.size, options.rounds, options.trained) for dtype in options.dtype}
    height, width = options.size
    title = f"one image, {height}x{width}" + (", frames of a group told apart" if options.trained else "")
    rows = table(title, ["dtype", "", "image VAE, ms", "VC-VAE, ms", "VC-VAE takes"])
    for dtype, operations in runs.items():
        for operation, times in operations.items():
            rows.add_row(dtype, operation, *(f"{1e3 * times[name]:.1f}" for name in MODELS), f"{times['ratio']:.2f}")
    results = {"environment": environment(options.device, options.threads), "options": plain(options), "runs": runs}
    report(results, options.json, [rows])


if __name__ == "__main__":
    main()
