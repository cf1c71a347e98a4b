"""Pictures of what a trained model does: one command each.

    python examples/ablations/pictures.py components --model MODEL --out DIR    Fig. 5: the terms of TDC at three depths
    python examples/ablations/pictures.py strip --model MODEL --out DIR         Fig. 1, 2: keyframes, residuals, their sum
    python examples/ablations/pictures.py codec --model MODEL --data DIR --out DIR    bits and PSNR beside x264

MODEL is a VC-VAE folder or hub id, by default the bundled one, or OUT:ARM:SEED for a run of run.py. `--clip FILE` shows
another clip than the made one: a photograph that stands still, and a piece of another that crosses it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import av
import matplotlib
import numpy as np
import torch
from arms import ARMS, build, reconstruct
from schedule import sweep
from settings import load_settings
from training_runs import Average, Place

from vc_vae_diffusers import AutoencoderKLVCVAE, GroupCausalTDC, TemporalInteractionTDC, bundled_model_path
from vc_vae_diffusers.metrics import frame
from vc_vae_diffusers.report.visualize import tdc_components, tdc_layers
from vc_vae_diffusers.video import VideoWriter, from_uint8, read_clip, resize_and_crop

matplotlib.use("Agg")

RANGE = (-1.0, 1.0)
FRAMES = 16
_MOVING = 0.02  # a pixel moves where frames differ by more than this part of the range


def load_model(source: str | None, scale: str) -> AutoencoderKLVCVAE:
    """A folder or hub id, the bundled model, or `OUT:ARM:SEED`: the averaged weights of a run at its best rate."""
    if source is None or source.count(":") != 2:
        return AutoencoderKLVCVAE.from_pretrained(source or bundled_model_path()).eval()
    out, arm, seed = source.split(":")
    place = Place(Path(), Path(out), load_settings(scale), torch.device("cpu"))
    rate = sweep(place, arm)[1]
    if rate is None:
        raise ValueError(f"model is {source!r}, but the sweep of {arm} is not finished: run run.py first")
    needed = ARMS[arm].image_vae
    model = build(ARMS[arm], place.settings, needed and place.image_vae(needed, int(seed)), int(seed))
    saved = torch.load(place.work / f"{arm}-s{seed}-r{rate:.3g}" / "state.pt", weights_only=True, map_location="cpu")
    average = Average(model, place.settings.training.ema_decay)
    average.load_state_dict(saved["average"])
    average.swap(model)
    return model.eval()


def made_clip(size: int) -> torch.Tensor:
    """`(1, 3, 16, size, size)`: scikit-image's coffee cup (CC0) stands still, a disc of its astronaut (NASA) crosses it."""
    from skimage import data

    ground, figure = (
        from_uint8(torch.from_numpy(picture.copy()).permute(2, 0, 1)) for picture in (data.coffee(), data.astronaut())
    )
    ground = resize_and_crop(ground, size, size)
    radius = size // 6
    figure = resize_and_crop(figure[:, :256, 96:352], 2 * radius, 2 * radius)
    y, x = torch.meshgrid(*(torch.arange(2 * radius) - radius + 0.5,) * 2, indexing="ij")
    disc = (x**2 + y**2 < radius**2).float()
    frames = []
    for number in range(FRAMES):
        left, top = round(size * (0.05 + 0.55 * number / (FRAMES - 1))), round(size * 0.2)
        picture = ground.clone()
        place = picture[:, top : top + 2 * radius, left : left + 2 * radius]
        place.copy_(disc * figure + (1 - disc) * place)
        frames.append(picture)
    return torch.stack(frames, dim=1)[None].clamp(*RANGE)


