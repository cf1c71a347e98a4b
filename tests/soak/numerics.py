"""Random configurations: chunks, streams, lengths, causality, tiles, gradients, saving and fusing hold for all of them.

    python tests/soak/numerics.py --seconds 300

In float64. A fault names the seed, the configuration, the property and the difference, and the exit status is 1.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from program import main

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.operators.evaluation import Direct
from vc_vae_diffusers.operators.evaluation.fusing import KernelLayer
from vc_vae_diffusers.operators.tdc import TemporalConv3d


@dataclass
class Case:
    """A model, a clip, its latents and frames, and where a stream of it is cut."""

    vae: AutoencoderKLVCVAE
    video: torch.Tensor
    latents: torch.Tensor
    decoded: torch.Tensor
    cuts: list[int]

    @property
    def frames(self) -> int:
        return self.video.shape[2]


def model(generator: np.random.Generator) -> tuple[AutoencoderKLVCVAE, dict[str, Any]]:
    """A random configuration, all of whose weights are random."""
    pick = lambda values: values[int(generator.integers(len(values)))]  # noqa: E731
    torch.manual_seed(int(generator.integers(2**31)))
    groups = pick((2, 4))
    config = {
        "block_out_channels": tuple(groups * pick((1, 2, 3)) for _ in range(4)),
        "layers_per_block": pick((1, 2)),
        "norm_num_groups": groups,
        "latent_channels": pick((2, 4)),
        "temporal_downsample": pick(((False, True, True), (True, True, True))),
        "temporal_operator": pick(("tdc", "conv")),
        "temporal_causality": pick(("group", "causal")),
        "temporal_padding": pick(("replicate", "zeros")),
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


def encoded(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> torch.Tensor:
    return vae.encode(video).latent_dist.mode()


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite for other shapes."""
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")


def lengths(case: Case) -> float:
    return off(torch.zeros(case.decoded.shape), torch.zeros(case.video.shape))


def encoded_as_a_stream(case: Case) -> float:
    chunks = [case.video[:, :, a:b] for a, b in zip([0, *case.cuts], [*case.cuts, case.frames], strict=True)]
    return off(torch.cat([p.mode() for p in case.vae.encode_stream(chunks, num_frames=case.frames)], dim=2), case.latents)


def decoded_as_a_stream(case: Case) -> float:
    parts = case.latents.split(1, dim=2)
    return off(torch.cat(list(case.vae.decode_stream(parts, num_frames=case.frames)), dim=2), case.decoded)


def samples_of_a_batch(case: Case) -> float:
    return off(encoded(case.vae, torch.cat([case.video, -case.video]))[:1], case.latents)


def slices_of_a_batch(case: Case) -> float:
    case.vae.enable_slicing()
    return off(encoded(case.vae, torch.cat([-case.video, case.video]))[1:], case.latents)


def a_later_group(case: Case) -> float | None:
    if case.latents.shape[2] == 1 or case.vae.config.frame_convention != "4k" or case.vae.groups.alone:
        return None
    later, size = case.video.clone(), case.vae.groups.size
    later[:, :, size * (case.latents.shape[2] - 1) :] = 0
    return off(encoded(case.vae, later)[:, :, :-1], case.latents[:, :, :-1])


def tiles_that_hold_a_frame(case: Case) -> float:
    case.vae.enable_tiling(*case.video.shape[3:])
    return max(off(encoded(case.vae, case.video), case.latents), off(decode(case), case.decoded))


def tiles_of_a_stream(case: Case) -> float:
    """Tiles are blended in space alone: in a stream they are those of the clip."""
    case.vae.enable_tiling(*(2 * [2 * case.vae.spatial_compression_ratio]))
    chunks = case.video.split(3, dim=2)
    streamed = torch.cat([p.mode() for p in case.vae.encode_stream(chunks, num_frames=case.frames)], dim=2)
    return off(streamed, encoded(case.vae, case.video))


def decode(case: Case) -> torch.Tensor:
    return case.vae.decode(case.latents, num_frames=case.frames).sample


def the_definition(case: Case) -> float:
    """Every layer evaluated by the equation itself."""
    for layer in case.vae.modules():
        if isinstance(layer, TemporalConv3d):
            layer.ways = (Direct(),)
    return max(off(encoded(case.vae, case.video), case.latents), off(decode(case), case.decoded))


def fused(case: Case) -> float:
    case.vae.fuse_tdc()
    return max(off(encoded(case.vae, case.video), case.latents), off(decode(case), case.decoded))


def fused_and_changed_in_place(case: Case) -> float:
    case.vae.fuse_tdc()
    for layer in case.vae.modules():
        if isinstance(layer, KernelLayer):
            layer.weight.mul_(1.01)
    changed = encoded(case.vae, case.video)
    case.vae.unfuse_tdc()
    return off(changed, encoded(case.vae, case.video))


def gradients_with_checkpointing(case: Case) -> float:
    """Relative to the largest gradient."""
    with torch.enable_grad():
        gradients = []
        for _ in range(2):
            case.vae.zero_grad()
            case.vae(case.video).sample.sin().sum().backward()
            gradients.append([parameter.grad for parameter in case.vae.parameters()])
            case.vae.enable_gradient_checkpointing()
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    return max(off(one, other) for one, other in zip(*gradients, strict=True)) / largest


def float32(case: Case) -> float:
    """Relative to the largest latent."""
    return off(encoded(case.vae.float(), case.video.float()).double(), case.latents) / case.latents.abs().max().item()


def saved_and_loaded(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        case.vae.save_pretrained(folder)
        again = type(case.vae).from_pretrained(folder, torch_dtype=torch.float64).eval()
    weights = zip(case.vae.state_dict().values(), again.state_dict().values(), strict=True)
    equal = all(torch.equal(one, other) for one, other in weights)
    return off(encoded(again, case.video), case.latents) if equal else float("inf")


# The most that each may differ by.
PROPERTIES: dict[Callable[[Case], float | None], float] = {
    lengths: 0,
    encoded_as_a_stream: 1e-9,
    decoded_as_a_stream: 1e-9,
    samples_of_a_batch: 1e-9,
    slices_of_a_batch: 1e-9,
    a_later_group: 1e-12,
    tiles_that_hold_a_frame: 0,
    tiles_of_a_stream: 1e-9,
    the_definition: 1e-7,
    fused: 1e-7,
    fused_and_changed_in_place: 1e-7,
    gradients_with_checkpointing: 1e-9,
    float32: 1e-3,
    saved_and_loaded: 1e-12,
}


@torch.no_grad()
def run(seconds: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Counts of models and of what was tried; a fault names seed, configuration, property and difference."""
    counts: Counter[str] = Counter()
    faults = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number = seed * 1_000_000 + counts["models"]
        generator = np.random.default_rng(number)
        vae, config = model(generator)
        frames, size = int(generator.integers(1, 20)), vae.spatial_compression_ratio
        video = torch.rand(1, 3, frames, size * 2, size * 3, dtype=torch.float64) * 2 - 1
        latents = encoded(vae, video)
        cuts = np.sort(generator.integers(0, frames + 1, size=3)).tolist()
        decoded = vae.decode(latents, num_frames=frames).sample
        counts["models"] += 1
        for check, most in PROPERTIES.items():
            difference = check(Case(copy.deepcopy(vae), video, latents, decoded, cuts))
            if difference is None:
                continue
            counts["properties"] += 1
            if not difference <= most:
                faults.append(f"seed {number}, {config}, {frames} frames, cuts {cuts}: {check.__name__} {difference:.1e}")
    return dict(counts), faults


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
