"""The `vcvae` command: registers its subcommands, which are the modules beside this one, and reports their errors."""

from __future__ import annotations

import json
import signal
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vc_vae_diffusers import __version__

from ..names import memory_short, peer_gone, told
from .browser_app import browser_app
from .decode import decode
from .demo import demo
from .encode import encode
from .evaluate import evaluate
from .export import export
from .fetch_weights import fetch_weights
from .info import info
from .plan import plan
from .printing import say
from .reconstruct import reconstruct
from .report import report
from .stats import stats
from .stopping import Stopping
from .train import train
from .visualize import visualize

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries click inside, or uses the one installed, by version
_LARGEST = {"seed": 2**63}  # beyond which an option makes no sense; of all others 2**31
_STOPPED: dict[int, tuple[str, str, int]] = {
    signal.SIGINT: ("Interrupted", "interrupted; no partial output was left", 130),
    signal.SIGTERM: ("Terminated", "terminated by SIGTERM; no partial output was left", 143),
}
_OUT_OF_MEMORY = "use --tile, a smaller --dtype or --groups-per-chunk, or --resize"


class _PlainFlags:
    """Flags take no value, and `--help` shows none: typer would say `<bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    """Refuses numbers that no video, machine or person means, which would overflow somewhere inside; NaN among them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        left = super().parse_args(ctx, args)
        param: Any
        for param in self.params:
            value, largest = ctx.params.get(param.name), _LARGEST.get(param.name or "", 2**31)
            if isinstance(value, int | float) and not abs(value) < largest:
                raise typer.BadParameter(f"{value} must be a number below {largest}", ctx=ctx, param=param)
        return left


class _Group(_PlainFlags, TyperGroup):
    pass


class _ReportingGroup(_Group):
    """Reports errors of every subcommand in one way: a line on stderr, or JSON on stdout with `--json`.

    Exit codes: 1 for what a user can put right, 2 for a wrong call, 70 for bugs, 130 when interrupted, 143 when terminated.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        as_json = ctx.meta["json"]
        stopping = Stopping()
        try:
            with stopping:
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            if stopping.heard:
                code = _report(*_STOPPED[stopping.heard], as_json)
            elif isinstance(error, _UsageError):
                _name_all_missing(error)
                if not as_json:
                    raise
                code = _report("UsageError", error.format_message(), 2, as_json)
            elif isinstance(error, Exception):
                code = _report_exception(error, as_json)
            else:
                raise
        raise typer.Exit(code)


def _name_all_missing(error: Any) -> None:
    """Where one word is given for `IN... OUT`, it was taken for OUT, though people mean IN."""
    missing = getattr(error, "param", None)
    if type(error).__name__ == "MissingParameter" and missing is not None and missing.nargs == -1:
        arguments = [param for param in error.ctx.command.params if param.param_type_name == "argument"]
        error.param_hint = " or ".join(f"'{param.metavar.strip('{}.')}'" for param in arguments)


def _report_exception(error: Exception, as_json: bool) -> int:
    """One line for what a user can put right. Anything else is a bug, and shows its traceback."""
    kind = type(error).__name__
    if short := memory_short(error):
        return _report("OutOfMemoryError", f"{short}; {_OUT_OF_MEMORY}", 1, as_json)
    if gone := peer_gone(error):
        return _report(kind, gone, 1, as_json)
    if isinstance(error, (ValueError, OSError, ImportError)) or kind in ("VideoWriteError", "DataError"):
        return _report(kind, told(error), 1, as_json)
    traceback.print_exception(error)
    return _report(kind, f"{error} (a bug: please report it with the traceback)", 70, as_json)


def _report(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps({"error": {"type": kind, "message": message}}, indent=2))
    else:
        say(f"Error: {message}", "red")
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vcvae {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="vcvae",
    cls=_ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def vcvae(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """VC-VAE: video to latents and back.

    Outputs that exist are replaced with --overwrite only; missing folders are made.

    Results go to stdout, with --json as one object; progress and warnings to stderr.
    """


for command in (reconstruct, encode, decode, info, plan, visualize, evaluate, report, fetch_weights, stats, export, demo):
    app.command(cls=_Command)(command)
app.command("app", cls=_Command)(browser_app)
app.add_typer(train, name="train", cls=_Group)