def moving(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where something moves, `(T, height, width)` from a clip `(1, 3, T, H, W)`: frame differences, spread to cells."""
    step = video[0].diff(dim=1).abs().amax(0) / 2 > _MOVING  # (T - 1, H, W)
    none = torch.zeros_like(step[:1])
    near = (torch.cat([none, step]) | torch.cat([step, none])).float()[:, None]
    return torch.nn.functional.adaptive_max_pool2d(near, (height, width))[:, 0] > 0


# Fig. 5 ---------------------------------------------------------------------------------------------------------------


def components(model: AutoencoderKLVCVAE, video: torch.Tensor, out: Path) -> dict:
    """The terms of Eq. 5 of layers at three depths, with their energy where the clip moves and where it stands still."""
    import matplotlib.pyplot as plt

    names = tdc_layers(model)
    chosen = [name for name in names if name.endswith("conv1")]
    chosen = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
    shown = FRAMES // 2 + 1
    figure, axes = plt.subplots(len(chosen), 5, figsize=(11, 2.4 * len(chosen)), constrained_layout=True)
    rows = []
    for row, name in enumerate(chosen):
        found = tdc_components(model, video, name)
        maps = found.maps
        frames, height, width = maps["anchor"].shape
        stride = video.shape[2] // frames
        mask = moving(video[:, :, stride - 1 :: stride], height, width)
        motion = maps["past"].square() + maps["future"].square()
        ratio = (
            (motion[mask].mean() / motion[~mask].mean().clamp(min=1e-20)).item()
            if mask.any() and (~mask).any()
            else math.nan
        )
        rows.append({"layer": name, "motion_share": found.motion_share(), "energy_moving_over_still": ratio})
        index = min(shown // stride, frames - 1)
        pictures = [video[0, :, min(shown, FRAMES - 1)].permute(1, 2, 0) / 2 + 0.5]
        pictures += [maps[term][index] for term in ("anchor", "past", "future", "output")]
        for column, (picture, title) in enumerate(
            zip(pictures, ("frame", "anchor", "past", "future", "output"), strict=True)
        ):
            axes[row, column].imshow(picture.numpy(), cmap="inferno", vmin=0)
            axes[row, column].set(xticks=[], yticks=[], title=title if row == 0 else "")
        axes[row, 0].set_ylabel(f"{name}\nmoving / still {ratio:.0f}", fontsize=7)
    figure.savefig(out / "components.png", dpi=80)
    plt.close(figure)
    return {"layers": rows}


# Fig. 1, 2 ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def without_differences(model: AutoencoderKLVCVAE) -> Callable[[], None]:
    """Set every slice of differences to zero, and return what puts them back: the anchor's path alone is left."""
    kept = []
    for layer in model.modules():
        if isinstance(layer, GroupCausalTDC | TemporalInteractionTDC):
            kept.append((layer, layer.weight.detach().clone()))
            for k in set(range(len(layer.slices))) - {layer.anchor}:
                layer.weight[:, :, k] = 0

    def restore() -> None:
        with torch.no_grad():
            for layer, weight in kept:
                layer.weight.copy_(weight)

    return restore


@torch.no_grad()
def strip(model: AutoencoderKLVCVAE, video: torch.Tensor, out: Path) -> dict:
    """Source, the keyframes' path alone, what the differences add, and their sum; eight frames of a clip."""
    import matplotlib.pyplot as plt

    whole = reconstruct(model, video, None)[0].clamp(*RANGE)
    restore = without_differences(model)
    anchors = reconstruct(model, video, None)[0].clamp(*RANGE)
    restore()
    residual = whole - anchors
    scale = residual.abs().amax().item()
    rows = {"source": video, "anchors alone": anchors, f"differences (x{1 / scale:.1f})": residual / scale, "sum": whole}
    figure, axes = plt.subplots(len(rows), 8, figsize=(12, 6.2), constrained_layout=True)
    for row, (name, clip) in enumerate(rows.items()):
        for column in range(8):
            axes[row, column].imshow((clip[0, :, 4 + column].permute(1, 2, 0) / 2 + 0.5).numpy())
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name)
    figure.savefig(out / "strip.png", dpi=80)
    plt.close(figure)
    values = {"anchors alone": anchors, "sum": whole}
    return {f"psnr of {name}": frame.psnr(clip, video, data_range=RANGE).mean().item() for name, clip in values.items()}


# A codec's view -------------------------------------------------------------------------------------------------------


def entropy_bits(symbols: torch.Tensor) -> float:
    """Bits of an ideal order-0 code of integers `(C, ...)`, a table a channel; the tables themselves are not counted."""
    bits = 0.0
    for channel in symbols.flatten(1):
        counts = torch.unique(channel, return_counts=True)[1].double()
        bits -= (counts * torch.log2(counts / counts.sum())).sum().item()
    return bits


