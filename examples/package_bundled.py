"""Turn trained weights into the folder that the package carries: float16, latent statistics, a model card with its results.

    python examples/package_bundled.py --model runs/bundled/stage1/vae --data CLIPS_FOLDER --trained FILE.md \
        [--results runs/bundled/eval/holdout-128.json ...] [--logs "Stage I=runs/bundled/stage1/log.jsonl" ...] \
        --out src/vc_vae_diffusers/models/vcvae-tiny

Results become the card's numbers, those of the model labelled SHIPPED, and tables that put it beside the other models; logs
become a picture of the training loss and of the PSNR on held-out clips, one column a run.
"""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.extras import install_hint
from vc_vae_diffusers.files import write_whole
from vc_vae_diffusers.publishing.hub import (
    BUNDLED_USAGE,
    CardContent,
    MeasuredMetric,
    add_remote_code,
    read_json,
    write_json,
    write_model_card,
)
from vc_vae_diffusers.publishing.picture import draw_reconstruction
from vc_vae_diffusers.training.data import expand_patterns, find_files
from vc_vae_diffusers.training.latent_stats import measure_latents, write_statistics

CLIPS = Path(__file__).parent / "configs" / "tiny_clips.txt"
SUMMARY = (
    "A tiny VC-VAE (4x8x8, 16 latent channels) that comes with the package so that its commands, tests and demo work "
    "offline. It was trained for five minutes on one GPU, on four minutes of video, and is no measure of the method."
)
DATA = (
    "52 short clips from public repositories under MIT, Apache-2.0, BSD, CC0, CC-BY or Unlicense, listed in "
    "`examples/configs/tiny_clips.txt`; 7 more were held out. The clips themselves are not distributed. The footage may "
    "belong to third parties whatever the licence of its repository."
)
SHIPPED = "VC-VAE (bundled)"
CURVES = "loss_curves.png"
MAX_CURVES_BYTES = 80_000  # the picture lies in the installed package
METRICS = {
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "lpips_alex": ("LPIPS (alex)", ""),
    "lpips_vgg": ("LPIPS (vgg)", ""),
}
LIMITS = (
    "Fast motion blurs: four frames share the latents that an image VAE spends on one. Small text and fine texture soften. "
    "Trained on few clips, at 128 to 288 pixels on the short side. Do not use it for products or comparisons: inflate a "
    "full image VAE and train that."
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained VC-VAE")
    parser.add_argument("--data", type=Path, required=True, help="folder of the clips, for the latent statistics")
    parser.add_argument("--trained", type=Path, required=True, help="how it was trained: Markdown for the card")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="result files of `vcvae evaluate`")
    parser.add_argument("--logs", nargs="*", default=[], metavar="NAME=FILE", help="log.jsonl of each run, in order")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------ results


def data_of(result: dict) -> str:
    """What a result file was measured on."""
    protocol = result["protocol"]
    return f"{result['samples']['count']} held-out clips, {protocol['num_frames']} frames, {protocol['size']} px"


def measured(path: Path) -> list[MeasuredMetric]:
    """The averages of the shipped model in a result file.

    Raises:
        ValueError: if the file has no model of that label.
    """
    result = json.loads(path.read_text())
    shipped = [entry for entry in result["models"] if entry["label"] == SHIPPED]
    if not shipped:
        labels = [entry["label"] for entry in result["models"]]
        raise ValueError(f"{path} has results of {labels}, none of {SHIPPED!r}; make it with examples/evaluate_bundled.sh")
    metrics, date = shipped[0]["metrics"], shipped[0]["date"][:10]
    return [
        MeasuredMetric(name, round(metrics[key]["value"], 4), data_of(result), "examples/evaluate_bundled.sh", date, unit)
        for key, (name, unit) in METRICS.items()
        if key in metrics
    ]


