"""`vcvae info`: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from vc_vae_diffusers import AutoencoderKLVCVAE

from .shared import JsonOption, SubfolderOption, emit, format_bytes, load_model, locate_model, model_name


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id; by default the bundled one.")
    ] = None,
    subfolder: SubfolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is: its card's first lines, configuration, parameters, compression and memory."""
    place = locate_model(model, subfolder)
    vae = load_model(model, subfolder, device="cpu", dtype="float32")
    result = {"command": "info", "model": model_name(model, subfolder), **describe(vae, Path(place), subfolder)}
    emit(result, as_json, *_tables(result))


def describe(vae: AutoencoderKLVCVAE, place: Path, subfolder: str | None) -> dict[str, Any]:
    """Facts about a loaded model and, where it is local, its folder; ready for JSON."""
    counts = {
        "total": sum(p.numel() for p in vae.parameters()),
        "encoder": sum(p.numel() for p in vae.encoder.parameters()),
        "decoder": sum(p.numel() for p in vae.decoder.parameters()),
    }
    folder = place / subfolder if subfolder else place
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    r_t, r_s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    return {
        "path": str(folder) if folder.is_dir() else None,
        "card": _card(folder / "README.md"),
        "parameters": counts,
        "compression": {
            "temporal": r_t,
            "spatial": r_s,
            "latent_channels": vae.config.latent_channels,
            "values_per_latent": round(vae.config.in_channels * r_t * r_s**2 / vae.config.latent_channels, 3),
        },
        "bytes_in_memory": {
            name: counts["total"] * dtype.itemsize
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        "bytes_on_disk": sum(path.stat().st_size for path in weights) if weights else None,
        "config": config,
    }


def _card(path: Path) -> str | None:
    """Heading and first paragraph of a model card, below its YAML block."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n") and "\n---" in text[4:]:
        text = text[4:].split("\n---", 1)[1]
    blocks = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
    return "\n".join(block.lstrip("# ") for block in blocks[:2]) or None


def _tables(result: dict[str, Any]) -> list[Table]:
    parameters, compression, memory = result["parameters"], result["compression"], result["bytes_in_memory"]
    facts = Table(show_header=False)
    facts.add_row("model", result["model"])
    if result["card"]:
        facts.add_row("what it is", result["card"])
    if result["path"]:
        facts.add_row("where", result["path"])
    facts.add_row(
        "parameters",
        f"{parameters['total']:,} (encoder {parameters['encoder']:,}, decoder {parameters['decoder']:,})",
    )
    facts.add_row(
        "compression",
        f"{compression['temporal']}x{compression['spatial']}x{compression['spatial']}, {compression['latent_channels']} "
        f"latent channels: {compression['values_per_latent']:g} values become one",
    )
    facts.add_row("weights in memory", ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items()))
    if result["bytes_on_disk"] is not None:
        facts.add_row("weights on disk", format_bytes(result["bytes_on_disk"]))
    config = Table(title="Configuration", title_justify="left", show_header=False)
    for key, value in result["config"].items():
        config.add_row(key, _short(value))
    return [facts, config]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, float) for v in value):
        values = [f"{v:.4g}" for v in value]
        return f"{values[0]} (all {len(values)})" if len(set(values)) == 1 else ", ".join(values)
    return str(value)
