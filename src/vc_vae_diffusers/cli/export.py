"""`vcvae export`: the model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .models import load_model, model_name
from .options import JsonOption, OverwriteOption, SubfolderOption, make_folder
from .printing import emit, files_table, say


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='Folder or hub id; "bundled" for the bundled one.')],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the programs and their description.")],
    kind: Annotated[str, typer.Option("--format", help="onnx, or torch for archives of torch.export.")] = "onnx",
    subfolder: SubfolderOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model as four programs for other runtimes: the first group of a stream and the next, both ways."""
    if kind not in ("onnx", "torch"):
        raise ValueError(f"--format: {kind!r} is neither onnx nor torch.")
    if out.is_file():
        raise ValueError(f"OUT: {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"OUT: {out} is not empty; pass --overwrite to replace the programs in it, or another folder.")
    make_folder(out / "x")
    vae = load_model(model, subfolder, "cpu", "float32")
    from ..exporting.programs import DESCRIPTION, export_model

    made = export_model(vae, out, kind, progress=lambda program: say(f"{program} …"))  # type: ignore[arg-type]
    result = {"command": "export", "model": model_name(model, subfolder), "output": str(out), **made}
    files = {program: out / facts["file"] for program, facts in made["programs"].items()}
    worst = max(facts["difference"] for facts in made["programs"].values())
    emit(result, as_json, files_table(files | {"description": out / DESCRIPTION}), f"at most {worst:.1e} off the model")
