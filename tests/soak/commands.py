"""What the programs that break commands off share: commands in forked processes, and what they leave behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import av
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import coding
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.coding import latent_shards, latents, reconstruction

IMPORTED = (coding, latent_shards, latents, reconstruction, av)  # once, before processes are forked


def start(words: list[str], log: str | Path = os.devnull, before: Callable[[], None] | None = None) -> int:
    """`vcvae WORDS` in a forked process whose output goes to `log`, after `before()` in it; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if before is not None:
            before()
        app(words)
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        os._exit(code)


def finish(process: int) -> int:
    """Its exit code once it has ended, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(words: list[str]) -> float:
    """Run it to its end; returns its seconds."""
    begin = time.monotonic()
    code = finish(start(words))
    if code:
        raise RuntimeError(f"vcvae {' '.join(words)} ended with {code}")
    return time.monotonic() - begin


def contents(path: Path) -> dict[str, bytes]:
    """What stands under a final name, file or folder; hidden files are temporary."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name[0] != "."}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*.part*"))


def prepare(folder: Path) -> dict[str, tuple[list[str], str, list[str]]]:
    """A tiny model and videos in a folder; returns by name a command up to its OUT, OUT's name, and the words after it."""
    tiny_vae().save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        video = encode(folder / "videos" / name, numbered_frames(24), "ffv1", "yuv444p")
    stored = folder / "in.safetensors"
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    run(["encode", str(video), str(stored), *model])
    return {
        "encode": (["encode", str(video)], "out.safetensors", model),
        "decode": (["decode", str(stored)], "out.mp4", ["--lossless", *model]),
        "reconstruct": (["reconstruct", str(video)], "out.mp4", ["--lossless", *model]),
        "shards": (["encode", str(folder / "videos")], "out", ["--shards", "1", *model]),
    }
