"""What people are told when the hub refuses: a server on this machine answers as the hub does."""

import http.server
import re
import threading

import httpx
import huggingface_hub
import pytest
import torch
from diffusers.utils import hub_utils
from huggingface_hub.errors import GatedRepoError
from typer.testing import CliRunner

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.app.models import Models
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.evaluation.loading import ModelSpec, load_model
from vc_vae_diffusers.names import hub_problem
from vc_vae_diffusers.training import any_vae

LOG_IN = r"log in with an account that may read it \(`hf auth login`, or HF_TOKEN\)"
ANSWERS = {
    (403, ""): "answered 403 for .*{access}",
    (401, ""): "answered 401 for .*{access}",
    (404, ""): "answered 404 for .*try again later",
    (403, "GatedRepo"): "is gated: accept its licence on its hub page with your account, then {access}",
    (401, "RepoNotFound"): "not a hub repository that you can see: check the spelling, or {access}",
    (404, "RevisionNotFound"): "has no such revision",
}
TOKEN = r"pass a token that may read it \(.*--token\)"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let the libraries ask this machine; returns how to set the answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            if self.server.code:
                self.send_header("X-Error-Code", self.server.code)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setattr(huggingface_hub.constants, name, address, raising=False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_utils, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)

    def answers(status: int, code: str) -> None:
        server.status, server.code = status, code

    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: " ".join(map(str, answer)).strip())
def test_a_refusal_says_what_it_is_and_what_helps(answer, hub, tmp_path):
    hub(*answer)
    clip = tmp_path / "clip.mp4"
    clip.touch()
    for command in (
        ["info", "someone/vae"],
        ["encode", str(clip), str(tmp_path / "out.safetensors"), "--model", "someone/vae"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert_told(" ".join(result.output.split()), answer, LOG_IN)
    for load in (
        lambda: AutoencoderKLVCVAE.from_image_vae("someone/vae"),
        lambda: load_model(ModelSpec("theirs", "someone/vae")),
        lambda: load_model(ModelSpec("theirs", "inflate:someone/vae")),
    ):
        with pytest.raises(OSError, match="someone/vae") as raised:
            load()
        assert_told(str(raised.value), answer, TOKEN)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: " ".join(map(str, answer)).strip())
def test_trainers_and_the_app_say_it_too(answer, hub):
    hub(*answer)
    for option, load in {
        "--model": lambda: any_vae.load_vae("someone/vae"),
        "model": lambda: Models(["someone/vae"], torch.device("cpu"))._load("someone/vae", torch.float32),
    }.items():
        with pytest.raises(OSError, match=f"^{option}: someone/vae") as raised:
            load()
        assert_told(str(raised.value), answer, LOG_IN)


def test_what_is_not_the_hubs_is_not_said_of_it():
    refused = GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))
    full, other = OSError(28, "No space left on device"), ValueError("bad")
    full.__context__ = other.__context__ = refused
    assert hub_problem("someone/vae", other).startswith("someone/vae is gated")
    other.__suppress_context__ = True
    assert hub_problem("someone/vae", other) is None
    assert hub_problem("someone/vae", full) is None


def assert_told(text: str, answer: tuple[int, str], access: str) -> None:
    assert "someone/vae" in text
    assert re.search(ANSWERS[answer].format(access=access), text), text


def test_no_connection_is_told_from_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["info", "someone/vae"])
    assert "the hub cannot be reached, and its cache lacks it" in " ".join(result.output.split())
