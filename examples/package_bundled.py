"""Turn trained weights into the folder that the package carries: float16, latent statistics, a model card with its results.

    python examples/package_bundled.py --model runs/tiny_stage1/vae --data CLIPS_FOLDER --trained "…" \
        [--results runs/eval/holdout-128.json ...] --out src/vc_vae_diffusers/models/vcvae-tiny
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.data import expand_patterns, find_files
from vc_vae_diffusers.hub import CardContent, MeasuredMetric, add_remote_code, read_json, write_json, write_model_card
from vc_vae_diffusers.latent_stats import measure_latents, write_statistics

CLIPS = Path(__file__).parent / "configs" / "tiny_clips.txt"
SUMMARY = (
    "A tiny VC-VAE (4x8x8, 16 latent channels) that comes with the package so that its commands, tests and demo work "
    "offline. It was trained on a CPU, on eight minutes of video, and is no measure of the method."
)
DATA = (
    "52 short clips from public repositories under MIT, Apache-2.0, BSD, CC0, CC-BY or Unlicense, listed in "
    "`examples/configs/tiny_clips.txt`; 7 more were held out. The clips themselves are not distributed. The footage may "
    "belong to third parties whatever the licence of its repository."
)
LIMITS = (
    "Blurry on fine texture, small text and fast motion; resolutions far from 64 to 256 pixels were not trained. Do not use "
    "it for products or comparisons: inflate a full image VAE and train that."
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained VC-VAE")
    parser.add_argument("--data", type=Path, required=True, help="folder of the clips, for the latent statistics")
    parser.add_argument("--trained", required=True, help="how it was trained, a paragraph for the card")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="result files of `vcvae evaluate`")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measured(path: Path) -> list[MeasuredMetric]:
    """The averages of a result file, one row a model and metric."""
    result = json.loads(path.read_text())
    protocol = result["protocol"]
    data = f"{result['samples']['count']} held-out clips, {protocol['num_frames']} frames, {protocol['size']} px"
    names = {
        "psnr": ("PSNR", "dB"),
        "ssim": ("SSIM", ""),
        "lpips_alex": ("LPIPS (alex)", ""),
        "lpips_vgg": ("LPIPS (vgg)", ""),
    }
    return [
        MeasuredMetric(
            f"{name}, {entry['label']}", round(entry["metrics"][key]["value"], 4), data, path.name, entry["date"][:10], unit
        )
        for entry in result["models"]
        for key, (name, unit) in names.items()
        if key in entry["metrics"]
    ]


def main() -> None:
    args = parse_args()
    fresh = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    vae = AutoencoderKLVCVAE.from_pretrained(args.model)
    vae.half().save_pretrained(fresh)
    clips = find_files(args.data, expand_patterns([f"@{CLIPS}:train"], Path()))
    half = AutoencoderKLVCVAE.from_pretrained(fresh, torch_dtype=torch.float32).eval()
    write_statistics(fresh, measure_latents(half, clips, num_frames=16, size=128))
    config = read_json(fresh / "config.json")
    config.pop("_name_or_path", None)  # a folder of this machine
    write_json(fresh / "config.json", config)
    add_remote_code(fresh)
    metrics = [row for path in args.results for row in measured(path)]
    content = CardContent(
        name="VC-VAE tiny",
        summary=SUMMARY,
        licence="apache-2.0",
        training_data=DATA,
        training=args.trained,
        limitations=LIMITS,
        metrics=metrics,
    )
    write_model_card(fresh, content, where="src/vc_vae_diffusers/models/vcvae-tiny")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(fresh, args.out)


if __name__ == "__main__":
    main()
