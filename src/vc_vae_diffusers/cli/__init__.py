"""The `vcvae` command: `app.py` registers the subcommands, one module each. Nothing heavy is imported before one runs."""

import sys


def main() -> None:
    """Entry point of the `vcvae` script."""
    try:
        from .app import app

        app()
    except KeyboardInterrupt:  # while Python was still starting
        sys.stderr.write("Error: interrupted\n")
        sys.exit(130)
