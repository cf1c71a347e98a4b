"""What commands print: results on stdout, as tables or with `--json` as one object; progress and warnings on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class _FramesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- frames/s" if speed is None else f"{speed:.1f} frames/s", style="progress.data.speed")


@contextmanager
def frame_progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Bar, frames done, frames/s and time left, on stderr; gives what is to be called with frames done and in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _FramesPerSecond(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(line: str, style: str | None = None) -> None:
    """A line for people, on stderr."""
    Console(stderr=True).print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(line: str) -> None:
    """A warning, on stderr."""
    say(f"Warning: {line}", "yellow")


def emit(result: dict[str, Any], as_json: bool, *parts: Table | str) -> None:
    """The result on stdout: JSON for machines, tables and lines for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    console = Console()
    for part in parts:
        for column in part.columns if isinstance(part, Table) else ():
            column.overflow = "fold"  # a path that ends in … is no path
        console.print(part, highlight=False)


def files_table(files: dict[str, Path]) -> Table:
    """Where the files are, and how large."""
    table = Table()
    table.add_column("file")
    table.add_column("where", overflow="fold")
    table.add_column("size", justify="right")
    for what, path in files.items():
        table.add_row(what, str(path), format_bytes(path.stat().st_size))
    return table


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, one a row."""
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
