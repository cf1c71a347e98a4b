"""`vcvae app`: the same in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from ..extras import install_hint
from .models import check_model
from .options import DeviceOption, check_place, choose_device
from .printing import say, warn


def browser_app(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Folder or hub id to offer beside the bundled model; repeatable."),
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model/--only-these", help="Whether visitors may name other folders and hub ids.")
    ] = True,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="By default a free one from 7860.")] = None,
    max_frames: Annotated[int, typer.Option("--max-frames", min=1, help="Of one request.")] = 256,
    max_side: Annotated[int, typer.Option("--max-side", min=8, help="Longer side of a frame in pixels.")] = 1280,
    max_seconds: Annotated[int, typer.Option("--max-seconds", min=1, help="That one request may work.")] = 900,
    max_megabytes: Annotated[int, typer.Option("--max-megabytes", min=1, help="Of an upload.")] = 200,
    max_megapixels: Annotated[
        int, typer.Option("--max-megapixels", min=1, help="Of an upload's pictures, before they are made smaller.")
    ] = 36,
    max_gigabytes: Annotated[
        int, typer.Option("--max-gigabytes", min=1, help="Of all visitors' uploads and results together.")
    ] = 20,
    device: DeviceOption = "auto",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Serve a page that reconstructs and compares videos and images: source, reconstruction, error, latents, motion."""
    check_place(device, "auto")
    for model in models or []:
        check_model(model, None)
    say("The page is being made …")
    try:
        from ..app.interface import serve
    except ImportError as error:
        raise ImportError(f"the app needs gradio: {install_hint('app')}") from error
    from ..app.limits import Limits
    from ..app.models import BUNDLED, Models

    if any_model and host not in ("127.0.0.1", "localhost", "::1"):
        warn(f"--host {host} lets strangers in, and --any-model lets them load what they name: add --only-these")
    offered = Models([BUNDLED, *(models or [])], choose_device(device), any_model)
    limits = Limits(max_frames, max_side, max_seconds, max_megabytes, max_megapixels, max_gigabytes)
    serve(offered, limits, host, port, lambda address: say(f"The page is at {address} until Ctrl-C."), inbrowser=browser)
