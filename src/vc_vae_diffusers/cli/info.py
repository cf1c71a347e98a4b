"""`vcvae info`: what a checkpoint is, read from its configuration and the heads of its weight files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..names import asked_of_hub
from .models import check_model, model_name, read_config
from .options import JsonOption, SubfolderOption
from .printing import emit, format_bytes

_BYTES = {"float32": 4, "bfloat16": 2}


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or hub id; by default the bundled one.")
    ] = None,
    subfolder: SubfolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is: its card's first lines, configuration, parameters, compression and memory."""
    folder = _local_folder(check_model(model, subfolder), subfolder)
    result = {"command": "info", "model": model_name(model, subfolder), **describe(folder)}
    emit(result, as_json, *_tables(result))


def _local_folder(place: str, subfolder: str | None) -> Path:
    """The folder, or that of the hub's cache, downloaded if need be."""
    if Path(place).is_dir():
        return Path(place, subfolder or "")
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    patterns = [f"{inside}{name}" for name in ("config.json", "README.md", "*.safetensors")]
    with asked_of_hub("--model", place):
        return Path(snapshot_download(place, allow_patterns=patterns), subfolder or "")


def describe(folder: Path) -> dict[str, Any]:
    """Facts about a model's folder, ready for JSON.

    Raises:
        ValueError: if it holds no VC-VAE, or weights that cannot be read.
    """
    config = {key: value for key, value in read_config(folder).items() if not key.startswith("_")}
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"--model: {folder} has no .safetensors weights; save the model there again.")
    sizes = {name: size for path in weights for name, size in _tensor_sizes(path).items()}  # variants have the same names
    counts = {
        "total": sum(sizes.values()),
        **{half: sum(size for name, size in sizes.items() if name.startswith(half)) for half in ("encoder", "decoder")},
    }
    try:
        r_t, r_s = 2 ** sum(config["temporal_downsample"]), 2 ** (len(config["block_out_channels"]) - 1)
        values = config["in_channels"] * r_t * r_s**2 / config["latent_channels"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"--model: {folder / 'config.json'} is incomplete ({error!r}); save the model again.") from error
    return {
        "path": str(folder),
        "card": _card(folder / "README.md"),
        "parameters": counts,
        "compression": {
            "temporal": r_t,
            "spatial": r_s,
            "latent_channels": config["latent_channels"],
            "values_per_latent": round(values, 3),
        },
        "bytes_in_memory": {name: counts["total"] * size for name, size in _BYTES.items()},
        "bytes_on_disk": sum(path.stat().st_size for path in weights),
        "config": config,
    }


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Elements of every tensor in a safetensors file, from its head alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its head is longer than the file")
            entries = json.loads(file.read(length))
        return {name: math.prod(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--model: {path} is no readable safetensors file ({error}); download it again.") from error


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
