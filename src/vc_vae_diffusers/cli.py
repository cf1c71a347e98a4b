"""The `vcvae` command. Its subcommands live in `commands/`; here they are registered, and their errors reported."""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from .commands.demo import demo
from .commands.info import info
from .commands.latents import decode, encode
from .commands.reconstruct import reconstruct
from .commands.tools import fetch_weights, plan, stats, visualize
from .data import DataError
from .evaluation.commands import evaluate
from .report.commands import report
from .video import VideoWriteError

_UsageError = typer.BadParameter.__mro__[1]  # typer carries click inside, or uses the one installed, by version
# What a user can put right. Anything else is a bug, and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, VideoWriteError, DataError, torch.OutOfMemoryError)
_OUT_OF_MEMORY = "use --tile, a smaller --dtype or --groups-per-chunk, or --resize"


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


class _ReportingGroup(TyperGroup):
    """Reports errors of every subcommand in one way: a line on stderr, or JSON on stdout with `--json`.

    Exit codes: 1 for what a user can put right, 2 for a wrong call, 70 for bugs, 130 when interrupted. SIGTERM ends a run as
    an exception does, so that partial files are removed.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        as_json = ctx.meta["json"]
        restore = None
        if threading.current_thread() is threading.main_thread():
            restore = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            code = _report("Interrupted", "interrupted; no partial output was left", 130, as_json)
        except torch.OutOfMemoryError as error:
            code = _report("OutOfMemoryError", f"{str(error).splitlines()[0]}; {_OUT_OF_MEMORY}", 1, as_json)
        except _UsageError as error:
            if not as_json:
                raise
            code = _report("UsageError", error.format_message(), 2, as_json)
        except _EXPECTED as error:
            code = _report(type(error).__name__, str(error), 1, as_json)
        except Exception as error:
            traceback.print_exc()
            code = _report(type(error).__name__, f"{error} (a bug: please report it with the traceback)", 70, as_json)
        finally:
            if restore is not None:
                signal.signal(signal.SIGTERM, restore)
        raise typer.Exit(code)


def _report(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps({"error": {"type": kind, "message": message}}, indent=2))
    else:
        Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


app = typer.Typer(
    name="vcvae",
    cls=_ReportingGroup,
    help="VC-VAE: video to latents and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(reconstruct)
app.command()(encode)
app.command()(decode)
app.command()(info)
app.command()(plan)
app.command()(visualize)
app.command()(evaluate)
app.command()(report)
app.command("fetch-weights")(fetch_weights)
app.command()(stats)
app.command()(demo)


def main() -> None:
    """Entry point of the `vcvae` script."""
    app()


if __name__ == "__main__":
    sys.exit(main())
