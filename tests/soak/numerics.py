"""Random configurations: chunks, streams, lengths, causality, saving and fusing hold for all of them.

    python tests/soak/numerics.py --seconds 300

In float64. A fault names the seed, the configuration and the property, and the exit status is 1.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from program import main

OPERATORS, CAUSALITIES = ("tdc", "conv"), ("group", "causal")


def model(generator: np.random.Generator) -> Any:
    from vc_vae_diffusers import AutoencoderKLVCVAE
    from vc_vae_diffusers.operators.tdc import TemporalConv3d

    pick = lambda values: values[int(generator.integers(len(values)))]  # noqa: E731
    torch.manual_seed(int(generator.integers(2**31)))
    groups = pick((2, 4))
    config = {
        "block_out_channels": tuple(groups * pick((1, 2, 3)) for _ in range(4)),
        "layers_per_block": pick((1, 2)),
        "norm_num_groups": groups,
        "latent_channels": pick((2, 4)),
        "temporal_downsample": pick(((False, True, True), (True, True, True))),
        "temporal_operator": pick(OPERATORS),
        "temporal_causality": pick(CAUSALITIES),
        "first_frame": pick(("in_sequence", "in_sequence", "separate")),
    }
    if config["first_frame"] == "in_sequence":
        config["frame_convention"] = pick(("4k", "4k+1"))
    vae = AutoencoderKLVCVAE(**config).double().eval()
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, TemporalConv3d):
                layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return vae, config


@torch.no_grad()
def check(vae: Any, generator: np.random.Generator) -> list[str]:
    """The properties that do not hold, in float64."""
    wrong = []
    frames = int(generator.integers(1, 20))
    size = vae.spatial_compression_ratio
    video = torch.rand(1, 3, frames, size * 2, size * 3, dtype=torch.float64) * 2 - 1
    latents = vae.encode(video).latent_dist.mode()
    decoded = vae.decode(latents, num_frames=frames).sample
    if decoded.shape != video.shape:
        wrong.append(f"{frames} frames in, {decoded.shape[2]} out")
    cuts = np.sort(generator.integers(0, frames + 1, size=3)).tolist()
    chunks = [video[:, :, a:b] for a, b in zip([0, *cuts], [*cuts, frames], strict=True)]
    streamed = torch.cat([p.mode() for p in vae.encode_stream(iter(chunks), num_frames=frames)], dim=2)
    if (streamed - latents).abs().max() > 1e-9:
        wrong.append(f"stream cut at {cuts}: {(streamed - latents).abs().max():.1e}")
    back = torch.cat(list(vae.decode_stream(iter(latents.split(1, dim=2)), num_frames=frames)), dim=2)
    if (back - decoded).abs().max() > 1e-9:
        wrong.append(f"decoded as a stream: {(back - decoded).abs().max():.1e}")
    two = vae.encode(torch.cat([video, -video])).latent_dist.mode()
    if (two[:1] - latents).abs().max() > 1e-9:
        wrong.append("a batch's samples see each other")
    vae.fuse_tdc()
    if (vae.encode(video).latent_dist.mode() - latents).abs().max() > 1e-7:
        wrong.append("fused differs")
    vae.unfuse_tdc()
    if latents.shape[2] > 1 and vae.config.frame_convention == "4k" and vae.config.first_frame == "in_sequence":
        later = video.clone()
        later[:, :, -1] = 0
        if frames > vae.temporal_compression_ratio:
            first = vae.encode(later).latent_dist.mode()[:, :, :1]
            if (first - latents[:, :, :1]).abs().max() > 1e-12:
                wrong.append("a later group changed an earlier one")
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        again = type(vae).from_pretrained(folder, torch_dtype=torch.float64).eval()
        pairs = zip(vae.state_dict().values(), again.state_dict().values(), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            wrong.append("weights saved and loaded differ")
        if (again.encode(video).latent_dist.mode() - latents).abs().max() > 1e-12:
            wrong.append("a model saved and loaded gives other latents")
    return wrong


def run(seconds: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Counts of models; a fault names seed, configuration and property."""
    counts: Counter[str] = Counter()
    faults = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number = seed * 1_000_000 + counts["models"]
        generator = np.random.default_rng(number)
        vae, config = model(generator)
        counts["models"] += 1
        faults += [f"seed {number}, {config}: {wrong}" for wrong in check(vae, generator)]
        counts["properties"] += 7
    return dict(counts), faults


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
