"""`vcvae train`: the training programs, each with options of its own."""

from __future__ import annotations

import typer

train = typer.Typer(help="Train a VC-VAE, its image VAE, or a denoiser on its latents.", no_args_is_help=True)

# Options, --help among them, are the program's.
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _run(name: str, context: typer.Context) -> None:
    """Hand the arguments to a program of `training/`."""
    from ..training import program

    raise typer.Exit(program.run(name, context.args))


@train.command(context_settings=_PASSED_ON)
def vcvae(context: typer.Context) -> None:
    """Train VC-VAE by the paper's recipe, or fine-tune any diffusers video VAE."""
    _run("vcvae", context)


@train.command("image-vae", context_settings=_PASSED_ON)
def image_vae(context: typer.Context) -> None:
    """Train a small image VAE to inflate."""
    _run("image_vae", context)


@train.command(context_settings=_PASSED_ON)
def latte(context: typer.Context) -> None:
    """Train Latte, the paper's denoiser, on latents."""
    _run("latte", context)
