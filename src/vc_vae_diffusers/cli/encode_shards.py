"""`vcvae encode --shards`: the latents of a whole collection, on as many processes as a launcher gives."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..coding import latent_shards
from ..coding.latents import encode_file
from ..processes import processes
from ..training.data import find_files
from .inputs import open_input
from .models import load_model, model_name
from .printing import emit, facts_table, say

_SHOWN = 20  # unreadable samples that are listed


def encode_collection(
    sources: list[Path],
    out: Path,
    per_shard: int,
    model: str | None,
    subfolder: str | None,
    part: dict[str, Any],
    work: dict[str, Any],
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Write the shards of a collection into the folder `out`. To be called by every process of a launcher.

    Args:
        sources: one folder or list, or tar files.
        per_shard: samples of a shard.
        part: of every video, options of `open_input`.
        work: device, dtype and so on of the model.
        how: `storage`, `sample`, `seed`, and `overwrite`, which starts anew.

    Raises:
        ValueError: naming IN or OUT.
    """
    samples = _samples(sources)
    if out.suffix:
        raise ValueError(f"OUT: {out} looks like a file; shards go into a folder.")
    shards = latent_shards.shards_of(samples, per_shard)
    process = processes(None if work["device"] == "auto" else work["device"])
    if process.is_main_process:
        if how.pop("overwrite") and out.is_dir():
            for path in [*out.glob("*.tar"), out / latent_shards.SETTINGS_NAME, out / latent_shards.INDEX_NAME]:
                path.unlink(missing_ok=True)
        digest = hashlib.sha256("\n".join(sample.name for sample in samples).encode()).hexdigest()[:16]
        settings = {"model": model_name(model, subfolder), "dtype": work["dtype"], "samples": digest, "per_shard": per_shard}
        latent_shards.claim(out, settings | part | how)
    process.wait_for_everyone()
    device = str(process.device) if work["device"] == "auto" else work["device"]
    vae = load_model(model, subfolder, **{**work, "device": device})
    origin = {"model": model_name(model, subfolder), "subfolder": ""}

    def encode(source: Path, file: Path) -> dict[str, Any]:
        generator = torch.Generator(vae.device).manual_seed(how["seed"]) if how["sample"] else None
        with open_input(source, work["groups_per_chunk"], **part) as reader:
            facts = encode_file(vae, reader, file, origin, generator, how["seed"], storage=how["storage"])
        return {name: value for name, value in facts.items() if name not in ("input", "output")}

    mine = shards[process.process_index :: process.num_processes]
    with _progress(process) as bar:
        task = bar.add_task("encode", total=sum(len(shard.samples) for shard in mine))
        for shard in mine:
            latent_shards.write_shard(shard, out, encode, lambda sample: bar.advance(task))
    process.wait_for_everyone()
    if process.is_main_process:
        _tell(latent_shards.write_index(out, shards), out, as_json)


def _samples(sources: list[Path]) -> list[latent_shards.Sample]:
    """The samples of a collection as it was typed."""
    tars = [Path(name) for source in sources for name in (sorted(glob.glob(os.fspath(source))) or [os.fspath(source)])]
    if all(path.suffix == ".tar" for path in tars):
        missing = [path for path in tars if not path.is_file()]
        if missing:
            raise ValueError(f"IN: {missing[0]} does not exist; check the path.")
        samples = [sample for path in tars for sample in latent_shards.samples_of_tar(path)]
    elif len(sources) == 1:
        root = sources[0] if sources[0].is_dir() else sources[0].parent
        samples = latent_shards.samples_of_files(find_files(str(sources[0])), root)
    else:
        raise ValueError(f"IN: {len(sources)} files; with --shards pass one folder or list, or tar shards.")
    if not samples:
        raise ValueError(f"IN: {sources[0]} holds no videos and no images; check the path.")
    return samples


def _progress(process: Any) -> Progress:
    """One line, of the main process, for its share."""
    share = f"process 1 of {process.num_processes}" if process.num_processes > 1 else "samples"
    columns = (TextColumn(share), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not process.is_main_process)


def _tell(index: dict[str, Any], out: Path, as_json: bool) -> None:
    unreadable = index["unreadable"]
    for name, error in list(unreadable.items())[:_SHOWN]:
        say(f"unreadable: {name}: {error}", "yellow")
    if len(unreadable) > _SHOWN:
        say(f"and {len(unreadable) - _SHOWN} more, see {out / latent_shards.INDEX_NAME}", "yellow")
    facts = {"samples": index["samples"], "shards": len(index["shards"]), "unreadable": len(unreadable), "in": str(out)}
    emit({"command": "encode", **index, "output": str(out)}, as_json, facts_table(facts))
    if index["samples"] == 0:
        raise typer.Exit(1)
