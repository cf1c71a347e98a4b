"""`vcvae report`: the paper's tables and figures from results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..report.paper import TABLES
from .options import JsonOption, OverwriteOption, check_output, make_folder
from .printing import emit


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT", exists=True, dir_okay=False, help="Result files of `vcvae evaluate`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, tables (.md, .tex, .csv) and figures (.png).")] = Path(
        "report"
    ),
    paper: Annotated[
        list[str] | None,
        typer.Option(
            help="Show these tables of the paper too: " + ", ".join(TABLES) + ".", autocompletion=lambda: list(TABLES)
        ),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="LEFT,TOP,SIDE of the zoomed square; else where models differ most.")
    ] = None,
    strip_frames: Annotated[int, typer.Option(min=1, help="Frames in a strip.")] = 4,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Reconstruction by video autoencoders",
    note: Annotated[list[str] | None, typer.Option(help="A paragraph at the top of the page, any number of times.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn results into the paper's tables and figures, with the paper's own numbers marked as reported."""
    square = _parse_crop(crop)
    if unknown := [key for key in paper or [] if key not in TABLES]:
        raise ValueError(f"--paper: {', '.join(unknown)} is unknown; choose among {', '.join(TABLES)}.")
    check_output(out / "index.html", overwrite, "--out")
    make_folder(out / "index.html", "--out")

    from ..report.figures import Crop
    from ..report.writer import write_report

    page = write_report(
        results,
        out,
        paper=paper or [],
        crop=None if square is None else Crop(*square),
        strip_frames=strip_frames,
        title=title,
        notes=note or [],
        command=_command_line(),
    )
    files = sorted(path.name for path in out.iterdir())
    emit({"command": "report", "page": str(page), "files": files}, as_json, f"Wrote {page}")


def _parse_crop(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        left, top, side = (int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not LEFT,TOP,SIDE in pixels", param_hint="--crop") from error
    if min(left, top) < 0 or side < 1:
        raise typer.BadParameter(f"{text!r} must not be negative, and the side at least 1", param_hint="--crop")
    return left, top, side


def _command_line() -> str:
    """The command, with the notes shortened: the page has them in full."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join("…" if before == "--note" else word for before, word in zip(["", *words], words, strict=False))
