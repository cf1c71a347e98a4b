"""Make a VC-VAE from an image VAE: FLUX.1's, Stable Diffusion's or any AutoencoderKL (Sec. 3.2, Eq. 3 and 4).

    python convert_flux_weights.py black-forest-labs/FLUX.1-schnell out/vcvae-flux
    python convert_flux_weights.py ae.safetensors out/vcvae-flux-8x8x8 --compression 8x8x8 --dtype bfloat16

SOURCE is a safetensors file (BFL's or diffusers' layout), a folder, or a hub id. The result reconstructs keyframes as the
image VAE does and broadcasts them over their groups: it is where training starts from. `AutoencoderKLVCVAE.from_pretrained`
loads OUT.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from vc_vae_diffusers import AutoencoderKLVCVAE, ImageVAE, inflate, read_image_vae
from vc_vae_diffusers.autoencoder.image_vae import InflationReport
from vc_vae_diffusers.publishing.hub import CardContent, save_for_hub

COMPRESSIONS = {"4x8x8": (False, True, True), "8x8x8": (True, True, True)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="safetensors file, folder or hub id of an image VAE")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--subfolder", help="of SOURCE, for example vae; by default the root and vae are looked at")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="4x8x8", help="8x8x8 doubles the latent channels")
    parser.add_argument("--operator", choices=("tdc", "conv"), default="tdc", help="conv: the baselines without differences")
    parser.add_argument("--causality", choices=("group", "causal"), default="group")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights that are written")
    parser.add_argument("--scaling-factor", type=float, help="of the latents, instead of what SOURCE says")
    parser.add_argument("--shift-factor", type=float, help="of the latents, instead of what SOURCE says")
    parser.add_argument("--token", help="hub token, for gated or private repositories such as FLUX.1-dev")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="such as fp16, part of the weights' file name in SOURCE")
    parser.add_argument("--licence", default="other", help="of the result, for its card: that of SOURCE's weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds")
    return parser.parse_args(argv)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse to touch what is there.

    Raises:
        ValueError: if OUT is a file, or holds files and `overwrite` is not set, or holds anything but a VC-VAE.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT is {out}, a file: pass the name of a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUT is {out}, which is not empty: pass another folder, or --overwrite to replace the model in it")
    config = out / "config.json"
    if not config.is_file() or "AutoencoderKLVCVAE" not in config.read_text():
        raise ValueError(f"OUT is {out}, which holds something else than a VC-VAE: --overwrite replaces models only")


def build(image_vae: ImageVAE, arguments: argparse.Namespace) -> tuple[AutoencoderKLVCVAE, InflationReport]:
    """The video VAE with the image VAE's weights."""
    config = image_vae.video_config()
    config["temporal_downsample"] = COMPRESSIONS[arguments.compression]
    config["temporal_operator"], config["temporal_causality"] = arguments.operator, arguments.causality
    if arguments.compression == "8x8x8":
        config["latent_channels"] *= 2  # Sec. 4.1: 32 channels for Flux's 16
    for name in ("scaling_factor", "shift_factor"):
        if getattr(arguments, name) is not None:
            config[name] = getattr(arguments, name)
    vae = AutoencoderKLVCVAE.from_config(config)
    report = inflate(vae, image_vae)
    # nn.Module's own `to`, for that of diffusers warns of modules to be kept in float32 even where there are none.
    nn.Module.to(vae, DTYPES[arguments.dtype])
    return vae.eval(), report


def card_content(arguments: argparse.Namespace, vae: AutoencoderKLVCVAE, assumptions: list[str]) -> CardContent:
    ratio = vae.temporal_compression_ratio
    source = Path(arguments.source).name if Path(arguments.source).exists() else arguments.source
    return CardContent(
        name=f"VC-VAE {arguments.compression}, inflated from {source}",
        summary=f"A video VAE that was made of the image VAE `{source}` and not trained since: the encoder keeps the last "
        f"frame of every {ratio}, the decoder repeats it. It is what training starts from, and a video VAE without motion.",
        licence=arguments.licence,
        training_data=f"None of its own. The image VAE was trained by its authors: see `{source}`, whose licence holds for "
        "these weights too.",
        training="None. The image VAE's kernels are the anchor slices of the temporal operators, every other slice is zero; "
        "temporal layers select and broadcast keyframes (center or tail initialisation, Eq. 3 and 4 of the VC-VAE paper)."
        + "".join(f" Assumed: {assumption}." for assumption in assumptions),
        limitations=f"Motion within a group of {ratio} frames is lost until the model is trained.",
        base_model=None if Path(arguments.source).exists() else arguments.source,
    )


def save_atomically(vae: AutoencoderKLVCVAE, out: Path, content: CardContent) -> None:
    """Write beside OUT and rename, so that OUT is whole or as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.parent / f".{out.name}.{kind}-{os.getpid()}" for kind in ("new", "old"))
    try:
        save_for_hub(vae, fresh, content, where=str(out))
        if out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def print_report(vae: AutoencoderKLVCVAE, image_vae: ImageVAE, report: InflationReport, out: Path) -> None:
    sizes = {name: parameter.numel() for name, parameter in vae.named_parameters()}

    def line(what: str, names: list[str], note: str) -> None:
        print(f"  {what:9} {len(names):4} tensors {sum(sizes[n] for n in names):12,} parameters  {note}")

    print(f"{image_vae.source}: {sum(t.numel() for t in image_vae.state.values()):,} parameters of an image VAE")
    line("inflated", report.inflated, "2-D kernels that became the anchors of temporal operators")
    line("copied", report.copied, "as they are")
    line("created", report.created, "to select and broadcast keyframes (Eq. 3, 4):")
    for name in report.created:
        print(f"            {name}")
    if report.widened:
        line("widened", report.widened, "of those inflated or copied, for more latent channels:")
        for name in report.widened:
            print(f"            {name}")
    print("  left         0 tensors: every weight of the image VAE has its place")
    for assumption in image_vae.assumptions:
        print(f"  assumed: {assumption}")
    config, space = vae.config, vae.spatial_compression_ratio
    print(
        f"{out}: {sum(sizes.values()):,} parameters, {vae.temporal_compression_ratio}x{space}x{space}, "
        f"{config.latent_channels} latent channels, scaling_factor {config.scaling_factor}, shift_factor "
        f"{config.shift_factor}, {str(vae.dtype).removeprefix('torch.')}"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    hub_options = {name: getattr(arguments, name) for name in ("token", "revision", "variant")}
    try:
        check_target(arguments.out, arguments.overwrite)
        given = {name: value for name, value in hub_options.items() if value is not None}
        image_vae = read_image_vae(arguments.source, subfolder=arguments.subfolder, **given)
        vae, report = build(image_vae, arguments)
        save_atomically(vae, arguments.out, card_content(arguments, vae, image_vae.assumptions))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(vae, image_vae, report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
