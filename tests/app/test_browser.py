"""The page in a real browser: upload, run, wipe, download; what goes wrong; cancelling; two visitors."""

import contextlib
import re
import shutil
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from video_files import encode, numbered_frames

pytest.importorskip("gradio", reason="needs gradio, of the extra app")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")

from vc_vae_diffusers.app.interface import App, launch  # noqa: E402
from vc_vae_diffusers.app.limits import Limits  # noqa: E402
from vc_vae_diffusers.app.models import Models  # noqa: E402
from vc_vae_diffusers.video import VideoWriter, probe  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds: machines that test may be busy


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def clip(tmp_path) -> Path:
    return encode(tmp_path / "clip.mp4", numbered_frames(10, 32, 64), rate=12)


@pytest.fixture
def served(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "model")
    app = App(Models([str(tmp_path / "model")], torch.device("cpu")), Limits(frames=24, megabytes=2))
    server, address, _ = launch(app, "127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    yield app, address
    server.server.close() if hasattr(server, "server") else None
    app.close()
    assert not app.root.exists()


@pytest.fixture
def visit(browser, served):
    """A new visitor, with cookies and a session of their own."""
    with contextlib.ExitStack() as stack:

        def open_page(width: int = 1280, height: int = 900):
            context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(served[1])
            page.wait_for_selector("#go")
            return page

        yield open_page


def upload(page, path: Path) -> None:
    page.set_input_files("#source input[type=file]", str(path))


def status(page, *words: str) -> str:
    """The status once it says one of the words."""
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile("|".join(words)), timeout=PATIENCE)
    return page.inner_text("#status")


def player_of(page):
    page.wait_for_selector("iframe.vcvae-player")
    frame = page.query_selector("iframe.vcvae-player").content_frame()
    frame.wait_for_function("window.player && window.player.ready")
    return frame


def test_upload_run_wipe_download(visit, clip, tmp_path):
    page = visit()
    upload(page, clip)
    page.get_by_text("clip.mp4").wait_for()
    status(page, "The file is there: reconstruct.")
    page.click("#go")
    assert "PSNR" in status(page, "Done")
    frame = player_of(page)

    def pixels() -> list:
        script = "() => Array.from(document.querySelector('canvas').getContext('2d').getImageData(0, 0, 64, 32).data)"
        return frame.evaluate(script)

    stage = frame.query_selector("#stage").bounding_box()
    middle = stage["y"] + stage["height"] / 2
    page.mouse.move(stage["x"] + 2, middle)
    page.mouse.down()
    assert frame.evaluate("player.wipe") < 0.05
    reconstruction = pixels()
    page.mouse.move(stage["x"] + stage["width"] - 2, middle, steps=5)
    page.mouse.up()
    assert frame.evaluate("player.wipe") > 0.95
    source = pixels()
    assert source != reconstruction
    frame.click("#forth")
    frame.wait_for_function("player.frame === 1")
    frame.wait_for_function("document.querySelector('#where').textContent.includes('frame 2 / 10')")
    assert pixels() != source
    frame.click("text=error")
    assert frame.inner_text("#right") == "error"
    frame.click("#play")
    frame.wait_for_function("player.frame > 2")

    with page.expect_download() as download:
        page.locator("#files a").first.click()
    download.value.save_as(tmp_path / "got.mp4")
    assert probe(tmp_path / "got.mp4").num_frames == 10
    with page.expect_download() as download:
        page.locator("#files a").nth(1).click()
    download.value.save_as(tmp_path / "got.safetensors")

    page.get_by_role("tab", name="Latents").click()
    page.wait_for_selector("#latents img")
    page.locator("#source button[aria-label=Clear], #source button[aria-label='Remove this file']").first.click()
    upload(page, tmp_path / "got.safetensors")
    page.get_by_text("got.safetensors").wait_for()
    page.click("#go")
    page.wait_for_function("!document.querySelector('#status').innerText.includes('PSNR')")
    status(page, "Done")
    assert player_of(page).evaluate("settings.panels") == ["reconstruction"]


def test_a_sample_is_there_before_it_can_be_reconstructed(visit, monkeypatch):
    from vc_vae_diffusers.app import interface

    entered, go_on, inner = threading.Event(), threading.Event(), interface.write_test_pattern

    def slow(path, count):
        entered.set()
        go_on.wait(30)
        inner(path, 8)

    monkeypatch.setattr(interface, "write_test_pattern", slow)
    page = visit()
    page.get_by_role("button", name="test pattern").click()
    assert entered.wait(30)
    status(page, "Taking the sample")
    sync_api.expect(page.locator("#go")).to_be_disabled()
    go_on.set()
    status(page, "The sample is there")
    page.click("#go")
    assert "frames 8, " in status(page, "Done")