def comparison(path: Path) -> str:
    """All models of a result file as a Markdown table, one line a model, in the file's order."""
    result = json.loads(path.read_text())
    columns = {key: name for key, name in METRICS.items() if all(key in entry["metrics"] for entry in result["models"])}
    titles = [data_of(result), *(f"{name} {unit}".strip() for name, unit in columns.values())]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * len(columns)]
    for entry in result["models"]:
        values = [f"{entry['metrics'][key]['value']:.{2 if key == 'psnr' else 4}f}" for key in columns]
        lines.append(f"| {entry['label']} | {' | '.join(values)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- curves


def read_log(path: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Steps with training loss (of an image VAE its L1) and steps with PSNR on held-out clips, of a `log.jsonl`.

    Raises:
        ValueError: if the log has no training loss.
    """
    losses, qualities = {}, {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "loss" in row or "l1" in row:
            losses[row["step"]] = row.get("loss", row.get("l1"))
        # train_image_vae.py calls the validation's PSNR psnr, train_vcvae.py calls so that of the training clips.
        quality = row.get("validation_psnr") if "validation_psnr" in row or "loss" in row else row.get("psnr")
        quality = row.get("psnr_128", quality)  # train_bundled_gpu.py
        if quality is not None:
            qualities[row["step"]] = quality
    if not losses:
        raise ValueError(f"{path} has no row with loss or l1; pass the log.jsonl of a training run")
    return sorted(losses.items()), sorted(qualities.items())


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean over the last `window` values, fewer at the start."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def draw_curves(logs: dict[str, Path]) -> bytes:
    """A PNG with a column for each run: training loss, faint and smoothed, above the PSNR on held-out clips.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the picture is too large for the package.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--logs needs matplotlib: {install_hint('eval')}") from error
    figure = Figure(figsize=(2.9 * len(logs), 4.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(logs), squeeze=False)
    for column, (name, path) in enumerate(logs.items()):
        losses, qualities = read_log(path)
        steps, values = zip(*losses, strict=True)
        above, below = axes[:, column]
        above.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.7)
        above.plot(steps, smoothed(list(values), max(1, len(values) // 10)), color="tab:blue")
        above.set_title(name, fontsize=10)
        if qualities:
            below.plot(*zip(*qualities, strict=True), "o-", color="tab:orange", markersize=3)
        below.set_xlim(above.get_xlim())
        below.set_xlabel("step")
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("PSNR on held-out clips, dB")
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(packed, format="PNG", optimize=True)
    if packed.tell() > MAX_CURVES_BYTES:
        raise ValueError(f"{CURVES} has {packed.tell():,} bytes, more than {MAX_CURVES_BYTES:,}; pass fewer --logs")
    return packed.getvalue()


def parse_logs(pairs: list[str]) -> dict[str, Path]:
    """Read `NAME=FILE`.

    Raises:
        ValueError: if one has no name, or names no file.
    """
    logs = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if not name or not Path(file).is_file():
            raise ValueError(f"--logs {pair!r} is not NAME=FILE with a file that is there, as in 'Stage I=runs/x/log.jsonl'")
        logs[name] = Path(file)
    return logs


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # What can fail soon comes first: measuring the latents takes minutes.
    logs = parse_logs(args.logs)
    curves = draw_curves(logs) if logs else None
    metrics = [row for path in args.results for row in measured(path)]
    beside = "\n\n".join(comparison(path) for path in args.results)
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
    add_remote_code(fresh, carry=False)  # it is part of the package
    training = args.trained.read_text().strip()
    if curves is not None:
        write_whole(fresh / CURVES, curves)
        training += f"\n\n![Training loss and PSNR on held-out clips]({CURVES})"
    content = CardContent(
        name="VC-VAE tiny",
        summary=SUMMARY,
        licence="apache-2.0",
        training_data=DATA,
        training=training,
        limitations=LIMITS,
        metrics=metrics,
        comparison=beside,
    )
    write_model_card(fresh, content, use=BUNDLED_USAGE, caption=draw_reconstruction(half, fresh))
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(fresh, args.out)


if __name__ == "__main__":
    main()