@torch.no_grad()
def latent_points(model: AutoencoderKLVCVAE, video: torch.Tensor, steps: list[float]) -> list[tuple[float, float]]:
    """(bits a pixel, PSNR) for quantised latents at each step size."""
    latents = model.encode(video).latent_dist.mode()
    pixels = video.shape[2] * video.shape[3] * video.shape[4]
    points = []
    for step in steps:
        symbols = torch.round(latents / step)
        made = model.decode(symbols * step, num_frames=video.shape[2]).sample.clamp(*RANGE)
        points.append((entropy_bits(symbols[0]) / pixels, frame.psnr(made, video, data_range=RANGE).mean().item()))
    return points


def x264_points(video: torch.Tensor, rates: list[int], folder: Path) -> list[tuple[float, float]]:
    """(bits a pixel, PSNR) of x264 (slow, yuv420p), its packets counted and not the container."""
    points = []
    for rate in rates:
        path = folder / "x264.mp4"
        with VideoWriter(path, 24, crf=rate, preset="slow", threads=1) as writer:
            writer.write(video)
        with av.open(str(path)) as container:
            size = sum(packet.size for packet in container.demux(video=0))
        made = read_clip(path, num_frames=video.shape[2])[None]
        path.unlink()
        points.append((8 * size / video[0, 0].numel(), frame.psnr(made, video, data_range=RANGE).mean().item()))
    return points


def bits_at(points: list[tuple[float, float]], psnr: float) -> float:
    """Bits a pixel at a PSNR, interpolated in the logarithm; nan outside of the points."""
    ordered = sorted(points, key=lambda point: point[1])
    levels, bits = [point[1] for point in ordered], [math.log(point[0]) for point in ordered]
    return math.exp(np.interp(psnr, levels, bits)) if levels[0] <= psnr <= levels[-1] else math.nan


def codec(model: AutoencoderKLVCVAE, data: Path, out: Path, size: int, most: int) -> dict:
    """Static, slow and fast clips: entropy of quantised latents and PSNR, beside x264 at equal PSNR.

    An honest reference, not a contest: latents here are quantised without training for it and coded without context.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    clips = []
    for path in sorted(data.glob("*.mp4")):
        clip = read_clip(path, num_frames=FRAMES, resize=size, crop=size)[None]
        clips.append((clip.diff(dim=2).square().mean().sqrt().item(), clip))
    clips.sort(key=lambda pair: pair[0])
    count = min(most, max(1, len(clips) // 3))
    kinds = {"slow": [clip for _, clip in clips[:count]], "fast": [clip for _, clip in clips[-count:]]}
    kinds = {"static": [clip[:, :, :1].expand_as(clip).contiguous() for clip in kinds["slow"]]} | kinds
    steps, rates = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2], [8, 14, 20, 26, 32, 38, 44, 50]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True, sharey=True)
    found = {}
    for axis, (kind, group) in zip(axes, kinds.items(), strict=True):
        ours = np.mean([latent_points(model, clip, steps) for clip in group], axis=0)
        theirs = np.mean([x264_points(clip, rates, out) for clip in group], axis=0)
        axis.plot(*ours.T, marker="o", label="latents, ideal order-0 code")
        axis.plot(*theirs.T, marker=".", label="x264 slow")
        axis.set(xscale="log", xlabel="bits a pixel", title=f"{kind} ({len(group)} clips)")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        points = [(float(b), float(p)) for b, p in theirs]
        found[kind] = [
            {"step": step, "bits": float(b), "psnr": float(p), "x264_bits": bits_at(points, float(p))}
            for step, (b, p) in zip(steps, ours, strict=True)
        ]
    axes[0].set_ylabel("PSNR, dB")
    axes[0].legend()
    figure.savefig(out / "codec.png", dpi=80)
    plt.close(figure)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["components", "strip", "codec"])
    parser.add_argument("--model", default=None)
    parser.add_argument("--scale", default="small", help="of OUT:ARM:SEED")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clip", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder of clips, for codec")
    parser.add_argument("--clips", type=int, default=8, help="of each kind, for codec: those that move least and most")
    parser.add_argument("--size", type=int, default=128, help="of the clip, pixels")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, args.scale)
    if args.picture == "codec":
        if args.data is None:
            parser.error("codec needs --data, a folder of clips")
        found = codec(model, args.data, args.out, args.size, args.clips)
    else:
        clip = (
            made_clip(args.size)
            if args.clip is None
            else read_clip(args.clip, num_frames=FRAMES, resize=args.size, crop=args.size)[None]
        )
        found = {"components": components, "strip": strip}[args.picture](model, clip, args.out)
    (args.out / f"{args.picture}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