def test_frames_that_are_not_equally_far_apart_are_told_by_their_times(visit, tmp_path):
    path = tmp_path / "pause.mp4"
    times = [Fraction(k, 10) for k in (0, 1, 2, 12, 13, 14, 15, 16)]  # a pause of a second after the third
    with VideoWriter(path, 10, threads=1) as writer:
        writer.write(torch.from_numpy(numbered_frames(8, 32, 64)).permute(3, 0, 1, 2), times)
    page = visit()
    upload(page, path)
    page.get_by_text(path.name).wait_for()
    page.click("#go")
    status(page, "Done")
    player = player_of(page)
    for number, time_of in ((3, 1.2), (5, 1.4), (1, 0.1), (2, 0.2)):
        player.evaluate(
            f"new Promise(done => {{ source.addEventListener('seeked', done, {{once: true}}); toFrame({number}) }})"
        )
        assert player.evaluate("player.frame") == number
        shown = player.evaluate("source.currentTime")
        assert time_of < shown < float([*times, Fraction(17, 10)][number + 1])


def test_a_broken_file_and_one_too_large_are_said(visit, tmp_path):
    page = visit()
    page.click("#go")
    assert "choose a video or image first" in status(page, "Not yet")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    upload(page, tmp_path / "broken.mp4")
    page.get_by_text("broken.mp4").wait_for()
    page.click("#go")
    said = status(page, "cannot be done")
    assert "broken.mp4" in said
    assert "/" not in said.split("broken.mp4")[0]  # no folder of the server
    (tmp_path / "large.mp4").write_bytes(bytes(3_000_000))
    page = visit()
    upload(page, tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_cancelling_stops_the_work(visit, served, clip, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    from vc_vae_diffusers.app import work

    inner = work.Clock.stage

    def slow(clock, what, number):
        progress = inner(clock, what, number)

        def told(done, total):
            entered.set()
            if done:
                go_on.wait(30)
            progress(done, total)

        return told

    monkeypatch.setattr(work.Clock, "stage", slow)
    page = visit()
    upload(page, clip)
    page.get_by_text("clip.mp4").wait_for()
    page.click("#go")
    assert entered.wait(30)
    page.click("#stop")
    status(page, "Cancelled")  # the visitor waits for nothing, and what is at work ends where it can
    assert not page.query_selector("iframe.vcvae-player")
    go_on.set()
    until = time.monotonic() + 30
    while results := list(served[0].root.glob("*/*")):
        assert time.monotonic() < until, results
        time.sleep(0.1)


def test_no_room_is_said_before_an_upload_and_before_work(visit, served, clip):
    page = visit()
    page.get_by_role("button", name="test pattern").click()
    status(page, "The sample is there")
    with open(served[0].root / "others", "wb") as file:
        file.truncate(served[0].limits.gigabytes * 10**9 + 1)
    page.click("#go")
    assert "as many as this app keeps: try again later" in status(page, "cannot be done")
    page = visit()
    upload(page, clip)
    page.get_by_text("as many as this app keeps").first.wait_for()


def test_two_visitors_do_not_mix_and_leave_nothing(visit, served, clip, tmp_path):
    other = encode(tmp_path / "other.mp4", numbered_frames(6, 48, 32), rate=12)
    first, second = visit(), visit(390, 800)
    for page, path in ((first, clip), (second, other)):
        upload(page, path)
        page.get_by_text(path.name).wait_for()
    first.click("#go")
    second.click("#go")
    assert "10, 64x32" in status(first, "Done")
    assert "6, 32x48" in status(second, "Done")
    assert player_of(first).evaluate("frames") == 10
    assert player_of(second).evaluate("frames") == 6
    box = second.query_selector("iframe.vcvae-player").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390  # fits a phone
    assert len(served[0].sessions) == len([path for path in served[0].root.iterdir() if path.is_dir()]) == 2
    first.close()
    second.close()
    until = time.monotonic() + 30
    while served[0].sessions and time.monotonic() < until:
        time.sleep(0.1)
    assert list(served[0].root.iterdir()) == []
