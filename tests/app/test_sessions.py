"""Visitors of the app, without a browser: what is cancelled, what fails, what stays of it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from video_files import encode, numbered_frames

pytest.importorskip("gradio", reason="needs gradio, of the extra app")

import gradio as gr

from vc_vae_diffusers.app import interface
from vc_vae_diffusers.app.interface import App
from vc_vae_diffusers.app.limits import Limits
from vc_vae_diffusers.app.models import Models
from vc_vae_diffusers.video import VideoWriteError

WISH = ("", 8, "original", "original", "float32", 0)


@pytest.fixture
def app(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "model")
    app = App(Models([str(tmp_path / "model")], torch.device("cpu")), Limits())
    yield app
    app.close()


@pytest.fixture
def clip(tmp_path) -> str:
    return str(encode(tmp_path / "in.mkv", numbered_frames(6, 16, 32), "ffv1", "bgr0", rate=12))


def visitor(key: str | None) -> SimpleNamespace:
    return SimpleNamespace(session_hash=key)


def ask(app: App, source: str, key: str | None = "a", wish: tuple = WISH):
    return app.run(source, *wish, visitor(key))


def last_status(running) -> str:
    return [values[0] for values in running][-1]


def folders(app: App) -> list[str]:
    """Once what was to be removed has been."""
    app._threads.submit(int).result()
    return sorted(str(path.relative_to(app.root)) for path in app.root.glob("*/*"))


def test_a_request_in_line_can_be_cancelled_and_others_go_on(app, clip):
    go_on = threading.Event()
    app._threads.submit(go_on.wait, 30)
    first, second = ask(app, clip, "a"), ask(app, clip, "b")
    assert next(first)[0] == next(second)[0] == "waiting …"
    assert app.cancel(visitor("b")) == gr.skip()  # its run says the rest, and whatever came after that would stay
    go_on.set()
    assert last_status(second) == "Cancelled."
    assert last_status(first).startswith("Done")
    assert len(folders(app)) == 1
    assert last_status(ask(app, clip, "b")).startswith("Done")  # it does not stay cancelled


@pytest.mark.parametrize(
    ("error", "said", "logged"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "not enough memory", True),
        (VideoWriteError("the disk is full"), "the disk is full", False),
        (SafetensorError("header too large"), "header too large", False),
        (KeyError("what nobody thought of"), "what nobody thought of", True),
    ],
)
def test_whatever_fails_is_said_and_leaves_nothing(app, clip, error, said, logged, monkeypatch, caplog):
    def fail(*_):
        raise error

    monkeypatch.setattr(interface, "carry_out", fail)
    assert re.match(rf"\*\*It cannot be done:\*\* .*{said}", last_status(ask(app, clip)))
    assert folders(app) == []
    assert ("A request failed." in caplog.messages) == logged


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (1, float("nan"), "Frames: nan is no number"),
        (5, float("inf"), "From second: inf"),
        (4, "int3", "'int3' is none of auto"),
    ],
)
def test_what_is_no_wish_is_said(app, clip, place, value, said):
    wish = [*WISH]
    wish[place] = value
    assert said in last_status(ask(app, clip, wish=tuple(wish)))


def test_messages_name_no_folders_of_the_machine(app, clip, tmp_path, monkeypatch):
    def fail(wish, models, limits, folder, *_):
        raise OSError(f"{wish.source}: cannot be written to {folder / 'x.mp4'}")

    monkeypatch.setattr(interface, "carry_out", fail)
    assert last_status(ask(app, clip)).endswith("in.mkv: cannot be written to x.mp4")


def test_a_visitor_who_leaves_in_the_middle_leaves_nothing(app, clip, monkeypatch):
    written, go_on = threading.Event(), threading.Event()

    def slow(wish, models, limits, folder, tell, cancelled):
        written.set()
        go_on.wait(30)
        (folder / "late.mp4").write_bytes(b"x")  # the folder must be there still
        assert cancelled()
        raise interface.Cancelled

    monkeypatch.setattr(interface, "carry_out", slow)
    running = ask(app, clip)
    next(running)
    assert written.wait(30)
    app.leave(visitor("a"))
    running.close()
    assert len(list(app.root.iterdir())) == 1
    go_on.set()
    assert folders(app) == []
    assert list(app.root.iterdir()) == []


def test_sessions_are_of_those_who_work(app, clip):
    assert app.cancel(visitor("nobody")) == "Nothing is running."
    assert app.sessions == {}
    for _ in range(2):
        assert last_status(ask(app, clip, None)).startswith("Done")
    assert len(app.sessions) == 2  # who has no name shares no folder


def test_sessions_end_when_they_are_idle_or_too_many(app, clip, monkeypatch):
    monkeypatch.setattr(interface, "_MOST_SESSIONS", 2)
    for key in "abc":
        assert last_status(ask(app, clip, key)).startswith("Done")
    assert set(app.sessions) == {"b", "c"}
    monkeypatch.setattr(interface, "_IDLE_SECONDS", 0.0)
    time.sleep(0.01)
    running = ask(app, clip, "d")
    next(running)
    assert set(app.sessions) == {"d"}
    assert last_status(running).startswith("Done")
    assert len(folders(app)) == 1


def test_the_command_says_where_the_page_is_and_ends_by_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "vc_vae_diffusers", "app", "--no-browser", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stderr.readline() == "The page is being made …\n"
            assert re.fullmatch(r"The page is at http://127\.0\.0\.1:\d+/? until Ctrl-C\.\n", running.stderr.readline())
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, out, err) == (0, "", "")
    assert not list(tmp_path.glob("vcvae*"))
